"""The bench's programs work: what they measure is read by people, who run them rarely."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BENCH = Path(__file__).parent / "bench"


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short, as sockets are in it."""
    with tempfile.TemporaryDirectory() as path:
        yield Path(path) / "bench"


def run(program: str, *arguments: str) -> str:
    command = [sys.executable, BENCH / program, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout


def test_the_table_of_ratios(folder: Path) -> None:
    small = ["--runs", "1", "--seconds", "1", "--scale", "1", "--copy-mib", "8", "--bulk-mib", "8"]
    printed = run("bench.py", *small, "--only", "64 bytes", "--folder", str(folder))
    assert re.search(r"64 bytes there and back .*\d× +\d.*× +(meets|misses) ≤ 1.1×", printed)
    results = json.loads((folder / "results.json").read_text())
    values = results["measures"]["ways"]["64 bytes there and back"]["values"]
    assert values.keys() == {"direct", "tunnel", "bare", "chain"}
    assert all(value > 0 for (value,) in values.values())
    assert results["cpu"].keys() >= {"chain: client", "chain: relay", "chain: agent"}


def test_the_ssh_path_alone() -> None:
    printed = run("echo.py", "--round-trips", "20", "--mib", "1")
    assert re.fullmatch(r"round trip \d+ µs .*\ndown \d+ MB/s; .*\nup \d+ MB/s; .*\n", printed)
