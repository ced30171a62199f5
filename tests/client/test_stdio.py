"""A stream joined to two file descriptors, and how that ends."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from pam_client.stdio import Splice
from pam_common.stream import SocketStream


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    here, there = socket.socketpair()
    there.settimeout(60)
    with here, there:
        yield here, there


def test_both_ways_and_their_ends(ends: tuple[socket.socket, socket.socket], tmp_path: Path) -> None:
    here, there = ends
    (tmp_path / "in").write_bytes(b"asked")
    there.sendall(b"answered")
    there.shutdown(socket.SHUT_WR)
    with (tmp_path / "in").open("rb") as source, (tmp_path / "out").open("wb") as sink:
        Splice(SocketStream(here), source.fileno(), sink.fileno()).run()
        assert there.recv(100) == b"asked"
        assert there.recv(100) == b"", "the end of the source is the stream's half-close"
    assert (tmp_path / "out").read_bytes() == b"answered"


def test_when_nobody_reads_any_more_the_stream_is_ended(ends: tuple[socket.socket, socket.socket]) -> None:
    here, there = ends
    unread, sink = os.pipe()
    source, held = os.pipe()
    os.close(unread)
    try:
        there.sendall(b"unread")
        Splice(SocketStream(here), source, sink).run()
        assert there.recv(100) == b""
    finally:
        for end in (source, held, sink):
            os.close(end)
