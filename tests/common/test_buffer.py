"""Memory to read into: it is the system's again when nobody reads."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from pam_common.buffer import ReadBuffer

SIZE = 32 << 20


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_what_was_read_into_is_given_back_but_for_the_first_page() -> None:
    empty = resident()
    buffer = ReadBuffer(SIZE)
    assert len(buffer) == len(buffer.view) == SIZE
    assert resident() < empty + SIZE // 2
    buffer.view[:] = b"x" * SIZE
    full = resident()
    assert full > empty + SIZE // 2
    buffer.note(SIZE)
    assert buffer.used
    buffer.release()
    assert not buffer.used
    assert resident() < full - SIZE // 2
    assert bytes(buffer.view[: mmap.PAGESIZE]) == b"x" * mmap.PAGESIZE
    buffer.view[-1:] = b"y"  # and it can be read into as before
    assert buffer.memory[SIZE - 1] == ord("y")


def test_small_messages_leave_nothing_to_release() -> None:
    buffer = ReadBuffer(1 << 16)
    buffer.view[:100] = b"z" * 100
    buffer.note(100)
    assert not buffer.used
    buffer.release()
    assert bytes(buffer.view[:100]) == b"z" * 100
