"""Child processes of tests, benches and the demo: started with a log file, always stopped again."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


class ProcessFailedError(Exception):
    """A program ended, or was not ready in time; the message ends with the tail of its log."""


#: Below the kernel's own choices for outgoing connections, and a share for each worker of the test run: what
#: is handed out here stays free until its server listens.
_PORTS = range(16000, 32000)
_SHARE = 1000
_next_port = itertools.count(random.randrange(_SHARE))


def free_port() -> int:
    """A loopback port that nobody listens on now, and that nobody else is given."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = _PORTS.start + worker * _SHARE % len(_PORTS)
    for _ in range(_SHARE):
        port = first + next(_next_port) % _SHARE
        with socket.socket() as probe, contextlib.suppress(OSError):
            # As servers do: a port of which old connections are only fading away is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free")


def wait_for(condition: Callable[[], bool], what: str, *, timeout: float = 60.0) -> None:
    """Wait until ``condition()`` is true; raises TimeoutError naming ``what``."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout:g} s for {what}")
        time.sleep(0.02)


def listens(port: int) -> bool:
    """True when something accepts connections on the loopback ``port``."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Process:
    """One program with its output in a log file, in a session of its own so that all of it can be ended."""

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        log: Path,
        *,
        env: Mapping[str, str] | None = None,
        uid: int | None = None,
    ) -> None:
        self.name = name
        self.log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                start_new_session=True,
                cwd="/",
                **({"user": uid, "group": uid, "extra_groups": []} if uid is not None else {}),
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def running(self) -> bool:
        return self._process.poll() is None

    def ready_when(self, condition: Callable[[], bool], *, timeout: float = 120.0) -> None:
        """Wait for ``condition``; raises ProcessFailedError if the program ends first or takes too long."""
        deadline = time.monotonic() + timeout
        while not condition():
            if not self.running():
                raise ProcessFailedError(f"{self.name} ended with {self._process.returncode}\n{self.tail()}")
            if time.monotonic() > deadline:
                raise ProcessFailedError(f"{self.name} was not ready in {timeout:g} s\n{self.tail()}")
            time.sleep(0.02)

    def send(self, number: int) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        """``kill -9``, of the whole session."""
        self._signal(signal.SIGKILL)
        self._process.wait()

    def stop(self, *, number: int = signal.SIGTERM, timeout: float = 60.0) -> int:
        """Ask it to end and wait; after ``timeout`` seconds kill it. Returns the exit code."""
        if self.running():
            self._process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout)
                self._wait_for_the_rest()
        self._signal(signal.SIGKILL)  # what it left behind
        return self._process.wait()

    def _wait_for_the_rest(self, seconds: float = 10.0) -> None:
        """What it started may still have a last word to say, as ssh's ProxyCommand has."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < deadline:
                os.killpg(self.pid, 0)
                time.sleep(0.02)

    def tail(self, size: int = 3000) -> str:
        text = self.log.read_text(errors="replace")
        return f"--- {self.log.name} ---\n{text[-size:]}"

    def resident(self) -> int:
        """Resident memory in bytes, of the process and its children."""
        return resident(self.pid)

    def cpu_seconds(self) -> float:
        """User and system time so far, of the process and its children."""
        return sum(_cpu(pid) for pid in family(self.pid))

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)


def family(pid: int) -> list[int]:
    """``pid`` and its descendants that still run."""
    found = [pid]
    for parent in found:
        try:
            tasks = list(Path(f"/proc/{parent}/task").glob("*/children"))
        except OSError:  # it ends just now
            continue
        for task in tasks:
            try:
                found += [int(child) for child in task.read_text().split()]
            except OSError:
                continue
    return found


def resident(pid: int) -> int:
    """Resident memory in bytes, of ``pid`` and its descendants."""
    return sum(_resident(one) for one in family(pid))


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _cpu(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
