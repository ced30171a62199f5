"""The switchboard with scripted peers: what each side may send, how much of it, and what is recorded."""

from __future__ import annotations

import struct
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pam_agent.protocols.base import ClientProtocolError, TargetProtocolError
from pam_agent.protocols.ssh import codec
from pam_agent.protocols.ssh.channel import MAX_REPLIES, MAX_ROOM, PACKET, TARGET, USER
from pam_agent.protocols.ssh.codec import MAX_HOST, MAX_MODES, MAX_NAME, string
from pam_agent.protocols.ssh.forwards import MAX_BINDS
from pam_agent.protocols.ssh.policy import Policy
from pam_agent.protocols.ssh.requests import MAX_WAITING
from pam_agent.protocols.ssh.session_channel import MAX_COMMAND, MAX_ENVIRONMENT, MAX_VALUE
from pam_agent.protocols.ssh.switchboard import (
    BEHIND,
    MAX_CHANNELS,
    MAX_QUEUE,
    MAX_REASON,
    MIN_WINDOW,
    POOL,
    WINDOW,
    Switchboard,
)
from pam_common.errors import PamError


def u32(*numbers: int) -> bytes:
    return struct.pack(f">{len(numbers)}I", *numbers)


class Packets:
    def __init__(self) -> None:
        self.queued = 0
        self.max_queued = 0
        self.calls: list[Callable[[], None]] = []

    def when_drained(self, call: Callable[[], None]) -> None:
        self.calls.append(call)

    def flush_before_wait(self, other: Packets) -> None:
        pass

    def flush_soon(self) -> None:
        pass


class FakeLeg:
    """Keeps what is sent to a peer."""

    def __init__(self, log: list[Any], side: int) -> None:
        self.sent: list[bytes] = []
        self.packets = Packets()
        self.asked: list[tuple[bytes, Callable[[bytes | None], None]]] = []
        self.on_message: Any = None
        self.on_end: Any = None
        self._log, self._side = log, side

    def queue(self, head: bytes, body: Any = b"") -> None:
        self.sent.append(head + bytes(body))
        self._log.append((self._side, head[0]))

    def ask(self, request: bytes, answered: Callable[[bytes | None], None]) -> None:
        self.asked.append((request, answered))

    def take(self) -> list[bytes]:
        sent, self.sent = self.sent, []
        return sent


class Table:
    """A switchboard between two fake legs."""

    def __init__(self, budget: int = 1000, **account: Any) -> None:
        account.setdefault("allow", ["shell", "exec", "sftp", "local-forward", "remote-forward"])
        self.log: list[Any] = []
        self.events: list[dict[str, Any]] = []
        self.failures: list[PamError | None] = []
        self.recorder_error: PamError | None = None
        conversation = SimpleNamespace(record=self.record, touch=lambda: None, end_reason=None)
        self.board = Switchboard(
            conversation,  # type: ignore[arg-type]
            Policy.parse(account),
            budget,
            lambda side, failure: self.failures.append(failure),
        )
        self.legs = [FakeLeg(self.log, USER), FakeLeg(self.log, TARGET)]
        for side, leg in enumerate(self.legs):
            self.board.attach(side, leg)  # type: ignore[arg-type]

    def record(self, events: list[dict[str, Any]]) -> None:
        if self.recorder_error is not None:
            raise self.recorder_error
        self.events += events
        self.log += [event["kind"] for event in events]

    def say(self, side: int, message: bytes) -> None:
        self.legs[side].on_message(message[0], memoryview(message))

    def wish(
        self, side: int = USER, kind: str = "session", *, number: int = 7, window: int = 1 << 21,
        packet: int = 32768, body: bytes = b"",
    ) -> None:  # fmt: skip
        self.say(side, codec.open_channel(kind, number, window, packet, body))

    def open(self, number: int = 7, *, window: int = 1 << 21, remote: int = 70) -> tuple[int, int]:
        """An open session channel; our numbers of it towards the user and the target."""
        self.wish(number=number)
        sent = self.legs[TARGET].take()[-1]
        ours = struct.unpack(">I", sent[1 + 4 + 7 :][:4])[0]
        self.say(TARGET, codec.opened(ours, remote, window, 32768))
        confirmed = self.legs[USER].take()[-1]
        return struct.unpack(">I", confirmed[5:9])[0], ours

    def request(self, side: int, number: int, kind: str, body: bytes = b"", *, reply: bool = True) -> None:
        self.say(
            side, codec.message(codec.CHANNEL_REQUEST, number, string(kind.encode()) + bytes([reply]) + body)
        )

    def data(self, side: int, number: int, data: bytes) -> None:
        self.say(side, codec.message(codec.DATA, number, string(data)))

    @property
    def failure(self) -> PamError | None:
        return self.failures[0] if self.failures else None


def test_a_request_is_recorded_before_it_is_forwarded() -> None:
    table = Table()
    user, _ = table.open()
    table.log.clear()
    table.request(USER, user, "exec", string(b"ls"))
    assert table.log == ["exec", (TARGET, codec.CHANNEL_REQUEST)]
    table.data(USER, user, b"in")
    assert table.log[2:] == ["data", (TARGET, codec.DATA)]


def test_nothing_is_forwarded_when_it_cannot_be_recorded() -> None:
    table = Table()
    user, _ = table.open()
    table.recorder_error = PamError("the disk is full")
    table.request(USER, user, "exec", string(b"ls"))
    table.data(USER, user, b"in")
    assert table.legs[TARGET].take() == []
    assert "disk" in str(table.failure)


def test_what_a_peer_may_send_is_what_the_other_takes_at_most_a_window() -> None:
    table = Table()
    table.wish(window=1000)
    assert struct.unpack(">I", table.legs[TARGET].take()[0][16:20])[0] == 1000
    table.say(TARGET, codec.opened(0, 70, 1 << 30, 32768))
    assert struct.unpack(">I", table.legs[USER].take()[0][9:13])[0] == WINDOW


def test_more_than_was_allowed_ends_the_connection() -> None:
    table = Table()
    user, target = table.open(window=100)
    table.data(USER, user, b"x" * 100)
    assert table.failure is None
    table.data(USER, user, b"x")
    assert isinstance(table.failure, ClientProtocolError)
    table = Table()
    user, target = table.open()
    table.data(TARGET, target, b"x" * (PACKET + 1))
    assert isinstance(table.failure, TargetProtocolError)


def test_a_receiver_that_makes_room_lets_the_sender_go_on() -> None:
    table = Table()
    user, target = table.open(window=1000)
    table.data(USER, user, b"x" * 1000)
    table.legs[USER].take()
    table.say(TARGET, codec.window_adjust(target, 500))
    assert table.legs[USER].take() == [codec.window_adjust(7, 500)]


def test_a_leg_that_is_behind_gives_no_more_room_until_it_is_not() -> None:
    table = Table()
    user, _ = table.open(window=1 << 24)
    table.legs[TARGET].packets.queued = BEHIND + 1
    for _ in range(WINDOW // 2 // PACKET + 8):
        table.data(USER, user, bytes(PACKET))
    assert table.legs[USER].take() == []
    assert len(table.legs[TARGET].packets.calls) == 1
    table.legs[TARGET].packets.queued = 0
    table.legs[TARGET].packets.calls[0]()
    (adjust,) = table.legs[USER].take()
    assert adjust[0] == codec.WINDOW_ADJUST


def test_channels_share_what_a_connection_may_keep() -> None:
    table = Table()
    for number in range(MAX_CHANNELS):
        table.wish(number=number)
    windows = [struct.unpack(">I", sent[16:20])[0] for sent in table.legs[TARGET].take()]
    assert windows[0] == WINDOW
    assert windows[-1] == POOL // (MAX_CHANNELS - 1)
    assert min(windows) >= MIN_WINDOW
    assert sum(windows) + BEHIND < MAX_QUEUE == table.legs[TARGET].packets.max_queued


def test_channels_are_limited_and_their_numbers_used_again() -> None:
    table = Table()
    for number in range(MAX_CHANNELS + 1):
        table.wish(number=number)
    assert len(table.legs[TARGET].take()) == MAX_CHANNELS
    (refusal,) = table.legs[USER].take()
    assert (refusal[0], refusal[5:9]) == (codec.OPEN_FAILURE, u32(codec.SHORTAGE))
    table.say(TARGET, codec.open_failure(0, 1, "no"))
    table.legs[USER].take()
    table.wish(number=99)
    assert table.legs[TARGET].take()[0][12:16] == u32(0)


def test_a_channel_is_over_when_both_have_closed_it() -> None:
    table = Table()
    user, target = table.open()
    table.say(TARGET, codec.message(codec.CLOSE, target))
    assert table.legs[USER].take() == [codec.message(codec.CLOSE, 7)]
    table.data(USER, user, b"late")  # it did not know yet
    table.say(USER, codec.message(codec.CLOSE, user))
    assert table.failure is None
    assert [event["kind"] for event in table.events][-1] == "close"
    table.data(USER, user, b"later still")
    assert isinstance(table.failure, ClientProtocolError)


def test_answers_come_in_the_order_of_the_requests() -> None:
    table = Table()
    user, target = table.open()
    table.request(USER, user, "exec", string(b"ls"))
    table.request(USER, user, "auth-agent-req@openssh.com")  # refused here, while the other one waits
    assert table.legs[USER].take() == []
    table.say(TARGET, codec.message(codec.CHANNEL_SUCCESS, target))
    assert [sent[0] for sent in table.legs[USER].take()] == [codec.CHANNEL_SUCCESS, codec.CHANNEL_FAILURE]


def test_an_answer_to_nothing_ends_the_connection() -> None:
    table = Table()
    _, target = table.open()
    table.say(TARGET, codec.message(codec.CHANNEL_SUCCESS, target))
    assert isinstance(table.failure, TargetProtocolError)


def test_requests_without_waiting_are_limited() -> None:
    table = Table()
    user, _ = table.open()
    table.request(USER, user, "exec", string(b"ls"))
    for _ in range(MAX_REPLIES):
        table.request(USER, user, "x11-req")
    assert isinstance(table.failure, ClientProtocolError)


def test_global_requests_are_answered_in_order_and_limited() -> None:
    table = Table(remote_bind=["127.0.0.1:*"])

    def ask(kind: str, body: bytes = b"") -> None:
        table.say(USER, codec.global_request(kind, body))

    ask("keepalive@openssh.com")
    assert table.legs[USER].take() == [bytes([codec.REQUEST_FAILURE])]
    ask("tcpip-forward", string(b"localhost") + u32(8000))
    ask("keepalive@openssh.com")
    assert table.legs[USER].take() == []
    (_, answered), = table.legs[TARGET].asked  # fmt: skip
    answered(b"")
    assert table.legs[USER].take() == [bytes([codec.REQUEST_SUCCESS]), bytes([codec.REQUEST_FAILURE])]
    ask("tcpip-forward", string(b"localhost") + u32(8001))
    for _ in range(MAX_WAITING):
        ask("keepalive@openssh.com")
    assert isinstance(table.failure, ClientProtocolError)


def test_abuse_10_only_a_port_of_ones_own_can_be_cancelled() -> None:
    table = Table(remote_bind=["127.0.0.1:*"])
    cancel = codec.global_request("cancel-tcpip-forward", string(b"127.0.0.1") + u32(8000))
    table.say(USER, cancel)
    assert table.legs[TARGET].asked == []
    assert table.legs[USER].take() == [bytes([codec.REQUEST_FAILURE])]
    table.say(USER, codec.global_request("tcpip-forward", string(b"127.0.0.1") + u32(8000)))
    table.legs[TARGET].asked.pop()[1](b"")
    table.say(USER, cancel)
    assert len(table.legs[TARGET].asked) == 1


def test_abuse_10_a_target_opens_no_channel_that_was_not_asked_for() -> None:
    body = string(b"127.0.0.1") + u32(8000) + string(b"1.2.3.4") + u32(5)
    table = Table(remote_bind=["127.0.0.1:*"])
    for kind in ("forwarded-tcpip", "auth-agent@openssh.com", "x11", "session", "direct-tcpip"):
        table.wish(TARGET, kind, body=body)
    assert table.legs[USER].take() == []
    assert [sent[0] for sent in table.legs[TARGET].take()] == [codec.OPEN_FAILURE] * 5


def test_bound_ports_are_limited() -> None:
    table = Table(remote_bind=["127.0.0.1:*"])
    for port in range(MAX_BINDS + 1):
        table.say(USER, codec.global_request("tcpip-forward", string(b"127.0.0.1") + u32(8000 + port)))
    assert len(table.legs[TARGET].asked) == MAX_BINDS


def test_only_one_thing_runs_on_a_channel() -> None:
    table = Table()
    user, _ = table.open()
    for _ in range(2):
        table.request(USER, user, "exec", string(b"ls"))
    assert [event["kind"] for event in table.events] == ["exec", "refused"]


def test_after_a_refusal_by_the_target_something_else_may_run() -> None:
    table = Table()
    user, target = table.open()
    table.request(USER, user, "subsystem", string(b"sftp"))
    table.say(TARGET, codec.message(codec.CHANNEL_FAILURE, target))
    table.request(USER, user, "exec", string(b"sftp-server"))
    assert [event["kind"] for event in table.events] == ["sftp_open", "refused", "exec"]


def test_abuse_6_a_helper_does_not_walk_around_what_is_allowed() -> None:
    for allow in (["sftp"], ["local-forward"]):
        table = Table(allow=allow)
        user, _ = table.open()
        for kind, body in (
            ("exec", string(b"scp -t /etc/passwd")),
            ("exec", string(b"/usr/lib/openssh/sftp-server")),
            ("subsystem", string(b"netconf")),
            ("shell", b""),
        ):
            table.request(USER, user, kind, body)
        assert {sent[0] for sent in table.legs[USER].take()} == {codec.CHANNEL_FAILURE}
        assert table.legs[TARGET].take() == []


def test_variables_and_texts_are_limited() -> None:
    table = Table(env=["A*"])
    user, _ = table.open()
    for number in range(MAX_ENVIRONMENT + 1):
        table.request(USER, user, "env", string(b"A%d" % number) + string(b"x"))
    assert len(table.legs[TARGET].take()) == MAX_ENVIRONMENT
    for kind, body in (
        ("exec", string(b"x" * (MAX_COMMAND + 1))),
        ("env", string(b"A") + string(b"x" * (MAX_VALUE + 1))),
        ("pty-req", string(b"x" * (MAX_NAME + 1)) + u32(1, 1, 0, 0) + string(b"")),
        ("pty-req", string(b"x") + u32(1, 1, 0, 0) + string(b"x" * (MAX_MODES + 1))),
        ("x" * (MAX_NAME + 1), b""),
    ):
        table = Table(env=["A*"])
        user, _ = table.open()
        table.request(USER, user, kind, body)
        assert isinstance(table.failure, ClientProtocolError), kind
    table = Table()
    table.wish(kind="direct-tcpip", body=string(b"h" * (MAX_HOST + 1)) + u32(1) + string(b"") + u32(1))
    assert isinstance(table.failure, ClientProtocolError)


def test_a_targets_reason_is_cut() -> None:
    table = Table()
    table.wish()
    table.say(TARGET, codec.open_failure(0, 2, "x" * 1000))
    (refusal,) = table.legs[USER].take()
    assert refusal.count(b"x") == MAX_REASON


def test_a_window_beyond_4_gib_ends_the_connection() -> None:
    table = Table()
    user, _ = table.open()
    table.say(USER, codec.window_adjust(user, MAX_ROOM))
    assert isinstance(table.failure, ClientProtocolError)


def test_a_target_that_hangs_up_after_its_close_has_finished() -> None:
    """The exit status is with the user; the answer to the close may take as long as the way to them."""
    table = Table()
    _, target = table.open()
    table.say(TARGET, codec.message(codec.CLOSE, target))
    table.board.end(TARGET, None)
    assert table.board.finished


def test_a_target_that_hangs_up_with_a_channel_open_has_not() -> None:
    table = Table()
    table.open()
    table.board.end(TARGET, None)
    assert not table.board.finished


def test_a_peer_that_takes_tiny_packets_gets_no_channel() -> None:
    table = Table()
    table.wish(packet=16)
    assert table.legs[USER].take()[0][0] == codec.OPEN_FAILURE
    assert table.legs[TARGET].take() == []


@pytest.mark.parametrize(
    "message",
    [
        codec.message(codec.DATA, 5, string(b"x")),
        codec.message(codec.DATA, 0, b"\0\0\0\xff"),
        codec.message(codec.CLOSE, 0)[:3],
        codec.message(codec.EXTENDED_DATA, 0, u32(1) + string(b"x")),
        codec.message(codec.EXTENDED_DATA, 0, u32(2)),
        codec.message(codec.WINDOW_ADJUST, 0, b"\0"),
        codec.message(codec.CHANNEL_REQUEST, 0, b"\0\0\0\xffexec"),
        codec.message(codec.OPEN_CONFIRMATION, 0, u32(0, 0, 0)),
        codec.message(83, 0),
        bytes([codec.OPEN]) + string(b"session") + u32(1, 1, 0),
    ],
)
def test_malformed_messages_end_the_connection_and_name_who_sent_them(message) -> None:
    table = Table()
    table.open()
    table.say(USER, message)
    assert isinstance(table.failure, ClientProtocolError)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([USER, TARGET]),
            st.integers(80, 100),
            st.one_of(
                st.binary(max_size=60),
                st.builds(lambda n, rest: u32(n) + rest, st.integers(0, 2), st.binary(max_size=40)),
                st.builds(
                    lambda n, kind, rest: u32(n) + string(kind) + b"\1" + rest,
                    st.integers(0, 1),
                    st.sampled_from([b"exec", b"shell", b"pty-req", b"env", b"exit-status", b"subsystem"]),
                    st.binary(max_size=40),
                ),
            ),
        ),
        max_size=12,
    )
)
def test_no_message_is_a_fault_of_ours(messages) -> None:
    """Only PamError comes of anything that peers send, and it ends the connection."""
    table = Table()
    table.open()
    for side, kind, body in messages:
        table.say(side, bytes([kind]) + body)
    assert len(table.failures) <= 1
