"""Sockets that are lent to the thread that reads an ssh connection, and what it sends for them."""

from __future__ import annotations

import errno
import hashlib
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pam_common import fast_ssh
from pam_common.errors import TruncatedError, UnavailableError
from pam_common.fast_ssh import outgoing
from pam_common.fast_ssh.lending import MAX_EVENTS, Lending
from pam_common.frames import MAX_DATA
from pam_common.keys import VerifyKeys
from pam_common.secure_channel import SecureChannel, generate_x25519

MIB = 1 << 20
INLINE = 8 << 10


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair()
    with near, far:
        yield near, far


class Lender:
    """Sends on what a socket has to say, as agents and clients do: it is lent while messages are small."""

    def __init__(self, sock: socket.socket, channel: SecureChannel) -> None:
        self.soon = self.own = 0  #: bytes by either thread
        self.error: BaseException | None = None
        self.fail: Exception | None = None
        self.lent = 0
        self._sock, self._channel = sock, channel
        self._left = b""
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            while True:
                self.lent += 1
                data = b""
                if self._channel.lend(self._sock.fileno(), self._ready):
                    data, self._left = self._left, b""
                data = data or self._sock.recv(1 << 17)
                if not data:
                    self._channel.shutdown(socket.SHUT_WR)
                    return
                self._channel.sendall(data)
                self.own += len(data)
        except BaseException as error:  # noqa: BLE001  told by the test
            self.error = error

    def _ready(self) -> bool:
        if self.fail is not None:
            raise self.fail
        try:
            data = self._sock.recv(INLINE, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        if data and self._channel.send_soon(memoryview(data)):
            self.soon += len(data)
            return True
        self._left = data
        return False

    def join(self) -> None:
        self.thread.join(120)
        assert not self.thread.is_alive(), "it hangs"


def read_all(channel: SecureChannel) -> bytes:
    return b"".join(iter(lambda: channel.recv(1 << 17), b""))


def lent(channel: SecureChannel) -> int:
    """How many sockets the reader of the channel's connection waits for."""
    return len(channel._stream.packets._lending._loans)


# -- the channel ---------------------------------------------------------------------------------------


def test_small_messages_are_sent_by_the_reading_thread_alone(secure, pair) -> None:
    near, far = secure()
    lender = Lender(pair[0], far)
    for number in range(200):
        pair[1].sendall(b"%4d" % number)
        assert near.recv(4) == b"%4d" % number
    assert (lender.soon, lender.own, lender.lent) == (800, 0, 1)
    pair[1].shutdown(socket.SHUT_WR)
    assert near.recv(1) == b""
    lender.join()
    assert lender.error is None
    assert lent(far) == 0


def test_what_the_target_says_unasked_comes_at_once(secure, pair, wait_for) -> None:
    """The reader waits for the connection, which is silent: it must not be found out at its next tick."""
    near, far = secure()
    lender = Lender(pair[0], far)
    wait_for(lambda: lent(far))
    time.sleep(0.3)  # it sleeps by now
    began = time.monotonic()
    pair[1].sendall(b"a notice")
    assert near.recv(100) == b"a notice"
    assert time.monotonic() - began < far._stream.packets._tick_seconds / 2
    pair[1].close()
    lender.join()


def test_a_slow_reader_slows_the_writer_and_nothing_is_lost(secure, pair, wait_for) -> None:
    near, far = secure()
    lender = Lender(pair[0], far)
    data = os.urandom(6 * MIB)
    writer = threading.Thread(target=lambda: (pair[1].sendall(data), pair[1].shutdown(socket.SHUT_WR)))
    writer.start()
    wait_for(lambda: lender.soon and not lent(far))  # the window is used up: it waits in its own thread
    assert writer.is_alive()
    got = b""
    while piece := near.recv(50_001):
        got += piece
        if len(got) < MIB:
            time.sleep(0.005)
    assert hashlib.sha256(got).digest() == hashlib.sha256(data).digest()
    lender.join()
    assert lender.error is None
    assert lender.soon


def test_many_sockets_of_one_connection_with_rekeys(secure, join, wait_for) -> None:
    # Above what is under way at once: a peer that sends twice as much before it exchanges keys is cut off.
    both = join.agent.transport.packets, join.client.packets
    for packets in both:
        packets.rekey_bytes = 512 << 10
    ends = []
    for number in range(40):
        near, far = secure()
        mine, program = socket.socketpair()
        ends.append((near, Lender(mine, far), program, bytes([number])))
        wait_for(lambda far=far, count=number + 1: lent(far) == count)
    for size in (1, 100, 3000, *[8000] * 6, 20):
        for near, _, program, byte in ends:
            program.sendall(byte * size)
            near.sendall(b"!")  # a reader that hears something looks whether keys are due
        for near, _, _, byte in ends:
            got = b""
            while len(got) < size:
                got += near.recv(size - len(got))
            assert got == byte * size
    for near, lender, program, _ in ends:
        program.close()
        assert near.recv(1) == b""
        lender.join()
        assert lender.error is None
        assert lender.soon > 3000
    assert lent(far) == 0
    assert all(packets._sealed for packets in both)  # under keys before the present ones


def test_what_several_have_to_say_goes_out_together(secure, pair, wait_for, monkeypatch) -> None:
    (near, far), (near2, far2) = secure(), secure()
    packets = far._stream.packets
    both = [socket.socketpair() for _ in range(2)]
    lenders = [Lender(sock, channel) for (sock, _), channel in zip(both, (far, far2), strict=True)]
    wait_for(lambda: lent(far) == 2)
    # Hold the reader in a round, so that the next one finds both.
    entered, go_on = threading.Event(), threading.Event()

    def hold() -> bool:
        pair[0].recv(1)
        entered.set()
        return go_on.wait(60)

    holder = threading.Thread(target=far.lend, args=(pair[0].fileno(), hold), daemon=True)
    holder.start()
    pair[1].sendall(b"x")
    assert entered.wait(60)
    sent = []
    write = packets._write
    monkeypatch.setattr(
        packets, "_write", lambda data, **how: (sent.append(len(data)), write(data, **how))[1]
    )
    for _, program in both:
        program.sendall(b"together")
    go_on.set()
    assert near.recv(8) == near2.recv(8) == b"together"
    assert len(sent) == 1
    assert [lender.soon for lender in lenders] == [8, 8]
    for _, program in both:
        program.close()
    for lender in lenders:
        lender.join()


def test_what_ready_raises_is_raised_by_the_own_thread_and_disturbs_nobody(secure, pair, wait_for) -> None:
    near, far = secure()
    near2, far2 = secure()
    lender, (sock, program) = Lender(pair[0], far), socket.socketpair()
    other = Lender(sock, far2)
    wait_for(lambda: lent(far) == 2)
    lender.fail = ValueError("a fault")
    pair[1].sendall(b"x")
    lender.join()
    assert lender.error is lender.fail
    program.sendall(b"well")
    assert near2.recv(4) == b"well"
    program.close()
    other.join()
    near.close()


@pytest.mark.parametrize("which", ["client", "agent"])
def test_the_connections_end_gives_the_socket_back(secure, pair, join, wait_for, which: str) -> None:
    near, far = secure()
    channel, transport = (near, join.client) if which == "client" else (far, join.agent.transport)
    lender = Lender(pair[0], channel)
    wait_for(lambda: lent(channel) == 1)
    transport.close()
    transport.join(60)
    pair[1].sendall(b"too late")
    lender.join()
    assert isinstance(lender.error, OSError)
    assert not channel.lend(pair[0].fileno(), lambda: True)
    assert not channel.send_soon(memoryview(b"x"))


def test_the_end_of_a_socket_is_told_once(pair) -> None:
    """A socket at its end can be read for ever: the reader must not be woken for it again and again."""
    rounds, calls = [], []
    lending = Lending(pair[0], lambda: rounds.append(1))
    sock, far = socket.socketpair()

    def ready() -> bool:
        calls.append(1)
        return False

    for count in (1, 2):  # what was given back can be lent again
        thread = threading.Thread(target=lending.lend, args=(sock.fileno(), ready))
        thread.start()
        far.close()
        until = time.monotonic() + 60
        while len(calls) < count:
            assert time.monotonic() < until
            assert not lending.wait(0.05)
        thread.join(60)
    rounds.clear()
    assert not lending.wait(0.05)
    assert len(rounds) == 1
    lending.close()
    sock.close()


def test_the_reader_looks_at_the_clock_while_what_is_lent_talks(secure, pair) -> None:
    """So that a peer that is silent meanwhile is found out."""
    near, far = secure()
    packets = far._stream.packets
    packets._tick_seconds = 0.05
    ticks = []
    tick = packets._tick
    packets._tick = lambda: (ticks.append(1), tick())
    lender = Lender(pair[0], far)
    stop = time.monotonic() + 60
    taking = threading.Thread(target=near.deliver_to, args=(len,))
    taking.start()
    reading = threading.Thread(target=read_all, args=(near,), daemon=True)
    reading.start()
    count = 0
    while len(ticks) < 3 or count < 200:
        assert time.monotonic() < stop
        pair[1].sendall(b"x")
        count += 1
        time.sleep(0.001)
    pair[1].close()
    lender.join()


# -- when it cannot go at once -------------------------------------------------------------------------


def test_it_does_not_go_without_room_in_the_window(secure) -> None:
    near, far = secure()
    stream = far._stream
    with stream._lock:
        room, stream._window = stream._window, 100
    assert far.send_soon(memoryview(bytes(50)))
    assert not far.send_soon(memoryview(bytes(50)))
    with stream._lock:
        stream._window = room
    assert far.send_soon(memoryview(b"again"))
    stream.flush()
    assert near.recv(50) + near.recv(5) == bytes(50) + b"again"


def _crowd(far: SecureChannel) -> None:
    far._stream.packets.queued += outgoing.BATCH


def _fill(far: SecureChannel) -> None:
    far._stream.packets._unsent = memoryview(b"x")


def _exchange(far: SecureChannel) -> None:
    far._stream.packets._open.clear()


def _end(far: SecureChannel) -> None:
    far.shutdown(socket.SHUT_WR)


def _close(far: SecureChannel) -> None:
    far._stream.abort()


def _turn(far: SecureChannel) -> None:
    far._turn.__enter__()


def _wait_for_turn(far: SecureChannel) -> None:
    far._turn.waiting.acquire()


@pytest.mark.parametrize("why", [_crowd, _fill, _exchange, _end, _close, _turn, _wait_for_turn])
def test_it_does_not_go_while_others_come_first(secure, why: Callable[[SecureChannel], None]) -> None:
    _near, far = secure()
    sealed = far._writer.sent
    why(far)
    assert not far.send_soon(memoryview(b"x"))
    assert far._writer.sent == sealed  # nothing was sealed that is not sent


def test_more_than_a_frame_is_for_the_own_thread(secure) -> None:
    near, far = secure()
    assert not far.send_soon(memoryview(bytes(MAX_DATA + 1)))
    assert far.send_soon(memoryview(bytes(MAX_DATA)))
    far._stream.flush()
    far.shutdown(socket.SHUT_WR)
    assert len(read_all(near)) == MAX_DATA


def test_without_a_reading_thread_nothing_is_lent(pair) -> None:
    accepted: list[Any] = []
    statics = generate_x25519(), generate_x25519()

    class Plain:
        def __init__(self, sock: socket.socket) -> None:
            self.recv, self.sendall, self.abort = sock.recv, sock.sendall, sock.close

    thread = threading.Thread(
        target=lambda: accepted.append(
            SecureChannel.accept(Plain(pair[1]), gateway="g", static=statics[1], statement=b"s")
        )
    )
    thread.start()
    channel = SecureChannel.connect(
        Plain(pair[0]), gateway="g", static=statics[0], check_agent=lambda *_: None, grant=b"g"
    )
    thread.join(60)
    assert not channel.lend(pair[0].fileno(), lambda: True)
    assert not channel.send_soon(memoryview(b"x"))


# -- the rounds ----------------------------------------------------------------------------------------


def test_a_system_that_watches_no_more_lends_nothing(pair, tmp_path) -> None:
    lending = Lending(pair[0], lambda: None)
    with (tmp_path / "file").open("w") as file:  # epoll takes no files
        assert not lending.lend(file.fileno(), lambda: True)
    assert not lending._loans
    lending.close()
    assert not lending.lend(pair[0].fileno(), lambda: True)


def test_silence_is_told_after_the_seconds_asked_for(pair) -> None:
    flushed = []
    lending = Lending(pair[0], lambda: flushed.append(1))
    assert not lending.wait(0.05)
    pair[1].sendall(b"x")
    assert lending.wait(60)
    assert len(flushed) == 2
    lending.close()


def test_more_sockets_than_a_round_looks_at_are_all_served(pair) -> None:
    rounds = []
    lending = Lending(pair[0], lambda: rounds.append(len(served)))
    served: set[int] = set()
    others = [socket.socketpair() for _ in range(MAX_EVENTS + 10)]
    threads = []
    for sock, far in others:
        far.sendall(b"x")

        def ready(sock: socket.socket = sock) -> bool:
            served.add(sock.fileno())
            return False

        threads.append(threading.Thread(target=lending.lend, args=(sock.fileno(), ready)))
        threads[-1].start()
    until = time.monotonic() + 60
    while len(lending._loans) < len(others):
        assert time.monotonic() < until
        time.sleep(0.005)
    assert not lending.wait(0.05)
    assert rounds[:3] == [0, MAX_EVENTS, len(others)]
    for thread in threads:
        thread.join(60)
    lending.close()
    for sock, far in others:
        sock.close()
        far.close()


def test_closing_gives_everything_back(pair) -> None:
    lending = Lending(pair[0], lambda: None)
    others = [socket.socketpair() for _ in range(5)]
    back = []
    threads = [
        threading.Thread(target=lambda sock=sock: back.append(lending.lend(sock.fileno(), lambda: True)))
        for sock, _ in others
    ]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 60
    while len(lending._loans) < 5:
        assert time.monotonic() < until
        time.sleep(0.005)
    lending.close()
    lending.close()
    for thread in threads:
        thread.join(60)
    assert back == [True] * 5
    for sock, far in others:
        sock.close()
        far.close()


def test_an_end_is_a_cut_for_the_other_side(secure, pair) -> None:
    near, far = secure()
    lender = Lender(pair[0], far)
    pair[1].sendall(b"before")
    assert near.recv(10) == b"before"
    far.abort()
    pair[1].sendall(b"after")
    lender.join()
    assert isinstance(lender.error, OSError)
    with pytest.raises(TruncatedError):
        near.recv(10)


def test_without_descriptors_nothing_is_left_open(pair, monkeypatch) -> None:
    def none_left() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(select, "epoll", none_left)
    with pytest.raises(UnavailableError, match="no room for one more connection: Too many open files"):
        fast_ssh.connect(
            pair[0],
            name="x",
            host_ca=VerifyKeys([]),
            hostname="r1",
            login=None,  # type: ignore[arg-type]
        )
    assert pair[0].fileno() == -1
