"""What is measured: one number per way and run."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import statistics
import struct
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import psycopg
from postgres_server import PostgresServer
from ways import BLOCK, Way

MIB = 1 << 20
#: Seconds after which who is idle has given its buffers back.
SETTLE = 8.0
QUERY = b"Q" + struct.pack("!I", 13) + b"select 1\0"
LOGIN = struct.pack("!II", 29, 196608) + b"user\0x\0database\0app\0\0"


@dataclass
class Measure:
    """One row of the table. ``aim`` is the ratio to ``against``; ``less`` is better, or more is."""

    title: str
    unit: str
    take: Callable[[Way], float]
    less: bool = True
    aim: float | None = None
    against: str = "tunnel"
    values: dict[str, list[float]] = field(default_factory=dict)

    def median(self, way: str) -> float:
        return statistics.median(self.values[way])

    def ratio(self, way: str, other: str) -> float:
        """The median of the ratios of each run: what the runs have in common cancels out."""
        return statistics.median(a / b for a, b in zip(self.values[way], self.values[other], strict=True))

    def verdict(self) -> str:
        if self.aim is None:
            return ""
        ratio = self.ratio("chain", self.against)
        met = ratio <= self.aim if self.less else ratio >= self.aim
        return f"{'meets' if met else 'misses'} {'≤' if self.less else '≥'} {self.aim:.3g}×"


def of_ways(server: PostgresServer, seconds: int, copy: int, bulk: int) -> list[Measure]:
    """Measures of direct, tunnel and chain; ``copy`` and ``bulk`` in bytes."""

    def select_only(clients: int, mode: str = "simple") -> Callable[[Way], float]:
        return lambda way: tps(server, way, clients, seconds, mode)

    return [
        Measure("64 bytes there and back", "µs", echo_round_trip, aim=1.1),
        Measure("bulk down", "MB/s", lambda way: echo_bulk(way, b"d", bulk), less=False, aim=1.2),
        Measure("bulk up", "MB/s", lambda way: echo_bulk(way, b"u", bulk), less=False, aim=1.2),
        Measure("connect to first row", "ms", connect_to_first_row),
        Measure("query round trip", "ms", query_round_trip),
        Measure("pgbench -S, 1 client", "ms", lambda way: 1000 / select_only(1)(way), aim=1.0),
        Measure("the same, prepared", "ms", lambda way: 1000 / select_only(1, "prepared")(way)),
        Measure("pgbench -S, 8 clients", "tps", select_only(8), less=False, aim=1.0),
        Measure("COPY out", "s", lambda way: copy_out(way, copy), aim=1.15),
        Measure("COPY in", "s", lambda way: copy_in(way, copy), aim=1.15),
    ]


def of_recording(server: PostgresServer, seconds: int, copy: int) -> list[Measure]:
    """Measures of the chain with all, with no rows and with nothing recorded."""
    return [
        Measure(
            "pgbench -S, 1 client",
            "ms",
            lambda way: 1000 / tps(server, way, 1, seconds),
            aim=1.05,
            against="unrecorded",
        ),
        Measure("COPY out", "s", lambda way: copy_out(way, copy), aim=1.05, against="unrecorded"),
    ]


# -- without a database ----------------------------------------------------------------------------------


def echo_round_trip(way: Way) -> float:
    """Microseconds, median of 2000."""
    times = []
    with way.echo_stream(b"e") as sock:
        for _ in range(2000):
            began = time.perf_counter()
            sock.sendall(bytes(64))
            sock.recv(64, socket.MSG_WAITALL)
            times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e6


def echo_bulk(way: Way, what: bytes, size: int) -> float:
    """MB/s in one direction."""
    view = memoryview(bytearray(1 << 18))
    began = time.perf_counter()
    with way.echo_stream(what, size) as sock:
        if what == b"u":
            for _ in range(size // len(BLOCK)):
                sock.sendall(BLOCK)
            size += 1 - len(sock.recv(1))
        else:
            total = 0
            while got := sock.recv_into(view):
                total += got
            assert total == size, total
    return size / 1e6 / (time.perf_counter() - began)


# -- with one --------------------------------------------------------------------------------------------


def connect_to_first_row(way: Way) -> float:
    """Milliseconds, median of 15 fresh connections."""
    times = []
    for _ in range(15):
        began = time.perf_counter()
        with psycopg.connect(way.conninfo) as connection:
            connection.execute("select 1").fetchone()
            times.append(time.perf_counter() - began)
    return statistics.median(times) * 1000


def connect_phases(way: Way) -> dict[str, float]:
    """Milliseconds of a connection through the chain, medians of 15: what each phase adds.

    ``channel`` is an ssh channel, the handshake of SecureChannel and a dial, as the echo needs them;
    ``login`` is what PostgreSQL's login adds to that, ``query`` the first row.
    """
    port = int(psycopg.conninfo.conninfo_to_dict(way.conninfo)["port"])
    phases: dict[str, list[float]] = {"channel": [], "login": [], "query": []}
    for _ in range(15):
        began = time.perf_counter()
        with way.echo_stream(b"e") as sock:
            sock.sendall(b"x")
            sock.recv(1)
            channel = time.perf_counter() - began
        began = time.perf_counter()
        with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
            sock.sendall(LOGIN)
            _until_ready(sock)
            login = time.perf_counter() - began
            sock.sendall(QUERY)
            _until_ready(sock)
            query = time.perf_counter() - began - login
            sock.sendall(b"X" + struct.pack("!I", 4))
        for name, value in zip(phases, (channel, login - channel, query), strict=True):
            phases[name].append(value * 1000)
    return {name: statistics.median(values) for name, values in phases.items()}


def _until_ready(sock: socket.socket) -> None:
    data = b""
    while not data.endswith(b"Z\0\0\0\5I"):
        got = sock.recv(1 << 16)
        if not got:
            raise RuntimeError(f"the connection was closed after {data!r}")
        data += got


def query_round_trip(way: Way) -> float:
    """Milliseconds of one small query on an open connection, median of 500."""
    times = []
    with psycopg.connect(way.conninfo, autocommit=True) as connection, connection.cursor() as cursor:
        for _ in range(500):
            began = time.perf_counter()
            cursor.execute("select 1")
            times.append(time.perf_counter() - began)
    return statistics.median(times) * 1000


def tps(server: PostgresServer, way: Way, clients: int, seconds: int, mode: str = "simple") -> float:
    """Transactions a second of ``pgbench -S``."""
    command = [server.bin / "pgbench", "-n", "-S", "-M", mode, "-c", clients, "-j", min(clients, 2)]
    command += ["-T", seconds]
    # The connection string may hold a password, which argv must not: the parts go by environment.
    parts = psycopg.conninfo.conninfo_to_dict(way.conninfo)
    names = {"host": "PGHOST", "port": "PGPORT", "dbname": "PGDATABASE", "user": "PGUSER"}
    names |= {"password": "PGPASSWORD", "sslmode": "PGSSLMODE", "gssencmode": "PGGSSENCMODE"}
    env = {**os.environ, **{names[key]: str(value) for key, value in parts.items()}}
    done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, check=False)
    found = re.search(r"tps = ([\d.]+)", done.stdout)
    if done.returncode or not found:
        raise RuntimeError(f"pgbench through {way.name}: {done.stdout}{done.stderr}")
    return float(found[1])


def copy_out(way: Way, size: int) -> float:
    """Seconds for COPY TO STDOUT of ``size`` bytes in rows of 1 KiB."""
    query = f"copy (select repeat('x', 1023) from generate_series(1, {size // 1024})) to stdout"
    with psycopg.connect(way.conninfo) as connection, connection.cursor() as cursor:
        began = time.perf_counter()
        total = 0
        with cursor.copy(query) as copy:
            for piece in copy:
                total += len(piece)
        elapsed = time.perf_counter() - began
    assert total == size // 1024 * 1024, total
    return elapsed


def copy_in(way: Way, size: int) -> float:
    """Seconds for COPY FROM STDIN of ``size`` bytes in rows of 1 KiB."""
    block = (b"x" * 1023 + b"\n") * 128
    with psycopg.connect(way.conninfo) as connection, connection.cursor() as cursor:
        cursor.execute("create temp table sink (line text) on commit drop")
        began = time.perf_counter()
        with cursor.copy("copy sink from stdin") as copy:
            for _ in range(size // len(block)):
                copy.write(block)
        elapsed = time.perf_counter() - began
        rows = cursor.execute("select count(*) from sink").fetchone()
    assert rows == (size // 1024,), rows
    return elapsed


# -- what it costs ---------------------------------------------------------------------------------------


def cpu(ways: list[Way], server: PostgresServer, seconds: int, copy: int) -> dict[str, dict[str, float]]:
    """CPU of each process of tunnel and chain: µs per small query, seconds per GiB of COPY out."""
    found: dict[str, dict[str, float]] = {}
    for way in ways:
        before = {name: process.cpu_seconds() for name, process in way.processes.items()}
        queries = tps(server, way, 1, seconds) * seconds
        between = {name: process.cpu_seconds() for name, process in way.processes.items()}
        copy_out(way, copy)
        for name, process in way.processes.items():
            found[f"{way.name}: {name}"] = {
                "us_per_query": (between[name] - before[name]) / queries * 1e6,
                "s_per_gib": (process.cpu_seconds() - between[name]) / copy * (1 << 30),
            }
    return found


def idle_memory(ways: list[Way], count: int = 50) -> dict[str, float]:
    """KiB that each process of tunnel and chain keeps for an idle connection to the database."""
    found: dict[str, float] = {}
    for way in ways:
        with contextlib.ExitStack() as open_ones:
            for _ in range(5):  # what the first ones cost is not what each costs
                open_ones.enter_context(psycopg.connect(way.conninfo)).execute("select 1")
            time.sleep(SETTLE)
            before = {name: process.resident() for name, process in way.processes.items()}
            for _ in range(count):
                open_ones.enter_context(psycopg.connect(way.conninfo)).execute("select 1")
            time.sleep(SETTLE)
            for name, process in way.processes.items():
                found[f"{way.name}: {name}"] = (process.resident() - before[name]) / count / 1024
    return found
