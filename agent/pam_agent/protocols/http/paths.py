"""Paths in one form, and the patterns that rules match against it. No I/O.

A rule about ``/admin/**`` holds only if rule and app read a path alike. So where an account has rules, a path
is decoded once and put into its plain form, that form is matched **and** sent on, and what could still be
read differently (an encoded slash or backslash, a NUL, something encoded twice) is refused. A segment's
``;parameters`` mean something to some apps and nothing to others: a path is allowed only if it is with and
without them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote, unquote_to_bytes

from pam_agent.protocols.base import ClientProtocolError

#: Left as they are in a path: RFC 3986's pchar, and the slash.
_PLAIN: Final = "/!$&'()*+,;=:@-._~"
_ESCAPE: Final = re.compile(r"%(?![0-9A-Fa-f]{2})")
_TARGET: Final = re.compile(r"/[\x21-\x7e]*")


class AmbiguousPathError(ClientProtocolError):
    """A path that the app might read otherwise than the rules do."""


@dataclass(frozen=True)
class Path:
    """A path that rules can be asked about. ``sent`` is what the app gets."""

    plain: str  #: decoded, without dot segments and empty segments
    bare: str  #: the same without ``;parameters``
    sent: str  #: ``plain``, encoded again


def split(target: str) -> tuple[str, str]:
    """Path and query (with its ``?``, or empty). Raises ClientProtocolError for anything but origin-form."""
    if not _TARGET.fullmatch(target) or "#" in target:
        raise ClientProtocolError("the request's address is not a path of this app")
    path, mark, query = target.partition("?")
    return path, mark + query


def normalise(raw: str) -> Path:
    """The one form of an encoded path that begins with a slash. Raises AmbiguousPathError.

    Applied to its own ``sent`` it changes nothing.
    """
    if _ESCAPE.search(raw):
        raise AmbiguousPathError("the path has a broken percent-encoding")
    if re.search(r"%(?:2f|5c|00|25)", raw, re.IGNORECASE):
        raise AmbiguousPathError("the path has an encoded slash, backslash, NUL or percent sign")
    try:
        decoded = unquote_to_bytes(raw).decode("utf-8")
    except UnicodeDecodeError:
        raise AmbiguousPathError("the path is not UTF-8") from None
    if any(ord(char) < 0x20 or ord(char) == 0x7F for char in decoded):
        raise AmbiguousPathError("the path has a control character")
    plain = _without_dots(decoded.replace("\\", "/"))
    bare = re.sub(r";[^/]*", "", plain)
    if bare != _without_dots(bare):
        raise AmbiguousPathError("the path has parameters that hide a dot or an empty segment")
    return Path(plain, bare, quote(plain, safe=_PLAIN))


def _without_dots(path: str) -> str:
    """RFC 3986's remove_dot_segments, and no empty segments but a last one. Never leaves the root."""
    kept: list[str] = []
    segments = path.split("/")[1:]
    for segment in segments:
        if segment == "..":
            del kept[-1:]
        elif segment not in ("", "."):
            kept.append(segment)
    folder = bool(kept) and segments[-1] in ("", ".", "..")
    return "/" + "/".join(kept) + ("/" if folder else "")


class Pattern:
    """``/app/*/edit``, ``/admin/**``: ``*`` stays within a segment, ``**`` does not; ``/**`` at the end also
    matches without the slash. Case counts where a
    rule allows, not where it denies."""

    def __init__(self, text: str) -> None:
        """Raises ValueError for a pattern that could never match."""
        if not text.startswith("/") or not text.isprintable():
            raise ValueError(f"a path pattern begins with a slash: {text!r}")
        self.text = text
        stem = text.removesuffix("/**")
        parts = re.split(r"(\*\*|\*)", stem)
        regex = "".join({"**": ".*", "*": "[^/]*"}.get(part, re.escape(part)) for part in parts)
        if stem != text:
            regex += "(?:/.*)?"
        self._exact = re.compile(regex, re.DOTALL)
        self._folded = re.compile(regex, re.DOTALL | re.IGNORECASE)

    def allows(self, path: Path) -> bool:
        """For a rule that allows: every reading of the path matches, case counts."""
        return all(self._exact.fullmatch(text) for text in (path.plain, path.bare))

    def denies(self, path: Path) -> bool:
        """For a rule that denies: some reading of the path matches; to some apps case means nothing."""
        readings = (path.plain, path.bare)
        return any(self._folded.fullmatch(read(text)) for text in readings for read in _READINGS)


#: An app may take ``/admin`` and ``/admin/`` for the same.
_READINGS: Final[tuple[Callable[[str], str], ...]] = (
    str,
    lambda text: text + "/",
    lambda text: text.rstrip("/") or "/",
)
