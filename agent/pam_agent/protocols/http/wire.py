"""HTTP/1.1 on bytes: heads read strictly, bodies by h11, no sockets.

h11 is lenient where servers differ (a bare line feed ends a line, a folded line is joined, Content-Length
beside Transfer-Encoding is ignored), and every such difference is a way to smuggle a request past whoever
checks it. So a head is looked at before h11 gets it, and what does not have exactly one reading is refused.
What goes on is written anew from what was understood, never copied: the other side reads what was checked.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

import h11

from pam_agent.protocols.base import ClientProtocolError, TargetProtocolError

#: Cookies of 4 KiB and long query strings fit several times; servers take 8 to 32 KiB.
MAX_HEAD: Final = 64 << 10
#: Browsers send about 20. Apache's default, and what other servers take.
MAX_FIELDS: Final = 100
#: One read of either side, and with it the largest piece of a body that is in memory at a time.
PIECE: Final = 64 << 10

#: Names as they were written, values without the space around them.
Fields: TypeAlias = list[tuple[bytes, bytes]]
Fault: TypeAlias = type[ClientProtocolError] | type[TargetProtocolError]

_END: Final = b"\r\n\r\n"
#: A line of a head: no control character but the tab (a bare CR or LF, a NUL), and no space in front, which
#: would continue the line before.
_FIELD_LINE: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t\x20-\x7e\x80-\xff]*")
_FIRST_LINE: Final = re.compile(rb"[\x21-\x7e][\x20-\x7e\x80-\xff]*")
_DIGITS: Final = re.compile(rb"[0-9]{1,18}")


@dataclass(frozen=True)
class Head:
    """A request's or a response's head, checked. ``length`` is None for chunked and for "until the end"."""

    fields: Fields
    chunked: bool
    length: int | None

    def values(self, name: bytes) -> list[bytes]:
        """Every value of the field ``name`` (lower case)."""
        return [value for field, value in self.fields if field.lower() == name]

    def value(self, name: bytes) -> bytes | None:
        """The value of a field that may stand once; None without it."""
        found = self.values(name)
        return found[0] if found else None

    def words(self, name: bytes) -> set[bytes]:
        """The members of a comma-separated list, lower case."""
        return {word.strip().lower() for value in self.values(name) for word in value.split(b",")} - {b""}


@dataclass(frozen=True)
class Request(Head):
    method: str = "GET"
    target: str = "/"  #: path and query, ASCII
    version: str = "1.1"

    @property
    def has_body(self) -> bool:
        return self.chunked or bool(self.length)

    @property
    def upgrades(self) -> bool:
        """Whether it asks for another protocol (which one is yet to be checked)."""
        return b"upgrade" in self.words(b"connection") and self.value(b"upgrade") is not None


@dataclass(frozen=True)
class Response(Head):
    status: int = 200
    reason: str = ""
    version: str = "1.1"


def check_head(head: bytes, fault: Fault) -> None:
    """Refuse a head, given with its empty line, that two readers could read differently."""
    lines = head[: -len(_END)].split(b"\r\n")
    if not _FIRST_LINE.fullmatch(lines[0]):
        raise fault("the first line of the message is not one of HTTP")
    if len(lines) - 1 > MAX_FIELDS:
        raise fault(f"the message has more than {MAX_FIELDS} header fields")
    for line in lines[1:]:
        if line[:1] in (b" ", b"\t"):
            raise fault("a header field is continued on a second line")
        if not _FIELD_LINE.fullmatch(line):
            raise fault("a header field has characters that have no place in it")
    # h11 makes one of two that agree. They need not agree for whoever reads only the first, or the last.
    names = [line.partition(b":")[0].lower() for line in lines[1:]]
    if names.count(b"content-length") + names.count(b"transfer-encoding") > 1:
        raise fault("the message says more than once how long it is")
    for name, line in zip(names, lines[1:], strict=True):
        if name == b"content-length" and not _DIGITS.fullmatch(line.partition(b":")[2].strip(b" \t")):
            raise fault("the message's Content-Length is not a number")


def framing(fields: Fields, fault: Fault) -> tuple[bool, int | None]:
    """(chunked, length) as the fields of a checked head say."""
    lengths = [value for name, value in fields if name.lower() == b"content-length"]
    codings = [value for name, value in fields if name.lower() == b"transfer-encoding"]
    if codings and codings[0].lower() != b"chunked":
        raise fault("the message has a transfer encoding other than chunked")
    return bool(codings), int(lengths[0]) if lengths else None


class Machine:
    """h11's state of one exchange with one side. Two threads may use it: one that reads a body, and one that
    writes. Errors of h11 come out as ``fault``, which blames the side that is spoken to."""

    def __init__(self, role: Literal["server", "client"]) -> None:
        self.fault: Fault = ClientProtocolError if role == "server" else TargetProtocolError
        self._connection = h11.Connection(
            h11.SERVER if role == "server" else h11.CLIENT, max_incomplete_event_size=MAX_HEAD
        )
        self._lock = threading.Lock()

    def feed(self, data: bytes) -> None:
        """What was read; empty for the end of the stream."""
        with self._lock:
            try:
                self._connection.receive_data(data)
            except h11.ProtocolError as error:
                raise self.fault(_lowered(error)) from None

    def next(self) -> Any:
        """h11's next event, NEED_DATA or PAUSED."""
        with self._lock:
            try:
                return self._connection.next_event()
            except h11.ProtocolError as error:
                raise self.fault(_lowered(error)) from None

    def send(self, event: Any) -> bytes:
        """The bytes of an event to be written."""
        with self._lock:
            try:
                return self._connection.send(event) or b""
            except h11.LocalProtocolError as error:
                raise self.fault(_lowered(error)) from None

    def rest(self) -> bytes:
        """What arrived behind the message: the beginning of the next, or of another protocol."""
        return bytes(self._connection.trailing_data[0])

    @property
    def over(self) -> bool:
        """Whether both directions are done, and the connection may carry another exchange."""
        connection = self._connection
        return connection.our_state is h11.DONE and connection.their_state is h11.DONE

    @property
    def begun(self) -> bool:
        """As server: whether a final response was begun."""
        return self._connection.our_state not in (h11.IDLE, h11.SEND_RESPONSE)


class Inbox:
    """Reads messages of one side: ``pull`` gives up to PIECE bytes, or none at the end of the stream."""

    def __init__(self, pull: Callable[[], bytes], fault: Fault) -> None:
        self._pull = pull
        self._fault = fault
        self.rest = b""  #: read, and not yet used

    def head(self) -> bytes | None:
        """The next head with its empty line; None if the stream ended before it began."""
        buffer = bytearray(self.rest)
        self.rest = b""
        seen = 0
        while (found := buffer.find(_END, max(0, seen - len(_END)))) < 0:
            seen = len(buffer)
            if seen > MAX_HEAD:
                raise self._fault(f"the head of the message is longer than {MAX_HEAD >> 10} KiB")
            data = self._pull()
            if not data:
                if not buffer:
                    return None
                raise self._fault("the stream ended within the head of a message")
            buffer += data
        found += len(_END)
        if found > MAX_HEAD:
            raise self._fault(f"the head of the message is longer than {MAX_HEAD >> 10} KiB")
        self.rest = bytes(buffer[found:])
        head = bytes(buffer[:found])
        check_head(head, self._fault)
        return head

    def begin(self, machine: Machine) -> Any | None:
        """Read a head and give it to ``machine``: its event, or None at the end of the stream."""
        head = self.head()
        if head is None:
            return None
        machine.feed(head)
        return machine.next()

    def piece(self, machine: Machine, *, wait: bool = True) -> bytes | None:
        """The next piece of the message's body; None at its end, after which ``rest`` is what follows.

        With ``wait=False`` only what was read already is looked at, and ``b""`` says that there is no more.
        """
        while True:
            if self.rest:
                data, self.rest = self.rest, b""
                machine.feed(data)
            event = machine.next()
            if isinstance(event, h11.Data):
                return bytes(event.data)
            if isinstance(event, h11.EndOfMessage):
                self.rest = machine.rest()
                return None
            if event is not h11.NEED_DATA:
                raise self._fault("the message's body does not end where it should")
            if not wait:
                return b""
            machine.feed(self._pull())


def gather(read: Callable[[], bytes | None]) -> tuple[bytes, bool]:
    """What ``read`` gives of a body until it says that there is no more now (``b""``) or ever (None: then
    True), or a piece's worth is there."""
    pieces: list[bytes] = []
    size = 0
    while size < PIECE:
        piece = read()
        if not piece:
            return b"".join(pieces), piece is None
        pieces.append(piece)
        size += len(piece)
    return b"".join(pieces), False


def request_of(event: h11.Request) -> Request:
    """Raises ClientProtocolError for a message that has two readings."""
    fields = event.headers.raw_items()
    chunked, length = framing(fields, ClientProtocolError)
    if chunked and event.http_version < b"1.1":
        raise ClientProtocolError("a chunked message is not one of HTTP/1.0")
    return Request(
        fields=fields,
        chunked=chunked,
        length=length,
        method=event.method.decode("ascii"),
        target=event.target.decode("ascii"),
        version=event.http_version.decode("ascii"),
    )


def response_of(event: h11.Response | h11.InformationalResponse) -> Response:
    """Raises TargetProtocolError for a message that has two readings."""
    fields = event.headers.raw_items()
    chunked, length = framing(fields, TargetProtocolError)
    return Response(
        fields=fields,
        chunked=chunked,
        length=length,
        status=event.status_code,
        reason=event.reason.decode("latin-1"),
        version=event.http_version.decode("ascii"),
    )


def without(fields: Iterable[tuple[bytes, bytes]], *names: bytes) -> Fields:
    """The fields but those named (lower case)."""
    return [(name, value) for name, value in fields if name.lower() not in names]


def _lowered(error: h11.ProtocolError) -> str:
    # h11 quotes what it could not read; that may be a secret, and is not needed to find the fault.
    text = str(error).partition(":")[0]
    return text[:1].lower() + text[1:200]
