"""The OAuth 2.0 requests of a client: device authorization (RFC 8628), refresh, client credentials, revoke.

The endpoints come from the platform's discovery document and are used only when they are on the
platform's own origin: a document that names another host would send the person, or their tokens, there.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests

from pam_client.output import clean
from pam_client.store import Tokens
from pam_common.errors import AuthenticationError, PamError, ProtocolError, RefusedError, UnavailableError
from pam_common.platform_client import reason_of  # the same words for the same trouble

#: The public client that the platform registers for this program; the secret of a person is their login.
CLIENT_ID = "pam-client"
SCOPE = "pam"
_DISCOVERY = "/.well-known/openid-configuration"
_DEVICE_GRANT = "urn:ietf:params:oauth:grant-type:device_code"
#: Token answers and discovery documents are a few kilobytes.
_MAX_ANSWER = 256 << 10
_TIMEOUT = (10.0, 30.0)
#: RFC 8628 §3.2 and §3.5: the default interval, and what slow_down adds.
_INTERVAL, _SLOWER = 5.0, 5.0
#: Nobody types a code for an hour; an absurd expires_in or interval must not keep us here.
_MAX_WAIT, _MAX_INTERVAL = 3600.0, 60.0


class OAuthError(RefusedError):
    """The token endpoint said no; ``code`` is its error code (RFC 6749 §5.2)."""

    def __init__(self, code: str, description: str) -> None:
        super().__init__(f"the platform refused: {description or code}")
        self.code = code


@dataclass(frozen=True)
class DeviceCode:
    """A login in progress. ``user_code`` is for the person, ``device_code`` for us alone."""

    device_code: str = field(repr=False)
    user_code: str
    url: str  #: where the code is typed
    complete_url: str  #: the same with the code in it, or ``url``
    expires_in: float
    interval: float


class Authority:
    """The platform's OAuth endpoints."""

    def __init__(self, platform: str, ca_file: Path | None = None) -> None:
        self.platform = platform
        self._session = requests.Session()
        self._session.trust_env = False  # no proxy, no ~/.netrc: neither may see our tokens
        self._verify: str | bool = str(ca_file) if ca_file else True
        self._endpoints: dict[str, Any] = {}

    def start_device(self) -> DeviceCode:
        """Ask for a code pair."""
        answer = self._post("device_authorization_endpoint", {"client_id": CLIENT_ID, "scope": SCOPE})
        url = self._own(answer.get("verification_uri"), "verification_uri")
        complete = answer.get("verification_uri_complete")
        return DeviceCode(
            device_code=_text(answer, "device_code"),
            user_code=_text(answer, "user_code"),
            url=url,
            complete_url=self._own(complete, "verification_uri_complete") if complete else url,
            expires_in=min(_seconds(answer, "expires_in", 600.0), _MAX_WAIT),
            interval=min(_seconds(answer, "interval", _INTERVAL), _MAX_INTERVAL),
        )

    def wait_for_device(self, code: DeviceCode, *, wait: Callable[[float], object] | None = None) -> Tokens:
        """Poll until the person confirmed (or not). ``wait(seconds)`` pauses; for tests."""
        pause = wait or threading.Event().wait
        form = {"grant_type": _DEVICE_GRANT, "device_code": code.device_code, "client_id": CLIENT_ID}
        deadline = time.monotonic() + code.expires_in
        interval = code.interval
        while time.monotonic() + interval <= deadline:
            pause(interval)
            try:
                return _tokens(self._post("token_endpoint", form))
            except OAuthError as error:
                interval += _next_pause(error)
            except UnavailableError:
                # RFC 8628 §3.5: back off when the server does not answer; the code stays good.
                interval = min(interval * 2, _MAX_INTERVAL)
        raise AuthenticationError("the code expired before it was confirmed", hint="run: pam-client login")

    def refresh(self, tokens: Tokens) -> Tokens:
        """Spend the refresh token. Not repeated on failure: a second use of one is refused."""
        form = {"grant_type": "refresh_token", "refresh_token": tokens.refresh, "client_id": CLIENT_ID}
        fresh = _tokens(self._post("token_endpoint", form))
        return fresh if fresh.refresh else Tokens(fresh.access, fresh.expires, tokens.refresh)

    def client_credentials(self, client_id: str, secret: str) -> Tokens:
        """A token for a program (RFC 6749 §4.4); there is nothing to refresh, it asks again."""
        form = {"grant_type": "client_credentials"}
        return _tokens(self._post("token_endpoint", form, auth=(client_id, secret)))

    def revoke(self, token: str, hint: str) -> None:
        """RFC 7009. ``hint`` is ``access_token`` or ``refresh_token``."""
        self._post("revocation_endpoint", {"token": token, "token_type_hint": hint, "client_id": CLIENT_ID})

    def _post(
        self, endpoint: str, form: dict[str, str], auth: tuple[str, str] | None = None
    ) -> dict[str, Any]:
        if not self._endpoints:
            self._endpoints = self._call("GET", self.platform + _DISCOVERY)
        url = self._own(self._endpoints.get(endpoint), endpoint)
        return self._call("POST", url, data=form, auth=auth)

    def _own(self, url: object, name: str) -> str:
        """``url`` if it is on the platform's origin. Raises ProtocolError."""
        if not isinstance(url, str) or not url.isprintable() or _origin(url) != _origin(self.platform):
            raise ProtocolError(
                f"the platform names a {name} that is not its own: {clean(url, limit=200)}",
                hint="use the address by which the platform knows itself (its public_url).",
            )
        return url

    def _call(self, method: str, url: str, **options: Any) -> dict[str, Any]:
        try:
            with self._session.request(
                method,
                url,
                headers={"Accept": "application/json"},
                timeout=_TIMEOUT,
                allow_redirects=False,
                stream=True,
                verify=self._verify,
                **options,
            ) as response:
                body = response.raw.read(_MAX_ANSWER + 1, decode_content=True)
                return _answer(response.status_code, body)
        except requests.exceptions.SSLError as error:
            raise UnavailableError(
                f"the TLS certificate of {self.platform} is not accepted: {reason_of(error)}",
                hint="is platform_ca set to the CA that signed it, and is the name right?",
            ) from None
        except (requests.RequestException, OSError) as error:
            raise UnavailableError(
                f"the platform at {self.platform} does not answer: {reason_of(error)}"
            ) from None


def _answer(status: int, body: bytes) -> dict[str, Any]:
    if status >= 500 or status == 429:
        raise UnavailableError(f"the platform answered with HTTP {status}")
    try:
        answer = json.loads(body) if body and len(body) <= _MAX_ANSWER else {}
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise ProtocolError("this is not a platform's login", hint="is the platform's address right?")
    if "error" in answer or status >= 400:
        code = clean(answer.get("error") or f"HTTP {status}", limit=100)
        raise OAuthError(code, clean(answer.get("error_description"), limit=300))
    if status >= 300:
        raise ProtocolError(f"the platform answered with a redirect (HTTP {status})")
    return answer


def _next_pause(error: OAuthError) -> float:
    """What to add to the interval, or the error when polling is over (RFC 8628 §3.5)."""
    if error.code == "authorization_pending":
        return 0.0
    if error.code == "slow_down":
        return _SLOWER
    if error.code == "access_denied":
        raise AuthenticationError("the login was denied in the browser") from None
    if error.code in ("expired_token", "invalid_grant"):
        raise AuthenticationError("the code is no longer valid", hint="run: pam-client login") from None
    raise error


def _tokens(answer: dict[str, Any]) -> Tokens:
    if str(answer.get("token_type", "")).lower() != "bearer":
        raise ProtocolError("the platform's login gave no bearer token")
    refresh = answer.get("refresh_token")
    return Tokens(
        access=_text(answer, "access_token"),
        expires=time.time() + _seconds(answer, "expires_in", 300.0),
        refresh=refresh if isinstance(refresh, str) else "",
    )


def _text(answer: dict[str, Any], key: str) -> str:
    value = answer.get(key)
    if not isinstance(value, str) or not value or not value.isprintable():
        raise ProtocolError(f"the platform's login gave no {key}")
    return value


def _seconds(answer: dict[str, Any], key: str, default: float) -> float:
    value = answer.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        return default
    return float(value)


def _origin(url: str) -> tuple[str, str | None, int | None]:
    try:
        parts = urlsplit(url)
        port = parts.port or {"https": 443, "http": 80}.get(parts.scheme)
    except ValueError:
        raise PamError(f"not an address: {url[:200]}") from None
    if parts.username is not None or parts.password is not None:
        return ("", None, None)  # https://platform@elsewhere: never an origin of ours
    return (parts.scheme, parts.hostname, port)
