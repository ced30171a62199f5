"""Minutes of mixed load on the chain: whether anything fails, and whether anything grows."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psycopg
from measures import MIB, Way, copy_in, copy_out
from ways import Bench, another_client

#: Seconds between looks at the processes.
LOOK = 15.0
#: How much larger than after the first looks a process may be at the end: caches fill up slowly.
GROWTH = 1.25


class Load:
    """Threads that do something over and over until told to stop; what failed is kept."""

    def __init__(self) -> None:
        self.done: dict[str, int] = {}
        self.failures: list[str] = []
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self, name: str, act: Callable[[], None]) -> None:
        self.done[name] = 0
        thread = threading.Thread(target=self._run, args=(name, act), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _run(self, name: str, act: Callable[[], None]) -> None:
        while not self._over.is_set():
            try:
                act()
                self.done[name] += 1
            except (psycopg.Error, OSError, AssertionError) as error:
                self.failures.append(f"{name}: {error!r}")
                self._over.wait(1)

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(120)


def soak(bench: Bench, folder: Path, minutes: float) -> int:
    """Returns 1 when something failed or grew."""
    chain = bench.ways[-1]
    with contextlib.ExitStack() as cleanup:
        second = Way("second", another_client(bench.stack, folder, cleanup), 0)
        open_ = cleanup.enter_context(psycopg.connect(chain.conninfo, autocommit=True))
        load = Load()
        load.start("queries", lambda: _queries(open_))
        load.start("connections", lambda: _connect(second))
        load.start("copies out", lambda: _spend(copy_out(chain, 8 * MIB)))
        load.start("copies in", lambda: _spend(copy_in(second, 8 * MIB)))
        looks = _watch(chain, load, minutes * 60)
        load.stop()
    return _verdict(load, looks)


def _queries(connection: psycopg.Connection) -> None:
    for number in range(100):
        assert connection.execute("select %s::int", (number,)).fetchone() == (number,)


def _connect(way: Way) -> None:
    with psycopg.connect(way.conninfo) as connection:
        connection.execute("select 1")


def _spend(seconds: float) -> None:
    """Copies shall not leave the others no room."""
    time.sleep(min(seconds, 5.0))


def _watch(chain: Way, load: Load, seconds: float) -> list[dict[str, tuple[int, int, int]]]:
    """Resident KiB, threads and descriptors of each process, once in a while."""
    looks: list[dict[str, tuple[int, int, int]]] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(min(LOOK, max(end - time.monotonic(), 0.1)))
        look = {}
        for name, process in chain.processes.items():
            here = f"/proc/{process.pid}"
            counts = (len(os.listdir(f"{here}/{kind}")) for kind in ("task", "fd"))  # noqa: PTH208 - of /proc
            look[name] = (process.resident() >> 10, *counts)
        looks.append(look)  # type: ignore[arg-type]
        sizes = ", ".join(f"{n} {kib} KiB, {t} threads, {f} files" for n, (kib, t, f) in looks[-1].items())
        print(f"{load.done} {len(load.failures)} failures; {sizes}", flush=True)
    return looks


def _verdict(load: Load, looks: list[dict[str, tuple[int, int, int]]]) -> int:
    problems = list(load.failures[:10])
    first, last = looks[min(2, len(looks) - 1)], looks[-1]
    for name, (kib, _, _) in last.items():
        if kib > first[name][0] * GROWTH:
            problems.append(f"{name} grew from {first[name][0]} to {kib} KiB")
    for problem in problems:
        print(f"PROBLEM {problem}")
    print("soak: " + ("FAILED" if problems else "nothing failed, nothing grew"))
    return 1 if problems else 0
