"""Target → client: what the reading thread does by itself equals what the own thread does, byte for byte."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import struct
import tempfile
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pam_agent.protocols.base import TargetProtocolError
from pam_agent.protocols.postgres.codec import message
from pam_agent.protocols.postgres.downward import INLINE, LONG, SMALL_READS, Downward
from pam_agent.protocols.postgres.pipeline import Kind, Pipeline, Step
from pam_agent.protocols.postgres.target_side import TargetSide
from pam_agent.target_tls import PlainTarget, TlsTarget
from pam_common.errors import PamError, TruncatedError

READY = message(b"Z", b"I")


def answer(text: str) -> bytes:
    """What a server says to ``select 'text'``."""
    value = text.encode()
    columns = struct.pack("!H", 1) + b"t\0" + struct.pack("!IHIhih", 0, 0, 25, -1, -1, 0)
    row = struct.pack("!Hi", 1, len(value)) + value
    return message(b"T", columns) + message(b"D", row) + message(b"C", b"SELECT 1\0") + READY


class Lending:
    """A client's stream with a thread that reads it, and waits for the target as well."""

    def __init__(self, *, lends: bool = True) -> None:
        self.got = bytearray()
        self.soon = self.own = self.loans = 0
        self.plan: list[bool] = []  #: whether it goes at once; then always
        self.gone: Exception | None = None
        self._lends = lends

    def lend(self, fd: int, ready) -> bool:
        if not self._lends:
            return False
        self.loans += 1
        error: list[BaseException] = []

        def read() -> None:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            try:
                while True:
                    assert poll.poll(30_000), "the socket says nothing"
                    if not ready():
                        return
            except Exception as raised:  # noqa: BLE001  raised where it was lent
                error.append(raised)

        thread = threading.Thread(target=read)
        thread.start()
        thread.join(60)
        if error:
            raise error[0]
        return True

    def send_soon(self, data: memoryview) -> bool:
        if self.plan and not self.plan.pop(0):
            return False
        self.soon += len(data)
        self.got += data
        return True

    def sendall(self, data) -> None:
        if self.gone is not None:
            raise self.gone
        self.own += len(data)
        self.got += data

    def recv(self, size: int) -> bytes:
        raise AssertionError("the other direction")

    def shutdown(self, how: int) -> None:
        raise AssertionError("not ours to end")

    def abort(self) -> None: ...

    close = abort


class Log:
    """A conversation that keeps what is recorded; ``fail`` makes it a full disk."""

    def __init__(self) -> None:
        self.events: list = []
        self.fail: Exception | None = None
        self.busy = 0.0  #: seconds of CPU that it takes

    def record(self, events) -> None:
        end = time.thread_time() + self.busy
        while time.thread_time() < end:
            pass
        if self.fail is not None:
            raise self.fail
        self.events += events

    def touch(self) -> None:
        """No idle limit."""


class Way:
    """A Downward between a socket and a Lending, in a thread of its own; 1000 queries wait for answers."""

    def __init__(self, *, lends: bool = True, target=PlainTarget) -> None:
        near, self.far = socket.socketpair()
        self.client = Lending(lends=lends)
        self.log = Log()
        pipeline = Pipeline()
        for number in range(1000):
            pipeline.push(Step(Kind.QUERY, query=number))
        side = TargetSide(pipeline, 1 << 20, lambda: 0.0)
        self.near = near
        self.down = Downward(self.client, target(near), self.log, side)
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self, early: bytes = b"") -> Way:
        self._early = early
        self._thread.start()
        return self

    def _run(self) -> None:
        try:
            self.down.carry(self._early)
        except Exception as error:  # noqa: BLE001  told by the test
            self.error = error

    def until(self, size: int) -> None:
        end = time.monotonic() + 60
        while len(self.client.got) < size:
            assert time.monotonic() < end, f"it did not come: {self.error!r}"
            time.sleep(0.001)

    def end(self) -> None:
        self.far.close()
        self.join()

    def join(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive(), "it hangs"
        self.near.close()
        self.far.close()


@pytest.fixture
def way():
    made = Way()
    yield made
    if made.down.client_gone or made.error is not None:
        made.far.close()
    made.join()


@settings(max_examples=40, deadline=None)
@given(st.data(), st.lists(st.text(max_size=3000), min_size=1, max_size=12))
def test_postgres_downward_is_the_same_by_either_thread(data, texts):
    """However the bytes are cut, and whatever the client's connection takes at once."""
    stream = b"".join(map(answer, texts))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True) if a < b]
    plan = data.draw(st.lists(st.booleans(), max_size=12))
    found = []
    for lends in (True, False):
        made = Way(lends=lends)
        made.client.plan = list(plan)
        made.start(pieces[0])
        sent = 0
        for piece in pieces[1:]:
            made.far.sendall(piece)
            sent += len(piece)
            end = time.monotonic() + 60
            while made.down._kept + made.down.bytes < sent + len(pieces[0]):  # one piece in each read
                assert time.monotonic() < end
                time.sleep(0.0005)
        made.far.close()
        made.join()
        assert made.error is None
        assert not made.down.client_gone
        assert made.down.at_boundary
        assert made.down.bytes == len(stream)
        found.append((bytes(made.client.got), made.log.events))
    assert found[0] == found[1]
    assert found[0][0] == stream


def test_postgres_downward_is_done_by_the_reading_thread(way):
    way.start(answer("early"))
    count = len(answer("early"))
    for number in range(50):
        way.far.sendall(answer(str(number)))
        count += len(answer(str(number)))
        way.until(count)
    assert way.client.own == len(answer("early"))
    assert way.client.loans == 1
    way.far.close()


def test_postgres_downward_goes_back_to_its_own_thread_for_what_is_large(way):
    way.start()
    large, small = answer("x" * 500_000), answer("y")
    way.far.sendall(large)
    way.until(len(large))
    assert way.client.soon <= INLINE
    for number in range(SMALL_READS):
        way.far.sendall(small)
        way.until(len(large) + (number + 1) * len(small))
    assert way.client.soon <= INLINE  # not lent before messages are small again
    end = time.monotonic() + 60
    while way.client.loans < 2:
        assert time.monotonic() < end
        time.sleep(0.001)
    soon = way.client.soon
    way.far.sendall(small)
    way.until(len(large) + (SMALL_READS + 1) * len(small))
    assert way.client.soon == soon + len(small)
    way.far.close()


def test_postgres_downward_sends_by_itself_what_does_not_go_at_once(way):
    way.client.plan = [True, False]
    way.start()
    whole = b""
    for number in range(4):
        whole += answer(str(number))
        way.far.sendall(answer(str(number)))
        way.until(len(whole))
    assert way.client.got == whole
    assert way.client.soon == len(answer("0"))
    way.far.close()


@pytest.mark.parametrize("failure", [PamError("full"), ValueError("a fault")])
def test_postgres_downward_forwards_nothing_that_cannot_be_recorded(way, failure):
    """The failure is the own thread's: the reading one goes on with other sessions."""
    way.start()
    way.log.fail = failure
    way.far.sendall(answer("secret"))
    way.join()
    assert way.error is failure
    assert way.client.got == b""


def test_postgres_downward_refuses_what_is_no_message(way):
    way.start()
    way.far.sendall(answer("one"))
    way.until(len(answer("one")))
    way.far.sendall(b"\xff" + struct.pack("!I", 4))
    way.join()
    assert isinstance(way.error, TargetProtocolError)
    assert way.client.got == answer("one")


def test_postgres_downward_passes_a_last_word_on_before_the_end(way):
    way.start()
    way.far.sendall(answer("last"))
    way.far.close()
    way.join()
    assert way.error is None
    assert way.client.got == answer("last")


def test_postgres_downward_ends_with_a_target_that_was_cut(way):
    way.start(answer("one"))
    way.until(len(answer("one")))
    way.down._target.abort()
    way.join()
    assert (way.error, way.down.client_gone) == (None, False)


@pytest.mark.parametrize("gone", [ConnectionResetError("cut"), TruncatedError("cut")])
def test_postgres_downward_notices_a_client_that_is_gone(way, gone):
    way.client.plan, way.client.gone = [False], gone
    way.start()
    way.far.sendall(answer("one"))
    way.join()
    assert way.down.client_gone
    assert way.down.bytes == 0


def test_postgres_downward_is_called_for_nothing(way):
    way.start()
    end = time.monotonic() + 60
    while not way.client.loans:
        assert time.monotonic() < end
        time.sleep(0.001)
    assert way.down._ready()
    way.far.sendall(answer("one"))
    way.until(len(answer("one")))
    way.far.close()


def test_postgres_downward_leaves_what_takes_long_to_its_own_thread(way):
    """A hostile target can make few bytes costly: others need not wait for each of its batches."""
    way.start()
    way.log.busy = 2 * LONG
    way.far.sendall(answer("one"))
    way.until(len(answer("one")))
    way.log.busy = 0.0
    for number in range(SMALL_READS):
        way.far.sendall(answer("two"))
        way.until(len(answer("one")) + (number + 1) * len(answer("two")))
    assert way.client.soon == len(answer("one"))
    assert way.client.own == SMALL_READS * len(answer("two"))
    way.far.close()


@pytest.mark.parametrize("fault", ["no message", "disk"])
@pytest.mark.parametrize("lends", [True, False])
def test_postgres_downward_knows_that_the_client_has_half_a_message(lends, fault):
    """Its end was looked at and not sent on: what is told now would be read as a part of it."""
    made = Way(lends=lends).start()
    row = answer("x" * 100)
    made.far.sendall(row[:60])
    made.until(60)
    assert not made.down.at_boundary
    if fault == "disk":
        made.log.fail = PamError("full")
    made.far.sendall(row[60:] + (b"\xff\0\0\0\4" if fault == "no message" else b""))
    made.join()
    assert isinstance(made.error, PamError)
    assert made.client.got == row[:60]
    assert not made.down.at_boundary


class Unread(PlainTarget):
    """As TLS: has more than the socket tells of."""

    pending = True


def test_postgres_downward_lends_no_target_that_has_more():
    made = Way(target=Unread).start()
    made.far.sendall(answer("one"))
    made.until(len(answer("one")))
    made.end()
    assert made.client.loans == 0
    assert made.client.got == answer("one")


class TlsServer:
    """The far end of a socket as a TLS server that speaks when it is told to."""

    def __init__(self, sock: socket.socket, authority, tickets: int = 2) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.num_tickets = tickets
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "pem")
            path.write_text("".join(authority.issue("db.test")))
            context.load_cert_chain(path)
        self._sock = sock
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_side=True)
        self._thread = threading.Thread(target=self._shake)
        self._thread.start()

    def _shake(self) -> None:
        while True:
            try:
                self._tls.do_handshake()
                return
            except ssl.SSLWantReadError:
                self._sock.sendall(self._out.read())
                self._in.write(self._sock.recv(65536))

    def say(self, *words: bytes, ends: bool = False) -> None:
        """All in one send, what the handshake left to say before it; ``ends`` by close_notify, not of TCP."""
        self._thread.join(60)
        for word in words:
            self._tls.write(word)
        if ends:
            with contextlib.suppress(ssl.SSLError):
                self._tls.unwrap()
        self._sock.sendall(self._out.read())


def tls_target(sock: socket.socket) -> TlsTarget:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return TlsTarget(sock, context, "db.test")


@pytest.fixture
def server(authority):
    """What the TLS server says next."""
    made: list[TlsServer] = []

    def start(sock: socket.socket, **how) -> TlsServer:
        made.append(TlsServer(sock, authority, **how))
        return made[-1]

    return start


@pytest.mark.parametrize("lends", [True, False])
def test_postgres_downward_hears_of_an_end_of_tls_behind_the_last_words(server, lends):
    """TCP stays open, so the socket says nothing of it."""
    talking: list[TlsServer] = []

    def target(sock: socket.socket) -> TlsTarget:
        talking.append(server(made_far[0]))
        return tls_target(sock)

    near, far = socket.socketpair()
    made_far = [far]
    made = Way(lends=lends, target=lambda _sock: target(near)).start()
    talking[0].say(answer("last"), ends=True)
    made.join()
    assert made.error is None
    assert made.client.got == answer("last")
    near.close()
    far.close()


def test_postgres_downward_looks_once_at_records_that_hold_nothing(server):
    near, far = socket.socketpair()
    talking = server(far, tickets=1000)
    target = tls_target(near)
    threading.Thread(target=talking.say, args=(b"at last",)).start()
    poll, view, calls = select.poll(), memoryview(bytearray(100)), 0
    poll.register(near, select.POLLIN)
    fills = []
    fill = target._fill
    target._fill = lambda flags=0: (fills.append(1), fill(flags))
    got = None
    while got is None:
        assert poll.poll(60_000)
        got = target.recv_soon(view)
        calls += 1
        assert len(fills) <= calls
    assert view[:got] == b"at last"
    assert calls > 1
    near.close()
    far.close()
