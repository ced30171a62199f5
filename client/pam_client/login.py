"""The access token of whoever calls: a person's login, kept fresh, or a program's client credentials."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from pam_client.home import Home, Settings
from pam_client.oauth import Authority, OAuthError
from pam_client.store import Tokens, TokenStore
from pam_common.errors import AuthenticationError, PamError
from pam_common.files import read_private

#: Renew this early, in seconds: a request begun with a token must not arrive with a dead one.
MARGIN = 30.0
LOG_IN = "run: pam-client login"


class Login(Protocol):
    """Gives the bearer token for each request; safe from any thread."""

    def token(self, *, rejected: str = "") -> str:
        """A usable access token, and another one than ``rejected`` (which the platform refused)."""


def find_login(home: Home, settings: Settings, environment: Mapping[str, str] | None = None) -> Login:
    """The program's credentials when PAM_CLIENT_ID is set, else the person's stored login."""
    env = os.environ if environment is None else environment
    authority = Authority(settings.platform, settings.platform_ca)
    if client_id := env.get("PAM_CLIENT_ID"):
        secret_file = env.get("PAM_CLIENT_SECRET_FILE")
        if not secret_file:
            raise PamError(
                "PAM_CLIENT_ID is set without PAM_CLIENT_SECRET_FILE",
                hint="name a file of mode 0600 with the secret; the environment itself is no place for it.",
            )
        return ProgramLogin(authority, client_id, Path(secret_file))
    return PersonLogin(authority, TokenStore(home, settings.platform))


class PersonLogin:
    """Tokens from ``pam-client login``. A refresh happens in one process at a time: a refresh token is
    spent by its first use, and a second use looks like theft."""

    def __init__(self, authority: Authority, store: TokenStore) -> None:
        self._authority = authority
        self._store = store

    def token(self, *, rejected: str = "") -> str:
        tokens = self._store.load()
        if not _usable(tokens, rejected):
            with self._store.lock():
                # Another process may have been faster; its tokens are ours.
                tokens = self._store.load()
                if tokens is not None and not _usable(tokens, rejected):
                    tokens = self._refresh(tokens)
        if tokens is None:
            raise AuthenticationError("not logged in", hint=LOG_IN)
        return tokens.access

    def _refresh(self, tokens: Tokens) -> Tokens:
        if not tokens.refresh:
            raise AuthenticationError("the login has expired", hint=LOG_IN)
        try:
            fresh = self._authority.refresh(tokens)
        except OAuthError as error:
            if error.code == "invalid_grant":
                raise AuthenticationError("the login has expired or was revoked", hint=LOG_IN) from None
            raise
        self._store.save(fresh)
        return fresh


class ProgramLogin:
    """A service's client credentials; the token lives in memory only."""

    def __init__(self, authority: Authority, client_id: str, secret_file: Path) -> None:
        self._authority = authority
        self._client_id = client_id
        self._secret_file = secret_file
        self._tokens: Tokens | None = None
        self._lock = threading.Lock()

    def token(self, *, rejected: str = "") -> str:
        with self._lock:
            if self._tokens is None or not _usable(self._tokens, rejected):
                self._tokens = self._ask()
            return self._tokens.access

    def _ask(self) -> Tokens:
        try:
            secret = read_private(self._secret_file, max_size=4096).decode().strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not text"
            raise PamError(f"cannot read PAM_CLIENT_SECRET_FILE {self._secret_file}: {reason}") from None
        try:
            return self._authority.client_credentials(self._client_id, secret)
        except OAuthError as error:
            if error.code != "invalid_client":
                raise
            raise AuthenticationError(
                f'the platform does not accept the credentials of "{self._client_id}"',
                hint="are PAM_CLIENT_ID and PAM_CLIENT_SECRET_FILE of the same service?",
            ) from None


def _usable(tokens: Tokens | None, rejected: str) -> bool:
    if tokens is None:
        return False
    return tokens.access != rejected and tokens.expires - MARGIN > time.time()
