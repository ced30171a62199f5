"""Tell a PostgreSQL program why its connection cannot be carried, in its own protocol.

    program                         here
      SSLRequest / GSSENCRequest ──▶
                                 ◀── 'N'          (at most both, once each)
      StartupMessage             ──▶
                                 ◀── ErrorResponse FATAL 08004, then close

https://www.postgresql.org/docs/current/protocol-message-formats.html. A CancelRequest gets no answer, as
from a server. Anything else is closed without a word: it is no PostgreSQL program. Bytes in, bytes out;
the reading and writing is the caller's.
"""

from __future__ import annotations

import struct

#: MAX_STARTUP_PACKET_LENGTH of PostgreSQL: no server reads a longer one.
MAX_STARTUP = 10000
HEAD = 8
_SSL, _GSSENC, _CANCEL = 80877103, 80877104, 80877102
_PROTOCOL_3 = 3
#: SQLSTATE 08004: "server rejected the connection".
_SQLSTATE = b"08004"


class PostgresRefusal:
    """One refusal in progress: ``feed`` what the program sends, send back what it returns."""

    def __init__(self, message: str, hint: str = "") -> None:
        self._error = error_response(message, hint)
        self._buffer = b""
        self._declined = 0
        #: Nothing more is to be said; close.
        self.done = False

    def feed(self, data: bytes) -> bytes:
        """Take the program's next bytes and return the answer so far, possibly empty."""
        if self.done:
            return b""
        answer = b""
        # Grows to one startup packet and the read that completes it.
        self._buffer += data
        while not self.done and len(self._buffer) >= HEAD:
            head = parse_head(self._buffer[:HEAD])
            if head is None:
                self.done = True
            elif head.declinable and self._declined < 2:
                self._declined += 1
                self._buffer = self._buffer[HEAD:]
                answer += b"N"
            elif len(self._buffer) < head.length:
                break
            else:
                answer += b"" if head.declinable or head.is_cancel else self._error
                self.done = True
        return answer


class Head:
    """The first 8 bytes of a request: its length and what it asks for."""

    def __init__(self, length: int, code: int) -> None:
        self.length = length
        self.declinable = code in (_SSL, _GSSENC)
        self.is_cancel = code == _CANCEL
        self.is_startup = code >> 16 == _PROTOCOL_3

    def is_sound(self) -> bool:
        if self.declinable:
            return self.length == HEAD
        if self.is_cancel:
            return 16 <= self.length <= 300  # the key has at most 256 bytes from protocol 3.2 on
        return self.is_startup and HEAD < self.length <= MAX_STARTUP


def parse_head(head: bytes) -> Head | None:
    """What begins a PostgreSQL connection, or None when these 8 bytes do not."""
    if len(head) != HEAD:
        return None
    parsed = Head(*struct.unpack("!II", head))
    return parsed if parsed.is_sound() else None


def starts_postgres(head: bytes) -> bool:
    """Whether these 8 bytes can begin a PostgreSQL connection; those of an HTTP request cannot."""
    return parse_head(head) is not None


def error_response(message: str, hint: str = "") -> bytes:
    """ErrorResponse (byte ``E``) with severity FATAL."""
    fields = [(b"S", b"FATAL"), (b"V", b"FATAL"), (b"C", _SQLSTATE), (b"M", _text(message))]
    if hint:
        fields.append((b"H", _text(hint)))
    body = b"".join(kind + value + b"\0" for kind, value in fields) + b"\0"
    return b"E" + struct.pack("!I", len(body) + 4) + body


def _text(value: str) -> bytes:
    # psql prints it as it is: no control character may pass.
    return "".join(char if char.isprintable() else "?" for char in value[:1000]).encode("utf-8", "replace")
