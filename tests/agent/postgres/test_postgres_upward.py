"""Client → target: what the reading thread does by itself equals what the own thread does, byte for byte."""

from __future__ import annotations

import fcntl
import socket
import struct
import termios
import threading
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pam_agent.protocols.base import ClientProtocolError
from pam_agent.protocols.postgres.client_side import ClientSide
from pam_agent.protocols.postgres.codec import message
from pam_agent.protocols.postgres.pipeline import STEPS_LIMIT, Kind, Pipeline, Step
from pam_agent.protocols.postgres.upward import INLINE, Upward
from pam_agent.target_tls import PlainTarget
from pam_common.errors import PamError


def query(sql):
    return message(b"Q", sql.encode() + b"\0")


class Arriving:
    """A client's stream whose bytes another thread brings: as the agent's end of an ssh channel is."""

    def __init__(self, *, delivers: bool = True) -> None:
        self._changed = threading.Condition()
        self._pieces: list[bytes] = []
        self._take = None
        self._waiting = self._interrupted = self._over = False
        self.inline = 0  #: bytes that were taken as they came
        self._delivers = delivers

    def deliver_to(self, take) -> None:
        if self._delivers:
            self._take = take

    def bring(self, data: bytes) -> None:
        """In the reading thread."""
        with self._changed:
            # Before recv waits nothing is delivered: let it, so that what is tested is tested.
            self._changed.wait_for(lambda: (self._waiting and not self._pieces) or self._over, 60)
            take = self._take
        if take is not None:
            memory = bytearray(data)  # there during the call only
            try:
                taken = take(memoryview(memory))
            except InterruptedError:
                self.inline += len(data)
                with self._changed:
                    self._interrupted, self._waiting = True, False
                    self._changed.notify_all()
                return
            finally:
                memory[:] = bytes(len(memory))
            self.inline += taken
            data = data[taken:]
        with self._changed:
            if data:
                self._pieces.append(data)
                self._waiting = False
            self._changed.notify_all()

    def waits(self, seconds: float) -> bool:
        """Whether the own thread is in recv by then."""
        with self._changed:
            return self._changed.wait_for(lambda: self._waiting, seconds)

    def end(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._over, 60)
            self._over = True
            self._changed.notify_all()

    def abort(self) -> None:
        with self._changed:
            self._over = True
            self._changed.notify_all()

    close = abort

    def sendall(self, data) -> None:
        raise AssertionError("the other direction")

    def shutdown(self, how: int) -> None:
        raise AssertionError("the other direction")

    def recv(self, size: int) -> bytes:
        with self._changed:
            self._waiting = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._pieces or self._interrupted or self._over, 60)
            self._waiting = False
            if self._interrupted:
                self._interrupted = False
                raise InterruptedError
            data = self._pieces.pop(0) if self._pieces else b""
            if len(data) > size:
                self._pieces.insert(0, data[size:])
            return data[:size]


class Log:
    """A conversation that keeps what is recorded; ``fail`` makes it a full disk."""

    def __init__(self) -> None:
        self.events: list = []
        self.fail: Exception | None = None

    def record(self, events) -> None:
        if self.fail is not None:
            raise self.fail
        self.events += events

    def touch(self) -> None:
        """No idle limit."""


class Way:
    """An Upward between an Arriving and a socket."""

    def __init__(self, *, delivers: bool = True, target=None) -> None:
        near, self.far = socket.socketpair()
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self.client = Arriving(delivers=delivers)
        self.log = Log()
        self.pipeline = Pipeline()
        side = ClientSide(self.pipeline, lambda: 0.0)
        self.target = target(near) if target else PlainTarget(near)
        self.up = Upward(self.client, self.target, self.log, self.pipeline, side, "up")
        self.near = near

    def close(self) -> None:
        self.pipeline.close()
        self.near.close()
        self.far.close()


@pytest.fixture
def way():
    made = Way()
    made.up.start(b"")
    yield made
    made.pipeline.close()
    made.client.abort()
    made.target.abort()
    assert made.up.ended(20)
    made.close()


def read(sock: socket.socket, size: int) -> bytes:
    data = b""
    sock.settimeout(60)
    while len(data) < size and (part := sock.recv(size - len(data))):
        data += part
    return data


def unread(sock: socket.socket) -> int:
    """How many bytes lie ready in the kernel."""
    return int(struct.unpack("i", fcntl.ioctl(sock, termios.FIONREAD, bytes(4)))[0])


def read_all(sock: socket.socket) -> bytes:
    sock.settimeout(60)
    data = b""
    while part := sock.recv(1 << 16):
        data += part
    return data


class Refusing(PlainTarget):
    """Takes without waiting as much as ``plan`` says, over and over."""

    plan: ClassVar[list[int]] = []

    def send_soon(self, data):
        size = self.plan.pop(0) if self.plan else len(data)
        self._socket.sendall(data[:size])
        return data[size:]


def messages():
    texts = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60)
    copy = st.binary(max_size=200).map(lambda data: message(b"d", data))
    extended = st.builds(
        lambda name, sql: (
            message(b"P", name.encode() + b"\0" + sql.encode() + b"\0\0\0")
            + message(b"B", b"\0" + name.encode() + b"\0" + bytes(6))
            + message(b"E", bytes(5))
            + message(b"S")
        ),
        st.sampled_from(["", "s1"]),
        texts,
    )
    return st.lists(st.one_of(texts.map(query), copy, extended, st.just(message(b"H"))), max_size=12)


@settings(max_examples=60, deadline=None)
@given(st.data(), messages())
def test_postgres_upward_is_the_same_by_either_thread(data, sent):
    """However the bytes are cut, and however much the target takes at once."""
    stream = b"".join(sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True) if a < b]
    Refusing.plan = data.draw(st.lists(st.integers(0, 50), max_size=8))
    found = []
    for delivers in (True, False):
        made = Way(delivers=delivers, target=Refusing)
        got: list[bytes] = []
        reading = threading.Thread(target=lambda far, out: out.append(read_all(far)), args=(made.far, got))
        reading.start()
        made.up.start(b"")
        for piece in pieces:
            made.client.bring(piece)
        made.client.end()
        assert made.up.ended(20)
        reading.join(60)
        assert made.up.failure is None
        assert made.up.client_done
        assert made.client.inline == (len(stream) if delivers else 0)
        assert made.up.bytes == len(b"".join(got))
        found.append((b"".join(got), made.log.events))
        made.close()
    # The same events; whether a preparation is told apart hangs on the cuts, which are the same.
    assert found[0] == found[1]
    assert found[0][0] == stream


def test_postgres_upward_waits_for_a_target_in_its_own_thread(way):
    """The reading thread gets away at once, and nothing is lost, when the target does not read."""
    large = query("x" * 4000)
    count = 0
    while unread(way.far) == count * len(large):  # until the socket is full
        way.client.bring(large)
        count = len(way.log.events)
    assert count > 1
    assert read(way.far, count * len(large)) == large * count
    assert way.client.waits(20)


def test_postgres_upward_leaves_large_batches_to_its_own_thread(way):
    large = query("x" * INLINE)
    way.client.bring(large)
    assert way.client.inline == 0
    assert read(way.far, len(large)) == large
    way.client.bring(query("small"))
    assert way.client.inline == len(query("small"))


def test_postgres_upward_leaves_a_full_pipeline_to_its_own_thread(way):
    way.client.bring(query("one"))
    for _ in range(STEPS_LIMIT):
        way.pipeline.push(Step(Kind.SYNC))
    way.client.bring(query("two"))
    assert way.client.inline == len(query("one"))
    assert read(way.far, len(query("one"))) == query("one")


@pytest.mark.parametrize("failure", [PamError("full"), ValueError("a fault")])
def test_postgres_upward_forwards_nothing_that_cannot_be_recorded(way, failure, monkeypatch):
    """The failure is the own thread's: the reading one goes on with other sessions."""
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    way.log.fail = failure
    way.client.bring(query("secret"))
    assert way.up.ended(20)
    assert read_all(way.far) == b""
    assert way.up.failure is (failure if isinstance(failure, PamError) else None)


def test_postgres_upward_ends_at_a_terminate(way):
    way.client.bring(query("one") + message(b"X"))
    assert way.up.ended(20)
    assert way.up.client_done
    assert read_all(way.far) == query("one") + message(b"X")


def test_postgres_upward_refuses_what_is_no_message(way):
    way.client.bring(query("one"))
    way.client.bring(b"\xff" + struct.pack("!I", 4))
    assert way.up.ended(20)
    assert isinstance(way.up.failure, ClientProtocolError)
    assert read_all(way.far) == query("one")


def test_postgres_upward_notices_a_target_that_is_gone(way):
    way.far.close()
    way.client.bring(query("one"))
    assert way.up.ended(20)
    assert way.up.failure is None
