"""Header fields between the local origin and the app's own. No I/O.

The browser believes to be at ``http://viewer.grafana.localhost:41234``, the app at its own name. What either
says of itself is put into the other's words; what is about one connection only, or would give the user
another identity, is dropped; anything else passes.

Links in the app's pages pass as they are, but for those that ``links`` puts right.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from pam_agent.protocols.http.cookies import Jar
from pam_agent.protocols.http.rules import OVERRIDES
from pam_agent.protocols.http.wire import Fields, Request, Response

#: About one connection (RFC 9110, 7.6.1), or for a proxy. ``Upgrade`` is added again where it is granted.
HOP_BY_HOP: Final = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-connection",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-authentication-info",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "http2-settings",
    }
)
#: By which a proxy tells an app who and where its user is. Nobody but the agent stands before the app.
_FORWARDED: Final = frozenset(
    {"forwarded", "x-real-ip", "x-client-ip", "true-client-ip", "x-cluster-client-ip"}
)
#: Of an answer: they speak of the app's own name (and would bind the browser to TLS there, or send it past
#: us), or would delete the cookie by which the browser is known.
_NOT_FOR_THE_BROWSER: Final = frozenset(
    {"strict-transport-security", "public-key-pins", "alt-svc", "clear-site-data"}
)
_POLICY: Final = frozenset({"content-security-policy", "content-security-policy-report-only"})
#: They would turn the local origin's http into https.
_UPGRADING: Final = re.compile(
    r"\s*(upgrade-insecure-requests|block-all-mixed-content)\b[^;]*", re.IGNORECASE
)


@dataclass(frozen=True)
class Origins:
    """Both names of the app. ``local`` is the preamble's origin, ``own`` what the app calls itself."""

    local: str
    own: str

    @property
    def own_host(self) -> str:
        return self.own.partition("//")[2]

    def to_own(self, url: str) -> str | None:
        """A Referer of the local origin in the app's words; None for any other."""
        rest = url.removeprefix(self.local)
        return self.own + rest if rest != url and rest[:1] in ("", "/", "?", "#") else None

    def to_local(self, url: str) -> str:
        """A URL of the app's own name, of either scheme, in the browser's words; others as they are."""
        found = re.match(r"(?:https?:)?//([^/?#\\]*)", url, re.IGNORECASE)
        if found and found[1].lower() in self.own_hosts():
            return self.local + url[found.end() :]
        return url

    def sources_to_local(self, policy: str) -> str:
        """The sources of a Content-Security-Policy: the app's own name also stands for the local origin."""
        kept = [part for part in policy.split(";") if not _UPGRADING.fullmatch(part)]
        hosts = "|".join(re.escape(host) for host in self.own_hosts())
        local = self.local.removeprefix("http://")

        def replace(found: re.Match[str]) -> str:
            socket = (found[1] or "").lower().startswith("ws")
            return f"{'ws' if socket else 'http'}://{local}"

        pattern = re.compile(rf"(?<![^\s])(?:(https?|wss?)://)?(?:{hosts})(?=[\s/]|$)", re.IGNORECASE)
        return ";".join(pattern.sub(replace, part) for part in kept)

    def own_hosts(self) -> set[str]:
        """The app's host, as it may be written: the usual port is mostly left out."""
        host = self.own_host
        default = ":443" if self.own.startswith("https:") else ":80"
        return {host, host.removesuffix(default)}


def _variable(name: bytes) -> bytes:
    """An app behind CGI or WSGI reads X-Remote-User and X_Remote.User as the same variable."""
    return re.sub(rb"[^0-9A-Za-z]", b"-", name).upper()


#: Of a request, however they are written: what we say ourselves, and what is about a connection or a proxy.
_NOT_FOR_THE_APP: Final = {
    _variable(name.encode()) for name in HOP_BY_HOP | _FORWARDED | {"host", "cookie", "content-length"}
}


class RequestRewriter:
    """What the app gets of a user's request."""

    def __init__(
        self,
        own: str,
        identity: tuple[tuple[str, str], ...],
        injected: tuple[tuple[str, str], ...],
        *,
        identified: bool,
        restricted: bool,
    ) -> None:
        """``own``: the app's origin; ``injected``: the credential's fields; ``identified``: the agent says
        who the user is, in whatever way, so they are not to say so; ``restricted``: by rules."""
        self._own = own
        self._set = [
            (name.encode(), value.encode("latin-1", "replace")) for name, value in (*identity, *injected)
        ]
        self._stripped = _NOT_FOR_THE_APP | {_variable(name) for name, _ in self._set}
        if identified:
            self._stripped.add(_variable(b"Authorization"))
        if restricted:
            self._stripped |= {_variable(name.encode()) for name in OVERRIDES}

    def fields(self, request: Request, preamble_origin: str, target: str, jar: Jar, *, page: bool) -> Fields:
        """The fields of the request for ``target``, but for those of its framing. ``page``: the answer may
        be a page whose links are to be put right, so it must come uncompressed."""
        origins = Origins(preamble_origin, self._own)
        dropped = {word.decode("latin-1") for word in request.words(b"connection")}
        kept: Fields = [(b"Host", origins.own_host.encode())]
        for raw, value in request.fields:
            name = raw.lower().decode("ascii")
            if name in dropped or self._foreign(raw, name):
                continue
            changed = _request_value(name, value, origins, page=page)
            if changed is not None:
                kept.append((raw, changed))
        cookie = jar.header(target, request.values(b"cookie"))
        if cookie is not None:
            kept.append((b"Cookie", cookie))
        return kept + self._set

    def _foreign(self, raw: bytes, name: str) -> bool:
        variable = _variable(raw)
        return (
            variable in self._stripped
            or variable.startswith(b"X-FORWARDED-")
            or name.startswith("sec-websocket-extensions")
        )


def _request_value(name: str, value: bytes, origins: Origins, *, page: bool) -> bytes | None:
    if name == "origin":
        return origins.own.encode()
    if name == "referer":
        changed = origins.to_own(value.decode("latin-1"))
        return None if changed is None else changed.encode("latin-1")
    if name == "accept-encoding":
        # What is recorded must be readable: gzip can be undone with bounded memory, the others cannot here.
        return b"gzip" if _accepts_gzip(value) and not page else b"identity"
    return value


def _accepts_gzip(value: bytes) -> bool:
    for entry in value.lower().split(b","):
        coding, _, weight = entry.replace(b" ", b"").partition(b";q=")
        if coding == b"gzip":
            return weight.strip(b"0.") != b"" or not weight
    return False


def response_fields(response: Response, target: str, origins: Origins, jar: Jar, *, injected: bool) -> Fields:
    """What the browser gets of the app's header fields, but for those of the framing. Fills the jar.
    ``injected``: the agent answers for the login, so the browser is not to be asked for one."""
    dropped = HOP_BY_HOP | _NOT_FOR_THE_BROWSER | {w.decode("latin-1") for w in response.words(b"connection")}
    kept: Fields = []
    for raw, value in response.fields:
        name = raw.lower().decode("ascii")
        if name in dropped or (injected and name == "www-authenticate"):
            continue
        text = value.decode("latin-1")
        changed = jar.take(text, target) if name == "set-cookie" else _response_text(name, text, origins)
        if changed is not None:
            kept.append((raw, changed.encode("latin-1")))
    return kept


def _response_text(name: str, text: str, origins: Origins) -> str | None:
    if name in ("location", "content-location", "access-control-allow-origin", "timing-allow-origin"):
        return origins.to_local(text)
    if name in ("refresh", "link"):
        # "5; url=https://app/x" and "<https://app/x>; rel=preload"
        return re.sub(r"(?:https?:)?//[^\s\"'<>;,]+", lambda found: origins.to_local(found[0]), text)
    if name in _POLICY:
        return origins.sources_to_local(text) or None
    return text
