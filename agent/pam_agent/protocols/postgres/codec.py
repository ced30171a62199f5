"""PostgreSQL messages as bytes: kinds, size limits, builders and parsers. No sockets, threads or clocks.

Source: https://www.postgresql.org/docs/current/protocol-message-formats.html
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from pam_agent.protocols.base import ClientProtocolError, TargetProtocolError

#: Kind byte and length of a message; the length counts itself but not the kind.
HEADER: Final = struct.Struct("!BI")
HEADER_SIZE: Final = HEADER.size
INT16: Final = struct.Struct("!h")
UINT16: Final = struct.Struct("!H")
INT32: Final = struct.Struct("!i")
UINT32: Final = struct.Struct("!I")

#: PQ_LARGE_MESSAGE_LIMIT of the server (MaxAllocSize - 1): no real message is longer.
LARGE: Final = 0x3FFFFFFE
#: PQ_SMALL_MESSAGE_LIMIT of the server.
SMALL: Final = 10_000
#: MAX_STARTUP_PACKET_LENGTH of the server.
STARTUP_LIMIT: Final = 10_000


class Limit(NamedTuple):
    """How long a kind may be (its length field), and how much of its body is looked at."""

    least: int
    most: int
    capture: int = 0


# Statement texts: a statement longer than 1 MiB is data (a bulk INSERT), of which the start, the length
# and the digest say enough. Binds: 16 KiB hold any set of values a person would read.
_TEXT: Final = 1 << 20
_BIND: Final = 1 << 14

#: What a client may send once it is logged in.
CLIENT_KINDS: Final[Mapping[int, Limit]] = {
    ord("Q"): Limit(5, LARGE, _TEXT),
    ord("P"): Limit(8, LARGE, _TEXT),
    ord("B"): Limit(12, LARGE, _BIND),
    ord("E"): Limit(9, SMALL, SMALL),
    ord("D"): Limit(6, SMALL, SMALL),
    ord("C"): Limit(6, SMALL, SMALL),
    ord("S"): Limit(4, 4),
    ord("H"): Limit(4, 4),
    ord("F"): Limit(14, LARGE, _BIND),
    ord("X"): Limit(4, 4),
    ord("d"): Limit(4, LARGE),
    ord("c"): Limit(4, 4),
    ord("f"): Limit(5, SMALL, SMALL),
}

#: What a target may send once the client is logged in. 'R', 'K' and 'v' belong to the login only: a
#: second key would reach the client unmapped, a second authentication nobody asked for.
TARGET_KINDS: Final[Mapping[int, Limit]] = {
    ord("D"): Limit(6, LARGE),
    ord("d"): Limit(4, LARGE),
    ord("T"): Limit(6, LARGE, 1 << 18),  # 1600 columns of 63-byte names are 130 KiB
    ord("t"): Limit(6, LARGE, 1 << 18),
    ord("C"): Limit(5, SMALL, SMALL),
    ord("E"): Limit(5, LARGE, 1 << 16),
    ord("N"): Limit(5, LARGE),
    ord("A"): Limit(10, LARGE, SMALL),  # payloads are below 8000 bytes
    ord("S"): Limit(6, LARGE, SMALL),
    ord("V"): Limit(8, LARGE),
    ord("Z"): Limit(5, 5, 1),
    ord("G"): Limit(7, SMALL, SMALL),
    ord("H"): Limit(7, SMALL, SMALL),
    ord("W"): Limit(7, SMALL, SMALL),
    ord("1"): Limit(4, 4),
    ord("2"): Limit(4, 4),
    ord("3"): Limit(4, 4),
    ord("n"): Limit(4, 4),
    ord("s"): Limit(4, 4),
    ord("I"): Limit(4, 4),
    ord("c"): Limit(4, 4),
}

SSL_REQUEST: Final = 80877103
GSSENC_REQUEST: Final = 80877104
CANCEL_REQUEST: Final = 80877102
VERSION_3_0: Final = 3 << 16
VERSION_3_2: Final = 3 << 16 | 2


class Reader:
    """Takes fields off a message body. Running out raises ``error``, with ``what`` in its text."""

    def __init__(self, body: bytes, what: str, error: type[Exception]) -> None:
        self.body = body
        self.at = 0
        self._what = what
        self._error = error

    def take(self, size: int) -> bytes:
        if size < 0 or self.at + size > len(self.body):
            raise self._error(f"{self._what} message ends too early")
        self.at += size
        return self.body[self.at - size : self.at]

    def int16(self) -> int:
        return int.from_bytes(self.take(2), "big", signed=True)

    def uint16(self) -> int:
        at = self.at
        self.at = at + 2
        try:
            return self.body[at] << 8 | self.body[at + 1]
        except IndexError:
            raise self._error(f"{self._what} message ends too early") from None

    def int32(self) -> int:
        at = self.at
        self.at = at + 4
        try:
            number: int = INT32.unpack_from(self.body, at)[0]
        except struct.error:
            raise self._error(f"{self._what} message ends too early") from None
        return number

    def uint32(self) -> int:
        return int.from_bytes(self.take(4), "big")

    def string(self) -> bytes:
        """The bytes up to the next NUL, which is consumed."""
        end = self.body.find(b"\0", self.at)
        if end < 0:
            raise self._error(f"{self._what} message has a string without an end")
        value = self.body[self.at : end]
        self.at = end + 1
        return value

    @property
    def left(self) -> int:
        return len(self.body) - self.at


@dataclass(frozen=True)
class Startup:
    """A StartupMessage: the version asked for and its parameters, in order and without repetition."""

    version: int
    parameters: Mapping[str, str]


@dataclass(frozen=True)
class CancelRequest:
    """Which query to cancel: process id and secret as BackendKeyData gave them."""

    pid: int
    secret: bytes


def parse_startup(packet: bytes) -> Startup | CancelRequest | int:
    """Read a first packet without its length. An ``int`` is SSL_REQUEST or GSSENC_REQUEST.

    Raises ClientProtocolError.
    """
    reader = Reader(packet, "start-up", ClientProtocolError)
    version = reader.uint32()
    if version in (SSL_REQUEST, GSSENC_REQUEST):
        if reader.left:
            raise ClientProtocolError("encryption request has a wrong length")
        return version
    if version == CANCEL_REQUEST:
        pid = reader.uint32()
        # 4 bytes in protocol 3.0, up to 256 from 3.2 on.
        if not 4 <= reader.left <= 256:
            raise ClientProtocolError("cancel request has a wrong length")
        return CancelRequest(pid, reader.take(reader.left))
    if version >> 16 != 3:
        raise ClientProtocolError(
            f"unsupported frontend protocol {version >> 16}.{version & 0xFFFF}",
            hint="use a client that speaks protocol 3, without direct TLS (sslnegotiation=postgres)",
        )
    return Startup(version, _parameters(reader))


def _parameters(reader: Reader) -> dict[str, str]:
    parameters: dict[str, str] = {}
    while True:
        try:
            name = reader.string().decode()
            if not name:
                break
            value = reader.string().decode()
        except UnicodeDecodeError:
            raise ClientProtocolError("start-up parameter is not valid UTF-8") from None
        if name in parameters:
            # The server would take the last one; whoever checks the first is fooled.
            raise ClientProtocolError("start-up parameter is given twice")
        parameters[name] = value
    if reader.left:
        raise ClientProtocolError("start-up packet has bytes after its end")
    return parameters


def message(kind: bytes, body: bytes = b"") -> bytes:
    return kind + UINT32.pack(len(body) + 4) + body


def startup(version: int, parameters: Mapping[str, str]) -> bytes:
    """A StartupMessage. Values come from ``parse_startup`` or are checked for NUL here (ValueError)."""
    body = UINT32.pack(version)
    for pair in parameters.items():
        for text in pair:
            if "\0" in text:
                raise ValueError("a start-up parameter cannot hold a zero byte")
            body += text.encode() + b"\0"
    return UINT32.pack(len(body) + 5) + body + b"\0"


def cancel_request(pid: int, secret: bytes) -> bytes:
    return UINT32.pack(len(secret) + 12) + UINT32.pack(CANCEL_REQUEST) + UINT32.pack(pid) + secret


def negotiate_version(version: int, unsupported: Iterable[str]) -> bytes:
    names = [name.encode() + b"\0" for name in unsupported]
    return message(b"v", UINT32.pack(version) + UINT32.pack(len(names)) + b"".join(names))


def error_response(sqlstate: str, text: str, hint: str = "", *, severity: str = "FATAL") -> bytes:
    """An ErrorResponse in UTF-8; zero bytes in the texts are dropped."""
    fields = [("S", severity), ("V", severity), ("C", sqlstate), ("M", text), ("H", hint)]
    body = b"".join(
        key.encode() + value.replace("\0", "").encode(errors="replace") + b"\0"
        for key, value in fields
        if value
    )
    return message(b"E", body + b"\0")


#: The fields of an ErrorResponse that are kept, by their code letter.
ERROR_FIELDS: Final = {
    "S": "severity",
    "V": "severity",
    "C": "code",
    "M": "message",
    "D": "detail",
    "H": "hint",
    "P": "position",
    "W": "where",
    "q": "internal_query",
}


def parse_error(body: bytes, encoding: str = "utf-8") -> dict[str, str]:
    """Name → text of an ErrorResponse or NoticeResponse body; what is cut off or unknown is left out."""
    fields: dict[str, str] = {}
    for part in body.split(b"\0"):
        name = ERROR_FIELDS.get(chr(part[0])) if part else None
        if name is not None:
            fields[name] = part[1:].decode(encoding, errors="backslashreplace")
    return fields


class Column(NamedTuple):
    """One column of a RowDescription."""

    name: str
    type: int
    format: int


def parse_columns(body: bytes, encoding: str = "utf-8") -> list[Column]:
    """The columns of a RowDescription body. Raises TargetProtocolError."""
    reader = Reader(body, "row description", TargetProtocolError)
    columns: list[Column] = []
    for _ in range(reader.uint16()):
        name = reader.string()[:256].decode(encoding, errors="backslashreplace")
        _, _, type_, _, _, format_ = _COLUMN.unpack(reader.take(_COLUMN.size))
        if len(columns) < _COLUMNS:
            columns.append(Column(name[:63], type_, format_))
    return columns


#: Columns that are named in a recording: beyond it the rows are still there.
_COLUMNS: Final = 256
_COLUMN: Final = struct.Struct("!IHIhih")


def describe_kind(kind: int) -> str:
    """A kind byte as it may stand in a message or a log."""
    return repr(chr(kind)) if 32 < kind < 127 else f"0x{kind:02x}"
