"""Run a program with cProfile in each of its threads: profiled.py OUTPUT PROGRAM ARGUMENTS…

At its end the sum of all threads is written to OUTPUT as text.
"""

from __future__ import annotations

import cProfile
import pstats
import runpy
import sys
import threading
from pathlib import Path
from typing import Any

_profiles: list[cProfile.Profile] = []


def _begin(_frame: Any, _event: str, _arg: object) -> None:
    """Called once in each new thread, at its first event: from then on the profiler is in place."""
    profile = cProfile.Profile()
    _profiles.append(profile)
    profile.enable()


def main() -> None:
    output, program = Path(sys.argv[1]), sys.argv[2]
    sys.argv = sys.argv[2:]
    threading.setprofile(_begin)
    try:
        runpy.run_path(program, run_name="__main__")
    finally:
        threading.setprofile(None)
        with output.open("w") as stream:
            for profile in _profiles:
                profile.create_stats()
            pstats.Stats(*_profiles, stream=stream).sort_stats("tottime").print_stats(40)


if __name__ == "__main__":
    main()
