"""Messages of SSH's connection protocol (RFC 4254) and back: bytes to fields, without I/O.

https://www.rfc-editor.org/rfc/rfc4254. Only what is looked at is parsed; everything else passes as it came.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from pam_agent.protocols.base import ClientProtocolError, TargetProtocolError

DISCONNECT: Final = 1
GLOBAL_REQUEST: Final = 80
REQUEST_SUCCESS: Final = 81
REQUEST_FAILURE: Final = 82
OPEN: Final = 90
OPEN_CONFIRMATION: Final = 91
OPEN_FAILURE: Final = 92
WINDOW_ADJUST: Final = 93
DATA: Final = 94
EXTENDED_DATA: Final = 95
EOF: Final = 96
CLOSE: Final = 97
CHANNEL_REQUEST: Final = 98
CHANNEL_SUCCESS: Final = 99
CHANNEL_FAILURE: Final = 100

#: RFC 4254, 5.1: why a channel is not opened.
PROHIBITED: Final = 1
CONNECT_FAILED: Final = 2
UNKNOWN_TYPE: Final = 3
SHORTAGE: Final = 4

#: RFC 4253, 11.1: why a connection ends.
PROTOCOL_ERROR: Final = 2
BY_APPLICATION: Final = 11

#: Bytes of a request's, a channel's or a terminal's name: RFC 4251, 6 allows 64; long terminal names exist.
MAX_NAME: Final = 256
#: A host name has 255.
MAX_HOST: Final = 255
#: RFC 4254, 8: one byte and four for each of 159 modes, and an end.
MAX_MODES: Final = 1024

_INT = struct.Struct(">I")
_KIND_INT = struct.Struct(">BI")
_OPENED = struct.Struct(">BIIII")

ProtocolFault = type[ClientProtocolError] | type[TargetProtocolError]


class Reader:
    """Takes fields from the front of a message. ``fault`` is raised for what is cut short."""

    def __init__(self, data: bytes | memoryview, fault: ProtocolFault, start: int = 1) -> None:
        self._data = memoryview(data)
        self._at = start
        self._fault = fault

    def uint32(self) -> int:
        return int(_INT.unpack(self._take(4))[0])

    def flag(self) -> bool:
        return self._take(1)[0] != 0

    def string(self) -> bytes:
        return bytes(self._take(self.uint32()))

    def text(self, limit: int) -> str:
        """A string of at most ``limit`` bytes; what is not UTF-8 is replaced."""
        raw = self.string()
        if len(raw) > limit:
            raise self._fault(f"a text of {len(raw)} bytes in an ssh message, where {limit} are allowed")
        return raw.decode("utf-8", "replace")

    def rest(self) -> bytes:
        return bytes(self._data[self._at :])

    def end(self) -> None:
        """Raise for bytes that are left: two readers could take them differently."""
        if self._at != len(self._data):
            raise self._fault("bytes behind the end of an ssh message")

    def _take(self, size: int) -> memoryview:
        found = self._data[self._at : self._at + size]
        if len(found) != size:
            raise self._fault("an ssh message is cut short")
        self._at += size
        return found


def string(data: bytes) -> bytes:
    return _INT.pack(len(data)) + data


def number_at(payload: memoryview, fault: ProtocolFault) -> int:
    """The channel number that every channel message but OPEN begins with."""
    if len(payload) < 5:
        raise fault("an ssh channel message is cut short")
    return int(_INT.unpack_from(payload, 1)[0])


def message(kind: int, channel: int, body: bytes | memoryview = b"") -> bytes:
    """A channel message: its number, the receiver's channel, what follows."""
    return _KIND_INT.pack(kind, channel) + bytes(body)


def window_adjust(channel: int, size: int) -> bytes:
    return message(WINDOW_ADJUST, channel, _INT.pack(size))


def open_channel(kind: str, number: int, window: int, packet: int, body: bytes) -> bytes:
    return b"".join((bytes([OPEN]), string(kind.encode()), struct.pack(">III", number, window, packet), body))


def opened(remote: int, number: int, window: int, packet: int) -> bytes:
    return _OPENED.pack(OPEN_CONFIRMATION, remote, number, window, packet)


def open_failure(remote: int, reason: int, text: str) -> bytes:
    return message(OPEN_FAILURE, remote, _INT.pack(reason) + string(text.encode()) + string(b"en"))


def global_request(kind: str, body: bytes) -> bytes:
    """One that wants an answer."""
    return bytes([GLOBAL_REQUEST]) + string(kind.encode()) + b"\1" + body


@dataclass(frozen=True)
class ChannelOpen:
    """A peer's wish for a channel: its kind and number, and what it takes at first."""

    kind: str
    number: int
    window: int
    packet: int
    body: bytes

    @classmethod
    def parse(cls, payload: memoryview, fault: ProtocolFault) -> ChannelOpen:
        reader = Reader(payload, fault)
        kind = reader.text(MAX_NAME)
        number, window, packet = reader.uint32(), reader.uint32(), reader.uint32()
        if packet < 1:
            raise fault("an ssh channel that takes packets of no size")
        return cls(kind, number, window, packet, reader.rest())


@dataclass(frozen=True)
class Endpoints:
    """Where a forwarded connection goes to (or came in at), and where it came from."""

    host: str
    port: int
    origin: str
    origin_port: int

    @classmethod
    def parse(cls, body: bytes, fault: ProtocolFault) -> Endpoints:
        """The body of ``direct-tcpip`` and ``forwarded-tcpip`` (RFC 4254, 7.2)."""
        reader = Reader(body, fault, 0)
        found = cls(reader.text(MAX_HOST), reader.uint32(), reader.text(MAX_HOST), reader.uint32())
        reader.end()
        return found


@dataclass(frozen=True)
class Request:
    """A channel request: its kind, whether an answer is wanted, and its own fields."""

    kind: str
    wants_reply: bool
    body: bytes

    @classmethod
    def parse(cls, payload: memoryview, fault: ProtocolFault) -> Request:
        reader = Reader(payload, fault, 5)
        return cls(reader.text(MAX_NAME), reader.flag(), reader.rest())


@dataclass(frozen=True)
class Pty:
    """``pty-req``; the terminal's modes are passed on as they came."""

    term: str
    columns: int
    rows: int

    @classmethod
    def parse(cls, body: bytes) -> Pty:
        reader = Reader(body, ClientProtocolError, 0)
        found = cls(reader.text(MAX_NAME), reader.uint32(), reader.uint32())
        reader.uint32(), reader.uint32()
        if len(reader.string()) > MAX_MODES:
            raise ClientProtocolError("more terminal modes than there are")
        reader.end()
        return found
