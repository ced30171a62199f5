"""stdin and stdout joined to a stream; what another thread brings is written there if that cannot wait."""

from __future__ import annotations

import contextlib
import os
import queue
import select
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pam_client.stdio import Splice


class Delivering:
    """A stream that gives its ``take`` to the test; ``recv`` returns what is put, ``b""`` ends it."""

    def __init__(self) -> None:
        self.coming: queue.Queue[bytes] = queue.Queue()
        self.take: Callable[[bytes], int] | None = None
        self.sent = b""
        self.aborted = False

    def deliver_to(self, take: Callable[[bytes], int]) -> None:
        self.take = take

    def recv(self, size: int) -> bytes:
        return self.coming.get(timeout=60)

    def sendall(self, data: bytes) -> None:
        self.sent += bytes(data)

    def shutdown(self, how: int) -> None: ...

    def close(self) -> None: ...

    def abort(self) -> None:
        self.aborted = True


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        with contextlib.suppress(OSError):
            os.close(end)


@pytest.fixture
def source() -> Iterator[int]:
    with Path(os.devnull).open("rb") as nothing:
        yield nothing.fileno()


def joined(source: int, sink: int) -> Delivering:
    """A stream whose splice has begun, and ended: what it gave to the stream stays."""
    stream = Delivering()
    stream.coming.put(b"")
    Splice(stream, source, sink).run()
    return stream


def test_what_a_pipe_has_room_for_is_written_by_who_brings_it(pipe: tuple[int, int], source: int) -> None:
    take = joined(source, pipe[1]).take
    assert take is not None
    assert take(b"a key") == 5
    assert os.read(pipe[0], 100) == b"a key"


def test_nobody_waits_for_a_pipe_that_is_full(pipe: tuple[int, int], source: int) -> None:
    take = joined(source, pipe[1]).take
    assert take is not None
    while take(b"x" * select.PIPE_BUF):
        pass
    assert take(b"x") == 0, "and not a byte more"
    os.read(pipe[0], 1 << 20)
    assert take(b"x") == 1


def test_what_a_pipe_might_take_in_parts_is_left_to_the_other_thread(
    pipe: tuple[int, int], source: int
) -> None:
    take = joined(source, pipe[1]).take
    assert take is not None
    assert take(b"x" * (select.PIPE_BUF + 1)) == 0


def test_a_file_is_written_by_the_thread_that_may_wait(tmp_path: Path, source: int) -> None:
    stream = Delivering()
    stream.coming.put(b"all of it")
    stream.coming.put(b"")
    with (tmp_path / "out").open("wb") as sink:
        Splice(stream, source, sink.fileno()).run()
    assert stream.take is None
    assert (tmp_path / "out").read_bytes() == b"all of it"


def test_when_nobody_reads_any_more_the_stream_is_ended(pipe: tuple[int, int], source: int) -> None:
    stream = Delivering()
    stream.coming.put(b"unread")
    os.close(pipe[0])
    Splice(stream, source, pipe[1]).run()
    assert stream.aborted
    assert stream.take is not None
    assert stream.take(b"unread") == 0
