"""Local connections: half-close, order of a refusal, bounds, and how a listener stops."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lending import LendingSocket

from pam_client import carry, listener
from pam_client.launch import POSTGRES
from pam_client.listener import Listener, listen_unix
from pam_client.refusal import error_response
from pam_common.errors import PamError, RefusedError, TruncatedError
from pam_common.stream import Data

SSL = bytes.fromhex("0000000804d2162f")
STARTUP = bytes.fromhex("0000000d00030000") + b"user\0"


class Channel(LendingSocket):
    """The near end of a channel; ``error`` is raised where a SecureChannel would learn of it."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self.error: PamError | None = None
        self.recv = self._recv  # type: ignore[assignment]  # bound once, as the parent does

    def _recv(self, size: int) -> bytes:
        data = self.socket.recv(size)
        if not data and self.error is not None:
            raise self.error
        return data


class Local:
    """A listener whose channels end in ``far`` sockets that the test holds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.said: list[str] = []
        self.far_ends = 0
        self.prepare: Callable[[Channel], None] = lambda _channel: None
        self.channels: list[Channel] = []
        self.far: list[socket.socket] = []
        self.refuse_dial: PamError | None = None
        self.dialled = threading.Semaphore(0)
        self.listener = Listener(
            [listen_unix(path)],
            dial=self.dial,
            launch=POSTGRES,
            observer=self,
            session="s-x",
        )
        self.listener.start()

    def report(self, message: str, hint: str) -> None:
        self.said.append(message)

    def far_end(self) -> None:
        self.far_ends += 1

    def dial(self) -> Channel:
        if self.refuse_dial is not None:
            raise self.refuse_dial
        near, far = socket.socketpair()
        far.settimeout(60)
        self.channels.append(Channel(near))
        self.prepare(self.channels[-1])
        self.far.append(far)
        self.dialled.release()
        return self.channels[-1]

    def program(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(60)
        sock.connect(str(self.path))
        return sock


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Local]:
    tmp_path.chmod(0o700)
    made = Local(tmp_path / "s")
    yield made
    made.listener.stop(1)
    for far in made.far:
        far.close()


def read_all(sock: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := sock.recv(65536):
            data += piece
    return data


def test_half_close_each_way(local: Local) -> None:
    with local.program() as program:
        program.sendall(STARTUP)
        program.shutdown(socket.SHUT_WR)
        assert local.dialled.acquire(timeout=60)
        assert read_all(local.far[0]) == STARTUP  # the end went up …
        local.far[0].sendall(b"late answer")
        local.far[0].shutdown(socket.SHUT_WR)
        assert read_all(program) == b"late answer"  # … and the other direction lived on
    assert (local.said, local.far_ends) == ([], 0)


def test_an_end_that_cannot_go_up_does_not_cut_what_comes_down(local: Local) -> None:
    """The agent said its last words and closed: our half-close fails, those words must still arrive."""
    tried = threading.Event()

    def shutdown(_how: int) -> None:
        tried.set()
        raise BrokenPipeError

    def prepare(channel: Channel) -> None:
        channel.shutdown = shutdown  # type: ignore[method-assign]  # the far side no longer takes it

    local.prepare = prepare
    with local.program() as program:
        program.sendall(STARTUP)
        program.shutdown(socket.SHUT_WR)
        assert tried.wait(60)
        local.far[0].sendall(b"last words")
        local.far[0].shutdown(socket.SHUT_WR)
        assert read_all(program) == b"last words"
    assert local.said == []


def test_what_is_small_is_sent_on_loan(local: Local, wait_for: Callable[..., None]) -> None:
    """To the thread that reads, once the far side has answered, so that no refusal can come; what is large is
    sent by the connection's own."""
    with local.program() as program:
        program.sendall(STARTUP)
        assert local.dialled.acquire(timeout=60)
        channel, far = local.channels[0], local.far[0]

        def carry_up(data: bytes) -> None:
            sending = threading.Thread(target=program.sendall, args=(data,))
            sending.start()
            got = b""
            while len(got) < len(data):
                got += far.recv(len(data) - len(got))
            assert got == data
            sending.join()

        assert far.recv(len(STARTUP), socket.MSG_WAITALL) == STARTUP
        carry_up(b"not yet")
        assert channel.loans == 0
        far.sendall(b"welcome")
        assert program.recv(7, socket.MSG_WAITALL) == b"welcome"
        carry_up(b"wakes it")  # who waits in recv does not know yet
        for number in range(3):
            wait_for(lambda: channel.loans == 1)
            carry_up(b"query %d" % number)
        soon = channel.soon
        assert soon == 3 * len(b"query 0")
        carry_up(bytes(500_000))
        assert channel.soon <= soon + carry.INLINE
        for number in range(carry.SMALL_READS):
            assert channel.loans == 1
            carry_up(b"small %02d" % number)
        wait_for(lambda: channel.loans == 2)
        program.shutdown(socket.SHUT_WR)
        assert read_all(far) == b""
    assert local.said == []


def test_a_program_that_is_killed_while_it_is_lent_is_not_the_relays_fault(
    local: Local, wait_for: Callable[..., None]
) -> None:
    with local.program() as program:
        program.sendall(STARTUP)
        assert local.dialled.acquire(timeout=60)
        local.far[0].sendall(b"welcome")
        assert program.recv(7, socket.MSG_WAITALL) == b"welcome"
        program.sendall(b"query")
        wait_for(lambda: local.channels[0].loans)
        local.far[0].sendall(b"an answer that is not read")
    local.far[0].shutdown(socket.SHUT_WR)
    read_all(local.far[0])  # the end comes up
    assert local.said == []


def test_far_end_is_told(local: Local) -> None:
    with local.program() as program:
        program.sendall(STARTUP)
        assert local.dialled.acquire(timeout=60)
        local.far[0].shutdown(socket.SHUT_WR)
        assert read_all(program) == b""
        assert local.far_ends == 1


def test_stop_ends_connections_cleanly(local: Local) -> None:
    with local.program() as program:
        program.sendall(STARTUP)
        assert local.dialled.acquire(timeout=60)
        assert local.far[0].recv(100) == STARTUP

        def agent() -> None:
            read_all(local.far[0])
            local.far[0].sendall(b"bye")
            local.far[0].shutdown(socket.SHUT_WR)

        threading.Thread(target=agent, daemon=True).start()
        local.listener.stop(10)
        assert read_all(program) == b"bye"
    assert local.listener.count() == 0


def test_stop_cuts_what_does_not_end(local: Local, wait_for: Callable[..., None]) -> None:
    with local.program() as program:
        program.sendall(STARTUP)
        assert local.dialled.acquire(timeout=60)
        local.listener.stop(0.1)
        assert read_all(program) == b""
    wait_for(lambda: local.listener.count() == 0)


def test_dial_refused(local: Local) -> None:
    local.refuse_dial = RefusedError("no agent", hint="wait")
    with local.program() as program:
        program.sendall(SSL)
        assert program.recv(1) == b"N"
        program.sendall(STARTUP)
        assert read_all(program) == error_response("no agent", "wait")
    assert local.said == ["no agent"]


@pytest.mark.parametrize("ssl_first", [True, False])
def test_agent_refuses_before_it_said_anything(local: Local, ssl_first: bool) -> None:
    with local.program() as program:
        program.sendall(SSL if ssl_first else STARTUP)
        assert local.dialled.acquire(timeout=60)
        local.far[0].recv(100)
        local.channels[0].error = RefusedError("killed")
        local.far[0].shutdown(socket.SHUT_WR)
        if ssl_first:
            assert program.recv(1) == b"N"
            program.sendall(STARTUP)
        assert read_all(program) == error_response("killed")
    assert local.said == ["killed"]


def test_agent_refuses_later(local: Local) -> None:
    """In the middle of a conversation there is no form for it: the program sees an end, the person why."""
    with local.program() as program:
        program.sendall(STARTUP)
        assert local.dialled.acquire(timeout=60)
        local.far[0].recv(100)
        local.far[0].sendall(b"R")
        assert program.recv(1) == b"R"
        local.channels[0].error = RefusedError("killed by root")
        local.far[0].shutdown(socket.SHUT_WR)
        assert read_all(program) == b""
    assert local.said == ["killed by root"]


def test_cut_is_not_a_clean_end(local: Local) -> None:
    with local.program() as program:
        program.sendall(STARTUP)
        assert local.dialled.acquire(timeout=60)
        local.channels[0].error = TruncatedError("cut")
        local.far[0].shutdown(socket.SHUT_WR)
        assert read_all(program) == b""
    assert local.said == ["the connection through the relay was lost"]


def test_killed_program_is_not_the_relays_fault(local: Local, wait_for: Callable[..., None]) -> None:
    with local.program() as program:
        program.sendall(STARTUP)
        assert local.dialled.acquire(timeout=60)
        local.far[0].recv(100)
        local.far[0].sendall(b"unread")
    # Closed with bytes unread: a reset.
    wait_for(lambda: local.listener.count() == 0)
    assert local.said == []


def test_no_thread_for_what_goes_up_ends_the_connection_and_its_channel(
    local: Local, monkeypatch: Any
) -> None:
    start = threading.Thread.start

    def none_left(thread: threading.Thread) -> None:
        if thread.name.endswith("-up"):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", none_left)
    with local.program() as program:
        program.sendall(SSL)
        assert program.recv(1) == b"N"
        program.sendall(STARTUP)
        assert read_all(program) == error_response("no thread is left for another connection")
        assert local.far[0].recv(1) == b""
    assert local.said == ["no thread is left for another connection"]


def test_agent_refuses_while_the_program_sends(local: Local) -> None:
    """The send fails before the reason was read: the program hears the reason all the same."""
    failed = threading.Event()

    def recv(_size: int) -> bytes:
        assert failed.wait(60)
        raise RefusedError("killed")

    def sendall(_data: Data) -> None:
        failed.set()
        raise BrokenPipeError

    def prepare(channel: Channel) -> None:
        channel.recv, channel.sendall = recv, sendall  # type: ignore[assignment]  # bound once, as above

    local.prepare = prepare
    with local.program() as program:
        program.sendall(SSL)
        assert program.recv(1) == b"N"
        program.sendall(STARTUP)
        assert read_all(program) == error_response("killed")


def test_program_that_never_hears_a_refusal_is_let_go(local: Local, monkeypatch: Any, wait_for: Any) -> None:
    monkeypatch.setattr(carry, "REFUSAL_TIMEOUT", 0.1)
    local.refuse_dial = RefusedError("no")
    with local.program() as program:
        program.sendall(SSL)
        wait_for(lambda: local.said)
        wait_for(lambda: local.listener.count() == 0)


def test_silent_program_costs_nothing_for_long(local: Local, monkeypatch: Any, wait_for: Any) -> None:
    """Abuse case 20: a stalled start; it dials nothing and is dropped."""
    monkeypatch.setattr(carry, "HEAD_TIMEOUT", 0.1)
    with local.program() as program:
        program.sendall(STARTUP[:4])
        assert read_all(program) == b""
    wait_for(lambda: local.listener.count() == 0)
    assert local.channels == []


def test_connections_are_bounded(tmp_path: Path, monkeypatch: Any, wait_for: Callable[..., None]) -> None:
    """Abuse case 29: beyond the cap new ones wait in the kernel's queue, and are served later."""
    tmp_path.chmod(0o700)
    monkeypatch.setattr(listener, "MAX_CONNECTIONS", 2)
    local = Local(tmp_path / "capped")
    try:
        programs = [local.program() for _ in range(3)]
        for number, program in enumerate(programs[:2], 1):
            program.sendall(STARTUP)
            wait_for(lambda number=number: len(local.far) == number)  # in the order of the programs
        programs[2].sendall(STARTUP)
        wait_for(lambda: any("2 local connections are open" in text for text in local.said))
        assert len(local.channels) == 2
        programs[0].close()
        local.far[0].close()
        wait_for(lambda: len(local.channels) == 3)
        for program in programs:
            program.close()
    finally:
        local.listener.stop(0.1)
        for far in local.far:
            far.close()


class TestUnixSocket:
    def test_mode_and_folder(self, tmp_path: Path) -> None:
        path = tmp_path / "new" / "s"
        with listen_unix(path):
            assert path.stat().st_mode & 0o777 == 0o600
            assert path.parent.stat().st_mode & 0o777 == 0o700

    def test_left_over_file_is_replaced(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o700)
        listen_unix(tmp_path / "s").close()
        listen_unix(tmp_path / "s").close()

    def test_live_one_is_not(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o700)
        with listen_unix(tmp_path / "s"), pytest.raises(PamError, match="is in use"):
            listen_unix(tmp_path / "s")

    def test_other_files_are_left_alone(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o700)
        (tmp_path / "s").write_text("mine")
        with pytest.raises(PamError, match="is not a socket"):
            listen_unix(tmp_path / "s")
        assert (tmp_path / "s").read_text() == "mine"

    def test_too_long(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o700)
        with pytest.raises(PamError, match="cannot listen on"):
            listen_unix(tmp_path / ("x" * 120))
