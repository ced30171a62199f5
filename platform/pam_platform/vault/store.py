"""Vault entries in the database."""

from __future__ import annotations

import base64
import secrets

from django.db import transaction

from pam_common.errors import ConfigError, PamError
from pam_platform.vault import master
from pam_platform.vault.models import VaultEntry
from pam_platform.vault.seal import MasterKey, Sealed, rewrap, seal, unseal


def put(secret: bytes) -> VaultEntry:
    """Store a new entry."""
    entry = VaultEntry(id="v-" + base64.b32encode(secrets.token_bytes(16)).decode().rstrip("=").lower())
    _fill(entry, seal(secret, master.load().current, entry.id, 1))
    entry.save(force_insert=True)
    return entry


def replace(entry: VaultEntry, secret: bytes) -> None:
    """Make ``secret`` the entry's next version; the one before is gone."""
    entry.version += 1
    _fill(entry, seal(secret, master.load().current, entry.id, entry.version))
    entry.save()


def reveal(entry: VaultEntry) -> bytes:
    """Return the secret. Raises AuthenticationError for a damaged entry, ConfigError without its key."""
    return unseal(_sealed(entry), _master_of(entry), entry.id, entry.version)


@master.locked()
def rekey() -> tuple[str, int]:
    """Put every entry under a new master key; returns its id and how many entries were moved.

    With a key file of ours: a new key is made, used beside the old, and then alone. With a credential of
    systemd: entries move to its first key, and the administrator removes the others.
    """
    where = master.source()
    keys = master.read(where)
    if where.ours:
        keys.insert(0, master.generate())
        # From here on either key opens; a crash leaves both, and the next run goes on.
        master.write(where, keys)
    else:
        master.load(fresh=True)
    moved = 0
    while ids := list(VaultEntry.objects.exclude(master_kid=keys[0].kid).values_list("pk", flat=True)[:500]):
        moved += sum(_move(pk, keys[0]) for pk in ids)
    if where.ours:
        master.write(where, keys[:1])
    return keys[0].kid, moved


def _move(pk: str, new: MasterKey) -> int:
    with transaction.atomic():
        entry = VaultEntry.objects.select_for_update().filter(pk=pk).first()
        if entry is None:
            return 0
        _fill(entry, rewrap(_sealed(entry), _master_of(entry), new, entry.id, entry.version))
        entry.save(update_fields=["master_kid", "wrapped_key", "ciphertext"])
    return 1


def _master_of(entry: VaultEntry) -> MasterKey:
    # A key this process does not know yet may be the one another process is re-keying to.
    for fresh in (False, True):
        key = master.load(fresh=fresh).by_kid.get(entry.master_kid)
        if key is not None:
            return key
    raise ConfigError(
        [f"vault entries are sealed under master key {entry.master_kid}, which is not in the key file"],
        hint="restore that key as a further line of the master key file.",
    )


def _sealed(entry: VaultEntry) -> Sealed:
    return Sealed(entry.master_kid, bytes(entry.wrapped_key), bytes(entry.ciphertext))


def _fill(entry: VaultEntry, sealed: Sealed) -> None:
    entry.master_kid, entry.wrapped_key, entry.ciphertext = (
        sealed.master_kid,
        sealed.wrapped_key,
        sealed.ciphertext,
    )


def check() -> None:
    """Raise PamError unless the master key opens what is stored (one entry stands for all under its key)."""
    for kid in VaultEntry.objects.values_list("master_kid", flat=True).distinct():
        entry = VaultEntry.objects.filter(master_kid=kid).first()
        if entry is not None:
            try:
                reveal(entry)
            except PamError as error:
                raise ConfigError([f"vault: {error}"], hint=error.hint) from None
