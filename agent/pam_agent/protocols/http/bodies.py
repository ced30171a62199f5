"""Bodies on their way into the recording: text up to a budget, the rest counted and hashed. No I/O.

A body that is there whole stands in its request's or response's event. One that comes in pieces has ``body``
events of its own: each piece that is within the budget before it goes on, and one at the end.
"""

from __future__ import annotations

import codecs
import hashlib
import zlib
from collections.abc import Callable
from typing import Any, Final, Literal

from pam_agent.protocols.base import Event
from pam_agent.protocols.http.redact import Redactor
from pam_agent.protocols.http.wire import PIECE, Head

Direction = Literal["up", "down"]

#: A long transfer is counted on its way, so that not all is lost with the agent.
PROGRESS: Final = 64 << 20

_CHARSETS: Final = {"utf-8", "ascii", "iso8859-1", "cp1252"}
_FORM: Final = "application/x-www-form-urlencoded"
_TEXTUAL: Final = frozenset(
    {
        "application/json",
        "application/javascript",
        "application/xml",
        "application/graphql",
        "application/x-ndjson",
        "application/yaml",
        "application/sql",
        "image/svg+xml",
        _FORM,
    }
)


def media_type(head: Head) -> tuple[str, str]:
    """(type, charset), lower case; the charset is one that can be decoded for sure."""
    text = (head.value(b"content-type") or b"").decode("latin-1").lower()
    kind, *parameters = (part.strip() for part in text.split(";"))
    named = dict(parameter.partition("=")[::2] for parameter in parameters).get("charset", "utf-8")
    try:
        charset = codecs.lookup(named.strip("\"' ")).name
    except (LookupError, ValueError):
        charset = "utf-8"
    return kind, charset if charset in _CHARSETS else "iso8859-1"


def is_textual(kind: str) -> bool:
    return kind.startswith("text/") or kind in _TEXTUAL or kind.endswith(("+json", "+xml"))


class Body:
    """One body, watched on its way. ``take`` every piece before it goes on, then ``end`` once."""

    def __init__(self, head: Head, exchange: int, way: Direction, budget: int, redactor: Redactor) -> None:
        self.bytes = 0
        self._exchange = exchange
        self._way = way
        self._redactor = redactor
        self._hash = hashlib.sha256()
        kind, charset = media_type(head)
        coding = head.words(b"content-encoding") - {b"identity"}
        textual = is_textual(kind) and coding <= {b"gzip", b"x-gzip"}
        self._form = kind == _FORM
        self._left = budget if textual else 0
        self._text = codecs.getincrementaldecoder(charset)("replace")
        # zlib's own header check (RFC 1952); what it yields is bounded in every call.
        self._unzip = zlib.decompressobj(31) if coding else None
        self._reported = 0

    def whole(self, data: bytes) -> dict[str, Any]:
        """The fields of an event for a body that is there at once."""
        self._count(data)
        fields: dict[str, Any] = {"body_bytes": self.bytes}
        text = self._read(data, last=True)
        if text:
            fields["body"] = self._redactor.form(text) if self._form else self._redactor.text(text)
        if data and not self._left:  # some of it is not there, or all
            fields["body_sha256"] = self._hash.hexdigest()
        return fields

    def take(self, data: bytes) -> list[Event]:
        """The events of one piece of a body that comes in several."""
        self._count(data)
        # A form's field may lie on both sides of a cut, its name here and its secret there.
        text = "" if self._form else self._read(data, last=False)
        if not text and self.bytes - self._reported < PROGRESS:
            return []
        self._reported = self.bytes
        event = self._event()
        if text:
            event["data"] = self._redactor.text(text)
        return [event]

    def end(self, **more: Any) -> Event:
        """The last event. ``more`` says what else is to be said, such as that the body was cut off."""
        return {**self._event(), "done": True, "sha256": self._hash.hexdigest(), **more}

    def _event(self) -> Event:
        return {"kind": "body", "id": self._exchange, "dir": self._way, "bytes": self.bytes}

    def _count(self, data: bytes) -> None:
        self.bytes += len(data)
        self._hash.update(data)

    def _read(self, data: bytes, *, last: bool) -> str:
        """The text of a piece, as far as the budget goes. An event has room for it: PIECE characters are six
        times as long when all of them are escaped, and an event may have 1 MiB."""
        if not self._left:
            return ""
        if self._unzip is not None:
            try:
                data = self._unzip.decompress(data, min(self._left, PIECE))
            except zlib.error:
                self._left = 0
                return ""
            if self._unzip.unconsumed_tail or self._unzip.eof:
                # More than a piece may hold, or its end: zlib would keep whatever else it is given.
                self._left = len(data)
        data = data[: min(self._left, PIECE)]
        self._left -= len(data)
        return self._text.decode(data, last)


#: What makes a Body for one message of an exchange.
BodyMaker = Callable[[Head, int, Direction], Body]
