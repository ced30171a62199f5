"""Two GiB each way: nothing in client, relay or agent grows with what flows through."""

from __future__ import annotations

import threading
import time

import psycopg
import pytest

SIZE = 2 << 30
#: A process may keep this much more than when it was idle: buffers, threads, allocator slack.
ALLOWED = 40 << 20

pytestmark = pytest.mark.timeout(1800)


class Watch:
    """The most resident memory that each process reaches while it runs."""

    def __init__(self, processes: dict) -> None:
        self.idle = {name: process.resident() for name, process in processes.items()}
        self.most = dict(self.idle)
        self._processes = processes
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.1):
            for name, process in self._processes.items():
                self.most[name] = max(self.most[name], process.resident())

    def grown(self) -> dict[str, int]:
        """Processes that grew more than they may, with the growth in MiB."""
        growth = {name: self.most[name] - self.idle[name] for name in self.idle}
        return {name: size >> 20 for name, size in growth.items() if size > ALLOWED}


@pytest.fixture
def connected(alice, connect):
    with connect(alice) as running:
        with running.open() as connection:  # what the first connection costs is not what is measured
            connection.execute("select 1")
        yield running


@pytest.fixture
def processes(stack, connected):
    return {"client": connected.process, "relay": stack.processes["relay"], "agent": stack.processes["dc1-a"]}


def test_copy_out_to_a_slow_reader(connected, processes) -> None:
    query = f"copy (select repeat('x', 8191) from generate_series(1, {SIZE // 8192})) to stdout"
    total = 0
    with (
        Watch(processes) as watch,
        psycopg.connect(connected.conninfo) as connection,
        connection.cursor() as cursor,
        cursor.copy(query) as copy,
    ):
        began = time.monotonic()
        stalled = False
        for piece in copy:
            total += len(piece)
            if total > SIZE // 4 and not stalled:
                # A reader that stops for a while is the hardest of the slow ones.
                stalled = True
                time.sleep(5)
            ahead = total / (100 << 20) - (time.monotonic() - began)  # at most 100 MiB/s
            if ahead > 0.05:
                time.sleep(ahead)
    assert total == SIZE
    assert watch.grown() == {}


def test_copy_in(connected, processes) -> None:
    block = (b"y" * 8191 + b"\n") * 16
    with (
        Watch(processes) as watch,
        psycopg.connect(connected.conninfo) as connection,
        connection.cursor() as cursor,
    ):
        cursor.execute("create temp table sink (line text)")
        # A trigger that drops every row: what is measured is the chain, not a 2 GiB table.
        cursor.execute(
            "create function pg_temp.none() returns trigger language plpgsql as 'begin return null; end'"
        )
        cursor.execute("create trigger t before insert on sink for each row execute function pg_temp.none()")
        with cursor.copy("copy sink from stdin") as copy:
            for _ in range(SIZE // len(block)):
                copy.write(block)
        assert cursor.statusmessage == "COPY 0"
    assert watch.grown() == {}
