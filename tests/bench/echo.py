"""The ssh path alone, without a database: client, relay and agent as three processes, plain channels.

    .venv/bin/python tests/bench/echo.py
    .venv/bin/python tests/bench/echo.py --round-trips 100 --mib 10

Prints the round trip of 64 bytes, the throughput of both directions, and the CPU time that each process
spent on it: what is left of a slow chain when protocol, recording and inner encryption are taken away.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import multiprocessing
import os
import socket
import statistics
import struct
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from pam_common import fast_ssh
from pam_common.fast_ssh import ChannelStream

TESTS = Path(__file__).resolve().parents[1]
BLOCK = bytes(1 << 18)
#: What the first bytes of a channel ask for: ``e`` echo, ``d`` send and ``u`` take so many blocks.
ORDER = struct.Struct("!cI")
TICK = os.sysconf("SC_CLK_TCK")


def load_world() -> ModuleType:
    """The CAs, relay and peers of the relay's tests."""
    sys.path.insert(0, str(TESTS / "support"))
    path = TESTS / "relay" / "conftest.py"
    spec = importlib.util.spec_from_file_location("relay_world", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_relay(world: Any, ready: Any) -> None:
    world.start()
    ready.put(world.address)
    threading.Event().wait()


def run_agent(world: Any, ready: Any) -> None:
    transport = world.connect(world.login("serve:dc1", "dc1-a"))

    def arrived(stream: ChannelStream, _origin: object, _to: object) -> None:
        threading.Thread(target=answer, args=(stream,), daemon=True).start()

    transport.request_port_forward("dc1", 1, arrived)
    ready.put(True)
    threading.Event().wait()


def answer(stream: ChannelStream) -> None:
    """Do what the order asks for."""
    with contextlib.suppress(OSError):
        what, blocks = ORDER.unpack(stream.recv(ORDER.size))  # sent at once, so it comes at once
        if what == b"e":
            while data := stream.recv(1 << 17):
                stream.sendall(data)
        elif what == b"d":
            for _ in range(blocks):
                stream.sendall(BLOCK)
        else:
            left = blocks * len(BLOCK)
            while left:
                left -= len(stream.recv(1 << 18))
            stream.sendall(b"x")
        stream.shutdown(socket.SHUT_WR)
        while stream.recv(1 << 17):
            pass
    stream.close()


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICK


class Meter:
    """CPU time of the processes since it was made."""

    def __init__(self, pids: dict[str, int]) -> None:
        self._pids = pids
        self._before = {name: cpu_seconds(pid) for name, pid in pids.items()}

    def per(self, count: float, unit: str) -> str:
        spent = {name: (cpu_seconds(pid) - self._before[name]) / count for name, pid in self._pids.items()}
        return "  ".join(f"{name} {seconds:.3g} {unit}" for name, seconds in spent.items())


def round_trips(stream: ChannelStream, count: int) -> list[float]:
    """Microseconds of each."""
    stream.sendall(ORDER.pack(b"e", 0))
    times = []
    for _ in range(count):
        began = time.perf_counter()
        stream.sendall(bytes(64))
        stream.recv(100)
        times.append((time.perf_counter() - began) * 1e6)
    return sorted(times)


def transfer(stream: ChannelStream, what: bytes, blocks: int) -> float:
    """MB/s of one direction."""
    began = time.perf_counter()
    stream.sendall(ORDER.pack(what, blocks))
    if what == b"d":
        while stream.recv(1 << 18):
            pass
    else:
        for _ in range(blocks):
            stream.sendall(BLOCK)
        stream.recv(1)
    return blocks * len(BLOCK) / 1e6 / (time.perf_counter() - began)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--round-trips", type=int, default=3000, help="of 64 bytes (default 3000)")
    parser.add_argument("--mib", type=int, default=200, help="each way in bulk (default 200)")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    blocks = options.mib * 4
    context = multiprocessing.get_context("fork")
    world: Any = load_world().World()
    ready = context.Queue()
    processes = {}
    for name, target in (("relay", run_relay), ("agent", run_agent)):
        processes[name] = context.Process(target=target, args=(world, ready), daemon=True)
        processes[name].start()
        answered = ready.get(timeout=30)
        world.address = answered if name == "relay" else world.address
    pids = {"client": os.getpid()}
    pids |= {name: process.pid or 0 for name, process in processes.items()}
    client = world.client()
    try:
        meter, times = Meter(pids), round_trips(fast_ssh.open_direct(client, "dc1"), options.round_trips)
        spread = f"p10 {times[len(times) // 10]:.0f}, p90 {times[len(times) * 9 // 10]:.0f}"
        cpu = meter.per(options.round_trips / 1e6, "µs")
        print(f"round trip {statistics.median(times):.0f} µs ({spread}); CPU {cpu}")
        for what, name in ((b"d", "down"), (b"u", "up")):
            meter, rate = Meter(pids), transfer(fast_ssh.open_direct(client, "dc1"), what, blocks)
            print(f"{name} {rate:.0f} MB/s; CPU {meter.per(blocks * len(BLOCK) / 1e9, 's/GB')}")
    finally:
        client.close()
        for process in processes.values():
            process.terminate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
