"""Cookies: those that stay in the agent, and what becomes of those that go to the browser. No I/O.

RFC 6265 for one host, which is all that an app has here. The jar belongs to the session: every connection of
the user speaks to the app as the same login.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import mktime_tz, parsedate_tz
from typing import Final

from pam_agent.protocols.http.door import is_ours

#: As many as browsers keep for a site, and as large.
MAX_COOKIES: Final = 180
MAX_COOKIE: Final = 4096

_NAME: Final = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")


@dataclass(frozen=True)
class Cookie:
    """One cookie as the app set it. ``expires`` is UNIX seconds, None for the session's end."""

    name: str
    value: str
    path: str
    expires: float | None = None
    secure: bool = False
    attributes: tuple[tuple[str, str], ...] = ()


def parse(header: str, request_path: str, host: str, now: float) -> Cookie | None:
    """A Set-Cookie of ``host``; None for one that a browser would not take either."""
    first, *rest = header.split(";")
    name, separator, value = (part.strip() for part in first.partition("="))
    if not separator or not _NAME.fullmatch(name) or len(name) + len(value) > MAX_COOKIE:
        return None
    attributes = tuple(
        (key.strip().lower(), text.strip()) for key, _, text in (a.partition("=") for a in rest)
    )
    known = dict(attributes)
    domain = known.get("domain", "").lower().lstrip(".")
    if domain and domain != host and not host.endswith("." + domain):
        return None
    path = known.get("path", "")
    if not path.startswith("/"):
        path = request_path.partition("?")[0].rpartition("/")[0] or "/"
    return Cookie(name, value, path, _expiry(known, now), "secure" in known, attributes)


def _expiry(known: dict[str, str], now: float) -> float | None:
    age = known.get("max-age", "")
    if re.fullmatch(r"-?[0-9]{1,10}", age):
        return now + int(age)
    try:
        date = parsedate_tz(known.get("expires", ""))
        return None if date is None else float(mktime_tz(date))
    except (ValueError, OverflowError):  # the 31st of February
        return None


def for_browser(cookie: Cookie) -> str | None:
    """The Set-Cookie that the browser gets; None if it must not have it.

    Domain goes: the cookie is for the local origin alone. So does Secure, that origin being http, but for
    the names that demand it: a browser takes those for localhost. SameSite=None needs Secure, so it becomes
    Lax, which is the same here: the door lets no other site in.
    """
    if is_ours(cookie.name.encode()):
        return None
    prefixed = cookie.name.lower().startswith(("__host-", "__secure-"))
    dropped = ("domain", "partitioned") if prefixed else ("domain", "partitioned", "secure")
    kept = [f"{cookie.name}={cookie.value}"]
    for name, value in cookie.attributes:
        if name == "samesite" and value.lower() == "none" and not prefixed:
            value = "Lax"
        if name and name not in dropped:
            kept.append(f"{name}={value}" if value else name)
    return "; ".join(kept)


class Jar:
    """The cookies that stay in the agent. Safe for use by several connections.

    ``hide`` says which the app's answers may put here besides those of a login: all, none, or those named.
    """

    def __init__(
        self,
        host: str,
        *,
        secure: bool,
        hide: bool | frozenset[str] = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._host = host
        self._secure = secure
        self._hide = hide
        self._clock = clock
        self._lock = threading.Lock()
        self._cookies: dict[tuple[str, str], Cookie] = {}
        self._names: set[str] = set()  # of the login's cookies: the browser never gets one of these

    def begin_login(self) -> None:
        """A login starts from nothing."""
        with self._lock:
            self._cookies.clear()

    def take(self, header: str, request_path: str, *, login: bool = False) -> str | None:
        """One Set-Cookie of the app: kept here, or the one that the browser gets instead, or None."""
        cookie = parse(header, request_path, self._host, self._clock())
        if cookie is None:
            return None
        with self._lock:
            if not login and not self._hides(cookie.name):
                return for_browser(cookie)
            self._keep(cookie, login)
            return None

    def _hides(self, name: str) -> bool:
        if isinstance(self._hide, bool):
            return self._hide or name in self._names
        return name in self._hide or name in self._names

    def _keep(self, cookie: Cookie, login: bool) -> None:
        self._drop_expired()
        where = (cookie.name, cookie.path)
        if cookie.expires is not None and cookie.expires <= self._clock():
            self._cookies.pop(where, None)
        elif where in self._cookies or len(self._cookies) < MAX_COOKIES:
            self._cookies[where] = cookie
            if login and len(self._names) < MAX_COOKIES:
                self._names.add(cookie.name)

    def _drop_expired(self) -> None:
        now = self._clock()
        for where in [key for key, one in self._cookies.items() if (one.expires or now + 1) <= now]:
            del self._cookies[where]

    def header(self, path: str, users: list[bytes]) -> bytes | None:
        """The Cookie header of a request for ``path``: what is kept here, then what the browser sent of
        names that are not."""
        path = path.partition("?")[0]
        with self._lock:
            self._drop_expired()
            fitting = [c for c in self._cookies.values() if _path_matches(path, c.path)]
            own = [c for c in fitting if self._secure or not c.secure]
            held = {c.name for c in own} | self._names
            hide = self._hide
        if isinstance(hide, frozenset):
            held |= hide
        own.sort(key=lambda cookie: -len(cookie.path))
        pairs = [f"{cookie.name}={cookie.value}".encode("latin-1", "replace") for cookie in own]
        for pair in (pair.strip() for value in users for pair in value.split(b";")):
            name = pair.partition(b"=")[0].strip()
            if pair and not is_ours(name) and name.decode("latin-1") not in held:
                pairs.append(pair)
        return b"; ".join(pairs) or None

    def names(self) -> set[str]:
        """Of what is kept now."""
        with self._lock:
            return {cookie.name for cookie in self._cookies.values()}

    def values(self) -> list[str]:
        """What a recording must not hold."""
        with self._lock:
            return [cookie.value for cookie in self._cookies.values()]

    def __repr__(self) -> str:
        return f"<Jar of {len(self._cookies)}>"


def _path_matches(path: str, prefix: str) -> bool:
    return path == prefix or (path.startswith(prefix) and (prefix.endswith("/") or path[len(prefix)] == "/"))
