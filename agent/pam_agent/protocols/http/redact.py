"""What a recording must not hold, taken out of heads, addresses and texts. No I/O.

Known values (the account's secrets, the cookies that stay in the agent) are found wherever they stand. Others
are recognised by the name that stands with them: generously, since a word too many that is missing does no
harm. A password in free text is recorded as any other data.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Callable, Iterable
from typing import Final
from urllib.parse import quote, quote_plus

from pam_agent.protocols.http.wire import Fields

REDACTED: Final = "[redacted]"
#: A shorter value would be found everywhere; nobody's secret is that short but by choice.
SHORTEST: Final = 6

_SECRET_NAME: Final = re.compile(
    r"pass|pwd|secret|token|api[-_]?key|credential|private[-_]?key|\botp|csrf|xsrf|signature|session[-_]?id"
    r"|\bcode\b|auth(?!or)",
    re.IGNORECASE,
)
_ALWAYS: Final = frozenset({"authorization", "proxy-authorization"})
_ADDRESSES: Final = frozenset({"location", "content-location", "referer", "refresh", "link"})
_PARAMETER: Final = re.compile(r"([?&;#]|^)([^=&;#?\s]{1,200})=([^&;#\s\"'<>]*)")
#: ``"password": "…"`` in JSON, a string cut off by the end of the piece included.
_MEMBER: Final = re.compile(r'("([^"\\\n]{1,100})"\s*:\s*")((?:[^"\\]|\\.)*)')


def is_secret_name(name: str) -> bool:
    return _SECRET_NAME.search(name) is not None


class Redactor:
    """For one session. ``values`` gives the secrets of the moment; ``headers`` (lower case) are secret."""

    def __init__(
        self, secrets: Iterable[str], headers: Iterable[str], values: Callable[[], list[str]]
    ) -> None:
        self._secrets = tuple(secrets)
        self._headers = _ALWAYS | frozenset(headers)
        self._values = values
        #: The values that were looked for last, and what finds them.
        self._found: tuple[tuple[str, ...], re.Pattern[str] | None] = ((), None)

    def fields(self, fields: Fields) -> list[list[str]]:
        """Header fields as an event holds them."""
        return [[name.decode("ascii"), self._value(name.decode("ascii"), value)] for name, value in fields]

    def _value(self, name: str, value: bytes) -> str:
        text, lower = value.decode("latin-1"), name.lower()
        if lower == "cookie":
            return "; ".join(f"{pair.partition('=')[0].strip()}={REDACTED}" for pair in text.split(";"))
        if lower == "set-cookie":
            pair, separator, attributes = text.partition(";")
            return f"{pair.partition('=')[0].strip()}={REDACTED}{separator}{attributes}"
        if lower in self._headers or is_secret_name(lower):
            return REDACTED
        return self.address(text) if lower in _ADDRESSES else self.known(text)

    def address(self, url: str) -> str:
        """A URL, or text with one: its parameters with secret names lose their values."""
        return self.known(_PARAMETER.sub(_parameter, url))

    def form(self, text: str) -> str:
        """An ``application/x-www-form-urlencoded`` body, whole."""
        return self.known(_PARAMETER.sub(_parameter, text))

    def text(self, text: str) -> str:
        """Any other text."""
        return self.known(_MEMBER.sub(_member, text))

    def known(self, text: str) -> str:
        """Without the values that are known to be secret, however they are commonly written."""
        values = (*self._secrets, *self._values())
        if values != self._found[0]:
            self._found = (values, _any_of(values))
        pattern = self._found[1]
        return text if pattern is None else pattern.sub(REDACTED, text)

    def binary(self, data: bytes) -> bytes:
        """The same of bytes that are no text: a secret in them is written as UTF-8."""
        return self.known(data.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")


def _any_of(values: Iterable[str]) -> re.Pattern[str] | None:
    long = [value for value in values if len(value) >= SHORTEST]
    forms = {form for value in long for form in _written(value)}
    # The longest first, lest a secret that begins another leaves the rest of it.
    return re.compile("|".join(map(re.escape, sorted(forms, key=len, reverse=True)))) if forms else None


def _written(value: str) -> Iterable[str]:
    """A secret as it is, in an address, in a page and in JSON."""
    yield from (value, quote(value, safe=""), quote_plus(value))
    yield from (html.escape(value), html.escape(value, quote=False))
    for ascii_only in (True, False):
        yield json.dumps(value, ensure_ascii=ascii_only)[1:-1]


def basic(user: str, password: str) -> str:
    """What HTTP's basic authentication sends (RFC 7617)."""
    return base64.b64encode(f"{user}:{password}".encode()).decode()


def _parameter(found: re.Match[str]) -> str:
    return f"{found[1]}{found[2]}={REDACTED if is_secret_name(found[2]) else found[3]}"


def _member(found: re.Match[str]) -> str:
    return f"{found[1]}{REDACTED if is_secret_name(found[2]) else found[3]}"
