"""Where a login's tokens are kept: the system's keyring where there is one, else a 0600 file.

The file wins when both exist: it is written only where the keyring failed. All changes happen under
:meth:`TokenStore.lock`, since a refresh token is spent by its use.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from pam_client.home import Home
from pam_common.errors import PamError

_FILE, _LOCK = "tokens.json", "tokens.lock"
_SERVICE = "pam-client"


@dataclass(frozen=True)
class Tokens:
    """One login. ``expires`` is the access token's end in UNIX seconds of this machine's clock."""

    access: str = field(repr=False)
    expires: float
    refresh: str = field(default="", repr=False)


class TokenStore:
    """The tokens of one platform's login."""

    def __init__(self, home: Home, platform: str) -> None:
        self._home = home
        self._platform = platform

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Against every other process of this user; held while tokens are changed."""
        with self._home.lock(_LOCK):
            yield

    def load(self) -> Tokens | None:
        """The stored tokens, or None when there is no login."""
        stored = self._home.read_json(_FILE).get(self._platform)
        if stored is None:
            stored = self._from_keyring()
        return _parse(stored)

    def save(self, tokens: Tokens) -> str:
        """Keep ``tokens``; returns where ("keyring" or the file's path)."""
        text = json.dumps(asdict(tokens))
        if self._to_keyring(text):
            self._drop_from_file()
            return "keyring"
        self._home.write_json(_FILE, self._home.read_json(_FILE) | {self._platform: asdict(tokens)})
        return str(self._home.folder / _FILE)

    def remove(self) -> None:
        """Forget the login, wherever it is."""
        self._drop_from_file()
        with contextlib.suppress(PamError), _keyring() as ring:
            if ring is not None and ring.get_password(_SERVICE, self._platform) is not None:
                ring.delete_password(_SERVICE, self._platform)

    def _drop_from_file(self) -> None:
        stored = self._home.read_json(_FILE)
        if stored.pop(self._platform, None) is not None:
            self._home.write_json(_FILE, stored)

    def _from_keyring(self) -> Any:
        try:
            with _keyring() as ring:
                text = ring.get_password(_SERVICE, self._platform) if ring is not None else None
            return json.loads(text) if text else None
        except (PamError, ValueError):
            return None

    def _to_keyring(self, text: str) -> bool:
        try:
            with _keyring() as ring:
                if ring is None:
                    return False
                ring.set_password(_SERVICE, self._platform, text)
                return True
        except PamError:
            return False


@contextlib.contextmanager
def _keyring() -> Iterator[Any]:
    """The keyring's backend, or None where it is none that keeps a secret; its errors as PamError.

    Imported here: it looks for backends on D-Bus, which commands without a login need not wait for.
    """
    import keyring
    import keyring.core
    import keyring.errors

    try:
        backend = keyring.get_keyring()
        # Below 1 are plain-text files, prompts for a second password, and the backend that only fails.
        yield backend if keyring.core.recommended(backend) else None
    except (keyring.errors.KeyringError, OSError, RuntimeError) as error:
        raise PamError(f"the keyring cannot be used: {error}") from None


def _parse(stored: Any) -> Tokens | None:
    if not isinstance(stored, dict):
        return None
    access, expires, refresh = stored.get("access"), stored.get("expires"), stored.get("refresh", "")
    if not (isinstance(access, str) and isinstance(expires, int | float) and isinstance(refresh, str)):
        return None
    return Tokens(access=access, expires=float(expires), refresh=refresh)
