"""The user's stream as a socket: both directions, and what the tunnel's reader must never wait for."""

from __future__ import annotations

import select
import socket
from collections.abc import Callable, Iterator

import pytest

from pam_agent.protocols.ssh.bridge import Bridge
from pam_common.stream import SocketStream


class Delivering(SocketStream):
    """A socket's stream whose ``take`` the test calls, as the thread that reads a tunnel does."""

    take: Callable[[bytes], int]

    def deliver_to(self, take: Callable[[bytes], int], /) -> None:
        self.take = take


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    here, there = socket.socketpair()
    with here, there:
        yield here, there


def read(end: socket.socket, size: int) -> bytes:
    end.settimeout(60)
    data = b""
    while len(data) < size:
        data += end.recv(size - len(data))
    return data


@pytest.fixture
def bridge(ends: tuple[socket.socket, socket.socket]) -> Iterator[tuple[Bridge, Delivering]]:
    stream = Delivering(ends[0])
    made = Bridge(stream, "up")
    made.start()
    ends[1].sendall(b"SSH-")
    assert read(made.far, 4) == b"SSH-"  # so the upward thread is at work
    yield made, stream
    ends[1].shutdown(socket.SHUT_RDWR)
    made.finish()
    made.far.close()


def test_what_the_tunnel_brings_is_passed_on_by_who_brings_it(bridge: tuple[Bridge, Delivering]) -> None:
    made, stream = bridge
    assert stream.take(b"a key") == 5
    assert read(made.far, 5) == b"a key"


def test_what_a_transport_does_not_take_is_left_to_the_other_thread(
    bridge: tuple[Bridge, Delivering], ends: tuple[socket.socket, socket.socket]
) -> None:
    made, stream = bridge
    taken = 0
    while size := stream.take(b"x" * 65536):
        taken += size
    ends[1].sendall(b"y")  # recv's: waits for room
    assert read(made.far, taken + 1) == b"x" * taken + b"y"
    assert stream.take(b"z") == 1


def test_a_transport_that_is_gone_takes_nothing(bridge: tuple[Bridge, Delivering]) -> None:
    made, stream = bridge
    made.far.close()
    assert stream.take(b"lost") == 0


def test_what_the_transport_leaves_unread_is_no_failure(ends: tuple[socket.socket, socket.socket]) -> None:
    """The kernel tells of it by ECONNRESET, after all that was written: the connection ends as any other."""
    made = Bridge(SocketStream(ends[0]), "up")
    made.start()
    ends[1].sendall(b"sent ahead")
    assert select.select([made.far], [], [], 60)[0]
    made.far.sendall(b"goodbye")
    made.far.close()
    made.run()
    assert read(ends[1], 7) == b"goodbye"
    ends[1].shutdown(socket.SHUT_RDWR)
    made.finish()
