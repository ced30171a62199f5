"""Who may ask: the preamble of a connection, and the check of every request on it. No I/O.

The client is a byte pipe. It says in one line before the program's bytes whether they are a browser's, and
under which origin it listens; everything else is checked here, for each request anew:

* ``browser``: the Host must be the origin's own (no DNS rebinding); a request that another page caused is
  refused; and the browser must have shown, once, the link that only the session's user was given.
* ``program``: what a browser would say of itself (Origin, Sec-Fetch) must not be there, so that no page can
  use that port.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import threading
from dataclasses import dataclass, field
from typing import Final, Literal

from pam_agent.protocols.base import ClientProtocolError
from pam_agent.protocols.http.wire import Request
from pam_common.keys import b64decode, b64encode

#: One line of JSON with four short values.
MAX_PREAMBLE: Final = 1024
#: Keys of one session: one per client process, and its user starts a few.
MAX_KEYS: Final = 16

#: What the names of our cookies begin with.
COOKIE: Final = b"__pam"
ENTER: Final = "/.pam/enter"
_TICKET: Final = re.compile(r"[?&]t=([A-Za-z0-9_-]{43})(?:&|$)")
_ORIGIN: Final = re.compile(r"http://((?:[a-z0-9-]+\.)*[a-z0-9-]+|127\.0\.0\.1):([0-9]{1,5})")


class AdmissionError(ClientProtocolError):
    """The request may not use this origin. ``rule`` names the check that failed."""

    def __init__(self, message: str, rule: str, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.rule = rule


@dataclass(frozen=True)
class Entry:
    """A page of ours instead of the app's: it sets ``cookie`` and leads on to ``url``; without a cookie, as
    another page led here, only if the user says so."""

    url: str
    cookie: str = ""


@dataclass(frozen=True)
class Preamble:
    """The client's first line."""

    mode: Literal["browser", "program"]
    origin: str
    key: bytes = field(default=b"", repr=False)

    @property
    def host(self) -> str:
        return self.origin.removeprefix("http://")

    @property
    def link(self) -> str:
        """The ``t`` of the one-time link."""
        return _mac(self.key, b"pam-web-link")

    @property
    def cookie(self) -> str:
        return _mac(self.key, b"pam-web-cookie")

    @property
    def cookie_name(self) -> bytes:
        """Browsers send a host's cookies to all of its ports, where further clients of the account may be."""
        return COOKIE + b"-" + self.origin.rpartition(":")[2].encode()


def parse_preamble(line: bytes) -> Preamble:
    """Parse the line without its newline. Raises ClientProtocolError."""
    try:
        said = json.loads(line)
        fits = isinstance(said, dict) and said.get("v") == 1
        mode, origin = (said["mode"], said["origin"]) if fits else (None, None)
        key = b64decode(said["key"]) if mode == "browser" else b""
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ClientProtocolError("the client did not say what it carries") from None
    if mode not in ("browser", "program") or not isinstance(origin, str) or not _ORIGIN.fullmatch(origin):
        raise ClientProtocolError("the client did not say what it carries")
    if mode == "browser" and len(key) != 32:
        raise ClientProtocolError("the client's key is not one")
    return Preamble(mode, origin, key)


class Door:
    """The checks of one session; shared by its connections, for a link works once."""

    def __init__(self) -> None:
        self._used: set[bytes] = set()  # keys whose link was shown
        self._lock = threading.Lock()

    def admit(self, preamble: Preamble, request: Request) -> Entry | None:
        """None: go on. Raises AdmissionError."""
        if preamble.mode == "program":
            _check_program(preamble, request)
            return None
        _check_browser(preamble, request)
        known = _has_cookie(preamble, request)
        if request.target.partition("?")[0] == ENTER:
            return self._enter(preamble, request, known)
        if _one(request, b"sec-fetch-site") in ("cross-site", "same-site"):
            # A link on another page, as an identity provider's. Our cookie comes along from a sibling alone.
            return Entry(preamble.origin + request.target)
        if not known:
            raise AdmissionError(
                "this browser does not belong to the session",
                "no link",
                "use the link that pam-client connect opens; a new connect makes a new one.",
            )
        return None

    def _enter(self, preamble: Preamble, request: Request, known: bool) -> Entry:
        found = _TICKET.search(request.target)
        said = found[1] if found else ""
        if request.method != "GET" or not _same(said, preamble.link):
            raise AdmissionError("this link is not one of this session", "wrong link")
        with self._lock:
            fresh = preamble.key not in self._used
            if fresh and len(self._used) < MAX_KEYS:
                self._used.add(preamble.key)
            elif not known:  # reloading it in the browser that it let in does no harm
                raise AdmissionError(
                    "this link was used already", "used link", "a new pam-client connect makes a new one."
                )
        name = preamble.cookie_name.decode()
        return Entry("/", f"{name}={preamble.cookie}; HttpOnly; SameSite=Strict; Path=/")


def is_ours(name: bytes) -> bool:
    """Whether a cookie of this name is between a browser and us: the app neither gets nor sets it."""
    return name == COOKIE or name.startswith(COOKIE + b"-")


def _check_program(preamble: Preamble, request: Request) -> None:
    port = preamble.origin.rpartition(":")[2]
    # Not "localhost", which a browser may have asked for that says nothing of itself.
    if _host(request) != f"127.0.0.1:{port}":
        raise AdmissionError("the request is for another host", "host")
    for name, _ in request.fields:
        if name.lower() == b"origin" or name.lower().startswith(b"sec-fetch-"):
            raise AdmissionError(
                "this port is for programs, not for browsers",
                "browser on the program's port",
                "pam-client connect without a command opens a browser.",
            )


def _check_browser(preamble: Preamble, request: Request) -> None:
    if _host(request) != preamble.host:
        raise AdmissionError("the request is for another host", "host")
    site, origins = _one(request, b"sec-fetch-site"), request.values(b"origin")
    if origins and not _own_origin(origins, preamble, site):
        raise AdmissionError("the request comes from another page", "origin")
    if request.upgrades and not origins:
        raise AdmissionError("a socket was asked for without saying from which page", "origin")
    # A sibling of this origin is "same-site", and no more to be trusted than any other page.
    if site not in ("", "same-origin", "none") and not _top_level(request):
        raise AdmissionError("the request comes from another page", "sec-fetch-site")


def _own_origin(origins: list[bytes], preamble: Preamble, site: str) -> bool:
    # A page with "Referrer-Policy: no-referrer" posts its forms as "null"; the browser vouches for it here.
    if origins == [b"null"]:
        return site == "same-origin"
    return origins == [preamble.origin.encode()]


def _top_level(request: Request) -> bool:
    """A link that was followed: shows a page, in a window of its own, and changes nothing."""
    return (
        request.method in ("GET", "HEAD")
        and not request.upgrades
        and _one(request, b"sec-fetch-mode") == "navigate"
        and _one(request, b"sec-fetch-dest") == "document"
    )


def _host(request: Request) -> str:
    return _one(request, b"host").lower()


def _one(request: Request, name: bytes) -> str:
    values = request.values(name)
    if len(values) > 1:
        raise AdmissionError(f"the request has {name.decode()} twice", name.decode())
    return values[0].decode("latin-1") if values else ""


def _has_cookie(preamble: Preamble, request: Request) -> bool:
    # Another page of the same site may have added one of this name: any right one counts.
    pairs = (pair.strip() for value in request.values(b"cookie") for pair in value.split(b";"))
    found = [pair.partition(b"=")[2] for pair in pairs if pair.partition(b"=")[0] == preamble.cookie_name]
    return any(_same(value.decode("latin-1"), preamble.cookie) for value in found)


def _mac(key: bytes, purpose: bytes) -> str:
    return b64encode(hmac.new(key, purpose, hashlib.sha256).digest())


def _same(left: str, right: str) -> bool:
    return hmac.compare_digest(left.encode(), right.encode())
