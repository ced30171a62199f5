"""The allocator's free memory goes back to the system."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


BLOCKS_ONE_BY_ONE = """
import resource
from pam_common import memory
memory.keep_some()
count = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    [bytearray({size}) for _ in range(3)]
before = count()
for _ in range(100):
    [bytearray({size}) for _ in range(3)]
print(count() - before)
"""


@pytest.mark.parametrize(("size", "kept"), [(262_148, True), (131_074, True), (3 << 20, False)])
def test_memory_for_packets_is_used_again(size: int, kept: bool) -> None:
    """A page that is new to a process costs a fault; a large block's are given back, as without us."""
    program = BLOCKS_ONE_BY_ONE.format(size=size)
    faults = int(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout)
    assert (faults < 300) is kept
