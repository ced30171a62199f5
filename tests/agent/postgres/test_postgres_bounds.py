"""The interceptor's bounds that no other test goes past, without a server."""

from __future__ import annotations

import contextlib
import importlib
import socket
import struct
import threading
import time

import pytest

from pam_agent.protocols.base import (
    ClientProtocolError,
    Credential,
    Opening,
    Target,
    TargetProtocolError,
    TlsPolicy,
)
from pam_agent.protocols.postgres import (
    PostgresInterceptor,
    bulk,
    codec,
    failures,
    login,
    pump,
    startup,
    upward,
)
from pam_agent.protocols.postgres.bulk import Bulk
from pam_agent.protocols.postgres.client_side import REPEATED, TEXT_PART, ClientSide
from pam_agent.protocols.postgres.codec import CLIENT_KINDS, TARGET_KINDS, message
from pam_agent.protocols.postgres.framing import Framer
from pam_agent.protocols.postgres.pipeline import KEPT_COLUMNS, STEPS_LIMIT, Kind, Pipeline, Step
from pam_agent.protocols.postgres.target_side import TargetSide
from pam_agent.protocols.postgres.values import HEX_LIMIT, hexadecimal
from pam_common.errors import PamError, UnavailableError
from pam_common.stream import SocketStream

interceptor = importlib.import_module("pam_agent.protocols.postgres.interceptor")

OK, READY = message(b"R", struct.pack("!I", 0)), message(b"Z", b"I")
START = codec.startup(codec.VERSION_3_0, {"user": "u"})


class Fixed:
    """A conversation with one target socket."""

    number = 1
    end_reason = None

    def __init__(self, target: socket.socket) -> None:
        self.target = target

    def record(self, events) -> None:
        """Kept by nobody."""

    def dial(self) -> socket.socket:
        return self.target

    def touch(self) -> None:
        """No idle limit."""


def opening() -> Opening:
    target = Target("h", 1, tls=TlsPolicy("disable"))
    return Opening("s-x", 1, "u", "a/b", "postgres", 0, 0, target, Credential("app", "x"))


@pytest.fixture
def pairs():
    made = [socket.socketpair() for _ in range(2)]
    for sock in (*made[0], *made[1]):
        sock.settimeout(60)
    made[1][0].settimeout(None)
    yield made
    for sock in (*made[0], *made[1]):
        sock.close()


def serve(pairs):
    """Serves the client behind ``pairs[0]`` against the target behind ``pairs[1]``."""
    (_, near), (target, _) = pairs
    near.settimeout(None)
    PostgresInterceptor(opening()).serve(SocketStream(near), Fixed(target))


def play():
    """A client's side, and what it makes of bytes: the events."""
    side = ClientSide(Pipeline(), lambda: 0.0)
    framer = Framer(CLIENT_KINDS, frozenset(b"d"), side, ClientProtocolError)

    def feed(data: bytes):
        framer.feed(data, len(data))
        return side.take_events()

    return feed


# --- times ---------------------------------------------------------------------------------------------


def test_postgres_a_client_that_does_not_start_is_cut(pairs, monkeypatch):
    monkeypatch.setattr(startup, "SECONDS", 0.1)
    with pytest.raises(PamError, match="start-up"):
        serve(pairs)


@pytest.mark.parametrize("name", ["ANSWER_SECONDS", "LOGIN_SECONDS"])
def test_postgres_a_target_that_does_not_answer_the_login_is_given_up(pairs, monkeypatch, name):
    monkeypatch.setattr(interceptor, name, 0.1)
    pairs[0][0].sendall(START)
    started = time.monotonic()
    with pytest.raises(PamError):
        serve(pairs)
    assert time.monotonic() - started < 60


def test_postgres_a_target_that_does_not_answer_a_cancel_is_given_up(pairs, monkeypatch):
    monkeypatch.setattr(interceptor, "CANCEL_SECONDS", 0.1)
    protocol = PostgresInterceptor(opening())
    key = protocol._keys.issue(7, b"real", codec.VERSION_3_0)
    started = time.monotonic()
    protocol._cancel(key, Fixed(pairs[1][0]))
    assert time.monotonic() - started < 60
    assert pairs[1][1].recv(100).endswith(b"real")


def test_postgres_a_client_that_does_not_read_its_last_message_is_cut(pairs, monkeypatch):
    monkeypatch.setattr(failures, "FAREWELL_SECONDS", 0.1)
    near = pairs[0][1]
    near.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            near.send(bytes(65536))
    near.setblocking(True)
    started = time.monotonic()
    failures.tell(SocketStream(near), UnavailableError("gone"))
    assert time.monotonic() - started < 60


def test_postgres_a_client_that_does_not_close_is_cut(pairs, monkeypatch):
    """The target has ended; the client keeps its side open and says nothing."""
    monkeypatch.setattr(pump, "CLOSE_SECONDS", 0.1)
    client, far = pairs[0][0], pairs[1][1]
    client.sendall(START)
    far.sendall(OK + READY)
    done = threading.Event()

    def run() -> None:
        with contextlib.suppress(PamError, OSError):
            serve(pairs)
        done.set()

    threading.Thread(target=run, daemon=True).start()
    while not client.recv(4096).endswith(READY):
        pass
    far.close()
    assert done.wait(60)


# --- sizes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [CLIENT_KINDS, TARGET_KINDS])
def test_postgres_small_messages_are_small(kinds):
    for kind, limit in kinds.items():
        framer = Framer(kinds, frozenset(), None, ClientProtocolError)
        with pytest.raises(ClientProtocolError, match="impossible length"):
            framer.feed(struct.pack("!BI", kind, limit.most + 1), 5)
        assert limit.most in (codec.SMALL, codec.LARGE) or limit.most < codec.SMALL


def test_postgres_a_login_message_is_small():
    from_target = [OK + message(b"S", b"x" * (1 << 16))]

    class Says:
        channel_binding = tls_version = None

        def sendall(self, data):
            self.pending = b"".join(from_target)

        def recv_into(self, view):
            size = min(len(view), len(self.pending))
            view[:size], self.pending = self.pending[:size], self.pending[size:]
            return size

    with pytest.raises(TargetProtocolError, match="impossible length"):
        login.log_in(Says(), Credential("a", "b"), codec.VERSION_3_0, {})


def test_postgres_a_statement_is_recorded_up_to_its_bound():
    (first, *more) = play()(message(b"Q", b"x" * (2 << 20) + b"\0"))
    told = len(first["sql"]) + sum(len(event["sql"]) for event in more)
    assert told == codec._TEXT == 1 << 20
    assert len(first["sql"]) == TEXT_PART
    assert first["truncated"]
    assert first["message_bytes"] > 2 << 20
    assert len(first["message_sha256"]) == 64


def test_postgres_bind_values_are_recorded_up_to_their_bound():
    feed = play()
    feed(message(b"P", b"s\0select $1\0\0\0"))
    body = b"\0s\0" + struct.pack("!HHI", 0, 1, 50_000) + b"v" * 50_000 + b"\0\0"
    events = feed(message(b"B", body) + message(b"E", b"\0\0\0\0\0") + message(b"S"))
    assert 10_000 < repr(events).count("v") < codec._BIND + 100


def test_postgres_a_text_is_repeated_up_to_its_bound():
    for size, kinds in ((REPEATED, ["query"]), (REPEATED + 1, ["parse", "query"])):
        feed = play()
        sql = b"x" * size
        events = feed(
            message(b"P", b"s\0" + sql + b"\0\0\0")
            + message(b"B", b"\0s\0" + bytes(6))
            + message(b"E", b"\0\0\0\0\0")
            + message(b"S")
        )
        assert [event["kind"] for event in events] == kinds


def test_postgres_too_many_unanswered_messages_wait():
    pipeline = Pipeline()
    for _ in range(STEPS_LIMIT):
        pipeline.push(Step(Kind.SYNC, 0.0))
    waits = threading.Thread(target=pipeline.wait_for_room, daemon=True)
    waits.start()
    waits.join(0.2)
    assert waits.is_alive()
    pipeline.close()
    waits.join(60)
    assert not waits.is_alive()


def test_postgres_of_many_columns_the_first_are_remembered():
    pipeline = Pipeline()
    client = ClientSide(pipeline, lambda: 0.0)
    up = Framer(CLIENT_KINDS, frozenset(b"d"), client, ClientProtocolError)
    down = Framer(TARGET_KINDS, frozenset(b"Dd"), TargetSide(pipeline, 0, lambda: 0.0), TargetProtocolError)
    asked = message(b"P", b"s\0select 1\0\0\0") + message(b"D", b"Ss\0") + message(b"S")
    up.feed(asked, len(asked))
    column = b"c\0" + struct.pack("!IHIhih", 0, 0, 23, 4, -1, 0)
    told = (
        message(b"1") + message(b"t", b"\0\0") + message(b"T", struct.pack("!H", 100) + column * 100) + READY
    )
    down.feed(told, len(told))
    assert len(pipeline.statements["s"].columns) == KEPT_COLUMNS


def data_row(size: int) -> bytes:
    return message(b"D", struct.pack("!HI", 1, size) + b"v" * size)


def test_postgres_a_row_and_a_group_of_rows_are_bounded():
    rows = Bulk(1, "rows", 1 << 20)
    (event,) = rows.run(memoryview(data_row(200_000)), 1)
    assert repr(event).count("v") <= bulk.ROW
    whole = data_row(1000) * 100
    events = Bulk(1, "rows", 1 << 20).run(memoryview(whole), 100)
    assert len(events) == 4
    assert max(repr(event).count("v") for event in events) <= bulk.GROUP + 1000


def test_postgres_a_long_transfer_is_counted_on_its_way(monkeypatch):
    monkeypatch.setattr(bulk, "PROGRESS", 10_000)
    rows = Bulk(1, "rows", 0)
    events = [event for _ in range(35) for event in rows.run(memoryview(data_row(1000)), 1)]
    assert len(events) == 3


def test_postgres_bytes_are_shown_up_to_a_bound():
    shown = hexadecimal(b"\xff" * 1000)
    assert shown.count("ff") == HEX_LIMIT
    assert "1000 bytes" in shown


def test_postgres_reads_are_bounded(pairs, monkeypatch):
    """However much comes at once, a connection holds no more than one read of each direction."""
    client, far = pairs[0][0], pairs[1][1]
    sizes: list[int] = []
    client.sendall(START)
    far.sendall(OK + READY)
    pairs[0][1].settimeout(None)
    inner = SocketStream(pairs[0][1])
    receive = inner.recv

    def recv(size: int) -> bytes:
        sizes.append(size)
        return receive(size)

    inner.recv = recv

    def serve() -> None:
        # The target's end may overtake the client's Terminate; which of them is told is not tested here.
        with contextlib.suppress(pump.TargetGoneError):
            PostgresInterceptor(opening()).serve(inner, Fixed(pairs[1][0]))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    while not client.recv(4096).endswith(READY):
        pass
    client.sendall(message(b"X"))
    far.close()
    thread.join(60)
    assert not thread.is_alive()
    assert max(sizes) == upward.UP_SIZE
