"""SSH's connection protocol and SFTP, as the interceptor reads them of both peers.

Input: a mode. BOARD: messages (a byte of side, then two bytes of length and the message) to a switchboard
with one open channel; only documented errors end it, no peer is given more than the other takes, and
nothing goes on that was not recorded when the recorder fails. SFTP: messages of both sides, the same events
however they are split. SCP: the same of the old protocol, which nothing ends. TERMINAL: what was typed and
printed; a word that was never printed is never recorded.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any

from material import Input, pieces, sized

from pam_agent.protocols.base import ClientProtocolError, TargetProtocolError
from pam_agent.protocols.ssh import codec
from pam_agent.protocols.ssh.channel import TARGET, USER
from pam_agent.protocols.ssh.codec import string
from pam_agent.protocols.ssh.policy import Policy
from pam_agent.protocols.ssh.scp import ScpWatch
from pam_agent.protocols.ssh.sftp import SftpWatch
from pam_agent.protocols.ssh.switchboard import WINDOW, Switchboard
from pam_agent.protocols.ssh.terminal import Terminal
from pam_common.errors import PamError

BOARD, SFTP, TERMINAL, SCP = range(4)
POLICY = Policy.parse(
    {
        "allow": ["shell", "exec", "sftp", "local-forward", "remote-forward"],
        "forward_to": ["10.0.0.0/8:*"],
        "remote_bind": ["127.0.0.1:*"],
        "env": ["LC_*"],
    }
)


def TestOneInput(data: bytes) -> None:
    source = Input(data)
    mode = source.byte() % 4
    if mode == BOARD:
        _board(source)
    elif mode == SFTP:
        _split(source, lambda: SftpWatch(1, 10))
    elif mode == SCP:
        side = source.byte() & 1
        _split(source, lambda: ScpWatch(1, side, ["to"]))
    else:
        _terminal(source)


def seeds() -> Iterator[bytes]:
    def said(*steps: tuple[int, bytes]) -> bytes:
        return b"".join(bytes([side]) + sized(message) for side, message in steps)

    run = codec.message(codec.CHANNEL_REQUEST, 0, string(b"exec") + b"\1" + string(b"ls"))
    status = codec.message(codec.CHANNEL_REQUEST, 0, string(b"exit-status") + b"\0" + bytes(4))
    place = string(b"10.0.0.1") + struct.pack(">I", 80) + string(b"::1") + struct.pack(">I", 1)
    yield bytes([BOARD]) + said(
        (USER, run),
        (TARGET, codec.message(codec.CHANNEL_SUCCESS, 0)),
        (TARGET, codec.message(codec.DATA, 0, string(b"file\n"))),
        (TARGET, codec.message(codec.EXTENDED_DATA, 0, struct.pack(">I", 1) + string(b"no"))),
        (TARGET, status),
        *((side, codec.message(kind, 0)) for kind in (codec.EOF, codec.CLOSE) for side in (TARGET, USER)),
    )
    yield bytes([BOARD]) + said((USER, codec.open_channel("direct-tcpip", 5, 100, 32768, place)))
    yield bytes([BOARD]) + said((USER, codec.global_request("tcpip-forward", place[:16])))
    hello = [(USER, b"\1\0\0\0\3"), (TARGET, b"\2\0\0\0\3")]
    opened = [(USER, b"\3\0\0\0\1" + string(b"/a") + bytes(8)), (TARGET, b"\x66\0\0\0\1" + string(b"h"))]
    write = (USER, b"\6\0\0\0\2" + string(b"h") + bytes(8) + string(b"content"))
    done = (TARGET, b"\x65\0\0\0\2" + bytes(12))
    closed = [(USER, b"\4\0\0\0\3" + string(b"h")), (TARGET, b"\x65\0\0\0\3" + bytes(12))]
    file = (*hello, *opened, write, done, *closed)
    yield bytes([SFTP]) + said(*((side, string(body)) for side, body in file))
    file = [(TARGET, b"\0"), (USER, b"C0644 3 a\n"), (TARGET, b"\0"), (USER, b"abc\0"), (TARGET, b"\0")]
    folder = [(USER, b"D0755 0 d\n"), *file, (USER, b"E\n"), (TARGET, b"\0")]
    yield bytes([SCP, USER]) + said(*file, *folder)
    yield bytes([TERMINAL]) + said((USER, b"ls -l"), (TARGET, b"ls -l"), (USER, b"\r"), (TARGET, b"\r\n"))
    yield bytes([TERMINAL]) + said((TARGET, b"Password: "), (USER, b"hunter2\r"), (TARGET, b"\r\n\x1b[0m"))


class Leg:
    """What a switchboard needs of a leg, and of its packets."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.packets = self
        self.queued = self.max_queued = 0
        self.on_message: Any = None
        self.asked: list[Callable[[bytes | None], None]] = []

    def queue(self, head: bytes, body: Any = b"") -> None:
        self.sent.append(head + bytes(body))

    def ask(self, _request: bytes, answered: Callable[[bytes | None], None]) -> None:
        self.asked.append(answered)

    def flush_before_wait(self, other: Leg) -> None:
        """Nothing waits here."""

    def flush_soon(self) -> None:
        """Nothing waits here."""


class Conversation:
    """A recorder that can fail."""

    number, end_reason, failing = 1, None, False

    def record(self, events: Any) -> None:
        if self.failing:
            raise PamError("the recorder failed")

    def touch(self) -> None:
        """Nothing is idle here."""


def _board(source: Input) -> None:
    conversation, failures = Conversation(), []
    board = Switchboard(
        conversation,  # type: ignore[arg-type]  # as much of one as is used
        POLICY,
        100,
        lambda side, failure: failures.append((side, failure)),
    )
    legs = (Leg(), Leg())
    for side, leg in enumerate(legs):
        board.attach(side, leg)  # type: ignore[arg-type]  # likewise
    _say(legs[USER], codec.open_channel("session", 0, 1000, 32768, b""))
    _say(legs[TARGET], codec.opened(0, 0, 1000, 32768))
    given = [1000, 1000]  # what each side takes of the channel
    while source and not failures:
        side = source.byte() & 1
        message = source.sized()
        conversation.failing = bool(message) and message[0] & 0x80 != 0
        if message:
            _say(legs[side], bytes([message[0] & 0x7F]) + message[1:])
            given[side] += _adjusts(message)
        for other, leg in enumerate(legs):
            for sent in leg.sent:
                given[other] -= _data(sent)
            leg.sent.clear()
            assert given[other] >= 0, "more was sent than the peer takes"
        for leg in legs:
            while leg.asked:
                leg.asked.pop()(b"")
    assert len(failures) <= 1


def _say(leg: Leg, message: bytes) -> None:
    leg.on_message(message[0], memoryview(message))


def _adjusts(message: bytes) -> int:
    return 1 << 40 if message[0] & 0x7F in (codec.WINDOW_ADJUST, codec.OPEN) else 0


def _data(sent: bytes) -> int:
    if sent[0] == codec.WINDOW_ADJUST:
        assert struct.unpack_from(">I", sent, 5)[0] <= WINDOW
    return len(sent) - 9 if sent[0] == codec.DATA else 0


def _steps(source: Input) -> list[tuple[int, bytes]]:
    found = []
    while source:
        side = source.byte() & 1
        found.append((side, source.sized()))
    return found


def _split(source: Input, make: Callable[[], SftpWatch | ScpWatch]) -> None:
    steps = _steps(source)
    whole = _events(make(), steps)
    split = [(side, piece) for side, data in steps for piece in pieces(data)]
    assert _events(make(), split) == whole


def _events(watch: SftpWatch | ScpWatch, steps: list[tuple[int, bytes]]) -> list[Any]:
    events = list[Any]()
    try:
        for side, data in steps:
            events += watch.feed(side, memoryview(data))
    except (ClientProtocolError, TargetProtocolError) as error:
        # Events of the same batch, before the fault, are lost with the connection.
        return [str(error)]
    return [*events, *watch.closed()]


def _terminal(source: Input) -> None:
    terminal, printed = Terminal(), ""
    for side, data in _steps(source):
        if side == USER:
            assert terminal.typed(data) == {"bytes": len(data)}
        else:
            text, echoed = terminal.printed(data)
            printed += text
            for run in echoed:
                assert all(char in printed for char in run), "what was never printed is recorded as shown"
