"""Where one part's time goes while small queries pass.

By py-spy where it is installed (`pip install py-spy`, not a dependency): it samples from outside and disturbs
little. Else by cProfile in every thread of the part, which makes calls look dearer than they are.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from measures import tps
from ways import Bench, running

SHOWN = 40


def profile(folder: Path, part: str, scale: int, seconds: int) -> int:
    """Print it; returns the exit code."""
    spy = shutil.which("py-spy") or shutil.which("py-spy", path=str(Path(sys.executable).parent))
    if spy is None and part == "client":
        print("error: the client can only be profiled by py-spy", file=sys.stderr)
        return 1
    seconds = max(seconds, 10)
    output = folder / "profile.txt"
    with running(folder, scale, profile="" if spy else part) as bench:
        chain = bench.ways[-1]
        if spy is None:
            tps(bench.server, chain, 1, seconds)
        else:
            _sample(spy, bench, chain.processes[part].pid, seconds, output)
    print(_summary(output) if spy else output.read_text())
    return 0


def _sample(spy: str, bench: Bench, pid: int, seconds: int, output: Path) -> None:
    """Only those who hold the interpreter's lock: the others wait."""
    words = [
        "record",
        "--gil",
        "--threads",
        "-p",
        pid,
        "-d",
        seconds - 2,
        "-r",
        500,
        "-f",
        "raw",
        "-o",
        output,
    ]
    with subprocess.Popen([spy, *map(str, words)], stdout=subprocess.DEVNULL) as sampler:
        tps(bench.server, bench.ways[-1], 1, seconds)
        sampler.wait(60)


def _summary(output: Path) -> str:
    """Share of the samples with a function anywhere in them, and with it at the end."""
    within: Counter[str] = Counter()
    at_end: Counter[str] = Counter()
    total = 0
    for line in output.read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        frames = [frame.rpartition(":")[0] for frame in stack.split(";")[1:]]
        total += int(count)
        for frame in set(frames):
            within[frame] += int(count)
        at_end[frames[-1] if frames else "?"] += int(count)
    lines = [f"{'within':>8}{'itself':>8}"]
    lines += [
        f"{within[frame] / total:8.1%}{at_end[frame] / total:8.1%}  {frame})"
        for frame, _ in within.most_common(SHOWN)
    ]
    return "\n".join(lines)
