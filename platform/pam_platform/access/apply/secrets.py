"""The secrets that only some protocols have, by name, and the vault entries that hold them."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from typing import Any

from pam_platform.access.apply.changes import SECRET
from pam_platform.access.models import Account, AccountSecret, Resource, ResourceSecret
from pam_platform.vault import store
from pam_platform.vault.models import VaultEntry


class NamedSecrets:
    """Puts ``wanted`` into the vault; :meth:`save` lets ``owner``, by then saved, refer to it.

    ``shown`` says which secrets were set, changed or dropped, for the list of changes.
    """

    def __init__(self, owner: Account | Resource, wanted: Mapping[str, bytes]) -> None:
        self._owner = owner
        self._have: dict[str, AccountSecret | ResourceSecret] = {}
        if not owner._state.adding:
            self._have = {row.name: row for row in owner.secrets.select_related("entry")}
        self._added: dict[str, VaultEntry] = {}
        self._dropped = sorted(set(self._have) - set(wanted))
        self.shown: dict[str, tuple[Any, Any]] = dict.fromkeys(self._dropped, (SECRET, None))
        for name, secret in sorted(wanted.items()):
            self._put(name, secret)

    def _put(self, name: str, secret: bytes) -> None:
        row = self._have.get(name)
        if row is None:
            self._added[name] = store.put(secret)
            self.shown[name] = (None, SECRET)
        elif not hmac.compare_digest(store.reveal(row.entry), secret):
            store.replace(row.entry, secret)
            self.shown[name] = (SECRET, SECRET)

    def save(self) -> None:
        """Refer to what was added, and forget what the file no longer names."""
        for name, entry in self._added.items():
            self._owner.secrets.create(name=name, entry=entry)
        for name in self._dropped:
            row = self._have[name]
            row.delete()
            row.entry.delete()
