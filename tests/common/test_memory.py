"""The allocator's free memory goes back to the system."""

from __future__ import annotations

import os
from pathlib import Path

from pam_common.memory import give_back

BLOCK, COUNT = 40_000, 2000


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_pages_between_what_is_used_are_given_back() -> None:
    blocks = [bytes(BLOCK) + bytes([number % 256]) for number in range(COUNT)]
    full = resident()
    kept = blocks[::50]
    del blocks
    give_back()
    assert resident() < full - BLOCK * COUNT // 2
    assert len(kept) == COUNT // 50
