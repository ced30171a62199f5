"""The one way to call the platform's API: HTTPS, verified, bounded, with errors that say what to do."""

from __future__ import annotations

import ipaddress
import json
import threading
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter

from pam_common.errors import AuthenticationError, PamError, ProtocolError, RefusedError, UnavailableError
from pam_common.logging import get_logger, kv
from pam_common.stream import Data

log = get_logger("platform_client")

API = "/api/v1"

#: The largest answer of the API is a page of sessions or a relay bundle, far below it.
MAX_ANSWER = 8 << 20
CONNECT_TIMEOUT = 10.0
READ_TIMEOUT = 30.0
#: An answer that trickles in must end too, whatever the pauses between its bytes.
TOTAL_TIMEOUT = 120.0
#: Seconds by which a clock is not just a little off: somebody should look at it.
_NOTABLE_OFFSET = 30.0


class ConflictError(RefusedError):
    """The platform's 409: what was asked does not fit its state; ``body`` is its JSON answer."""

    def __init__(self, message: str, *, hint: str, body: dict[str, Any]) -> None:
        super().__init__(message, hint=hint)
        self.body = body


class PlatformClient:
    """Calls ``/api/v1/…``; ``authorization`` gives the header's value anew for each request.

    Safe for use from several threads. Plain HTTP is for loopback only, redirects are not followed, and
    proxies or credentials from the environment are not used.
    """

    def __init__(
        self,
        base_url: str,
        *,
        ca_file: Path | None = None,
        authorization: Callable[[], str] | None = None,
    ) -> None:
        self.base_url = check_base_url(base_url)
        self._authorization = authorization
        self._ca = str(ca_file) if ca_file else True
        self._offset = 0.0
        self._local = threading.local()

    def __enter__(self) -> PlatformClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Drop this thread's kept connections."""
        session: requests.Session | None = getattr(self._local, "session", None)
        if session is not None:
            session.close()
            del self._local.session

    def now(self) -> float:
        """The platform's clock as last seen in a ``Date`` header, in UNIX seconds."""
        return time.time() + self._offset

    def get(self, path: str, **options: Any) -> dict[str, Any]:
        return self.call("GET", path, **options)

    def post(self, path: str, json: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
        return self.call("POST", path, json={} if json is None else json, **options)

    def put(self, path: str, data: Data, **options: Any) -> dict[str, Any]:
        return self.call("PUT", path, data=bytes(data), **options)

    def delete(self, path: str, **options: Any) -> dict[str, Any]:
        return self.call("DELETE", path, **options)

    def call(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        """One API call; ``path`` starts with a slash. Returns the JSON object of the answer.

        Raises UnavailableError (no answer, or 5xx: try again), AuthenticationError (401), ConflictError
        (409), RefusedError (other 4xx) and ProtocolError (not an answer of this API).
        """
        response = self.stream(method, path, **options)
        with response:
            body = _bounded(response)
        return _json_object(body)

    def stream(self, method: str, path: str, **options: Any) -> requests.Response:
        """Like :meth:`call`, with the answer's body unread; the caller closes it."""
        url = self.base_url + API + path
        timeout = options.pop("timeout", READ_TIMEOUT)
        headers = {"Accept": "application/json", **options.pop("headers", {})}
        if self._authorization is not None:
            headers["Authorization"] = self._authorization()
        if "data" in options:
            headers.setdefault("Content-Type", "application/octet-stream")
        sent = time.time()
        try:
            response = self._session().request(
                method,
                url,
                headers=headers,
                timeout=(CONNECT_TIMEOUT, timeout),
                allow_redirects=False,
                stream=True,
                **options,
            )
        except requests.exceptions.SSLError as error:
            raise UnavailableError(
                f"the TLS certificate of {self.base_url} is not accepted: {reason_of(error)}",
                hint="is platform_ca set to the CA that signed it, and is the name right?",
            ) from None
        except (requests.RequestException, OSError) as error:
            raise UnavailableError(
                f"the platform at {self.base_url} does not answer: {reason_of(error)}"
            ) from None
        self._note_clock(response, sent)
        if response.status_code >= 300:
            with response:
                raise _error(response)
        return response

    def _session(self) -> requests.Session:
        session: requests.Session | None = getattr(self._local, "session", None)
        if session is None:
            session = requests.Session()
            session.trust_env = False  # no proxy, no ~/.netrc: neither may see our tokens
            session.verify = self._ca
            adapter = HTTPAdapter(pool_connections=1, pool_maxsize=2)
            session.mount("https://", adapter)
            session.mount("http://", adapter)
            self._local.session = session
        return session

    def _note_clock(self, response: requests.Response, sent: float) -> None:
        try:
            seen = parsedate_to_datetime(response.headers["Date"]).timestamp()
        except (KeyError, ValueError, TypeError):
            return
        # Written at some moment while we waited, and cut to whole seconds: what we went by stays if it can.
        # Else who stood still before reading an answer would take that for a difference.
        offset = min(max(self._offset, seen - time.time()), seen + 1 - sent)
        if abs(offset) > _NOTABLE_OFFSET and abs(self._offset) <= _NOTABLE_OFFSET:
            log.warning("clock differs from the platform's, going by that one", extra=kv(seconds=int(offset)))
        # Date has whole seconds: below two there is nothing to correct.
        self._offset = offset if abs(offset) > 2 else 0.0


def check_base_url(url: str) -> str:
    """``url`` without a trailing slash if it may be used: https, or http to loopback."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise PamError(f'not a platform address: "{url}"', hint="it looks like https://pam.example.com")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise PamError("a platform address holds no user, query or fragment")
    if parts.scheme == "http" and not _is_loopback(parts.hostname):
        raise PamError(f"{url} is not encrypted", hint="use https; http is for loopback only.")
    return url.rstrip("/")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bounded(response: requests.Response) -> bytes:
    deadline = time.monotonic() + TOTAL_TIMEOUT
    body = bytearray()
    try:
        for piece in response.iter_content(65536):
            body += piece
            if len(body) > MAX_ANSWER:
                raise ProtocolError(f"the platform's answer is larger than {MAX_ANSWER} bytes")
            if time.monotonic() > deadline:
                raise UnavailableError("the platform's answer took too long")
    except (requests.RequestException, OSError) as error:
        raise UnavailableError(f"the platform's answer was cut: {reason_of(error)}") from None
    return bytes(body)


def _json_object(body: bytes) -> dict[str, Any]:
    if not body:
        return {}
    try:
        answer = json.loads(body)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise ProtocolError(
            "the answer is not one of the platform's API", hint="is the platform's address right?"
        )
    return answer


def _error(response: requests.Response) -> PamError:
    status = response.status_code
    try:
        body = _json_object(_bounded(response))
    except PamError:
        body = {}
    detail, hint = _text(body.get("detail")), _text(body.get("hint"))
    if status >= 500 or status == 429:
        return UnavailableError(detail or f"the platform answered with HTTP {status}", hint=hint)
    if status < 400:
        return ProtocolError(
            f"the platform answered with a redirect (HTTP {status})",
            hint="give the platform's own address, as public_url has it.",
        )
    message = detail or f"the platform refused with HTTP {status}"
    if status == 401:
        return AuthenticationError(message, hint=hint)
    if status == 409:
        return ConflictError(message, hint=hint, body=body)
    return RefusedError(message, hint=hint)


def _text(value: object) -> str:
    if isinstance(value, list):  # validation errors come as a list
        return "; ".join(_text(item.get("msg") if isinstance(item, dict) else item) for item in value)[:1000]
    text = str(value or "")[:1000]
    return "".join(char if char.isprintable() else "?" for char in text)


def reason_of(error: BaseException) -> str:
    """The cause in a few words: requests and urllib3 wrap it several deep, and show it as Python would."""
    text = str(getattr(error, "reason", None) or error)
    for cause, words in _CAUSES.items():
        if cause in text:
            return words
    return text.rsplit(": ", 1)[-1].strip("')\"> ")[:200]


#: What urllib3's messages contain, and how a person would say it.
_CAUSES = {
    "Connection refused": "connection refused",
    "timed out": "timed out",
    "Name or service not known": "name or service not known",
    "Temporary failure in name resolution": "the name cannot be resolved now",
    "No route to host": "no route to host",
    "Network is unreachable": "the network is unreachable",
    "Connection reset": "it reset the connection",
    "RemoteDisconnected": "it closed the connection without an answer",
    "BadStatusLine": "it does not speak HTTP",
}
