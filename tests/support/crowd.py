"""Very many sessions on one relay and one agent, with what they cost the two.

    with Crowd(folder, 200) as crowd:
        crowd.open()                  # each session over an ssh connection of its own, logged in to a target
        crowd.costs(20)               # {"relay": Cost(...), "agent": Cost(...)}
        crowd.query(60, every=1)      # Answers(...)

Relay and agent are the product's, each in a process of its own, and so are the clients and the target. The
target speaks just enough of PostgreSQL (one thread for all connections); the platform is the one of the
agent's tests, in this process. ``python crowd.py ROLE FOLDER`` is one of the other processes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import selectors
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import yaml
from processes import wait_for

from pam_agent.recorder import SYNC_INTERVAL
from pam_common import fast_ssh, logging
from pam_common.keys import SigningKey, VerifyKeys, new_session_id
from pam_common.secure_channel import SecureChannel, x25519_public
from pam_common.ssh_certs import CertificateKey
from pam_common.stream import Stream

TESTS = Path(__file__).resolve().parents[1]
#: Logins at once. The relay admits 20 from one address; more only wait for each other.
OPENERS = 8
CLIENT_PROCESSES = 2
#: Every process derives the same keys, so that they need not be handed around.
USER_CA, HOST_CA, HOST, USER = (SigningKey(bytes([number]) * 32) for number in (1, 2, 3, 4))
NOISE = bytes([5]) * 32
READY = b"Z\0\0\0\5I"
STARTUP = b"\0\3\0\0user\0me\0database\0app\0\0"
QUERY = b"Q" + struct.pack(">I", 13) + b"select 1\0"


def load(name: str) -> ModuleType:
    """The ``conftest.py`` of one part's tests, for the peers that it makes."""
    spec = importlib.util.spec_from_file_location(f"{name}_peers", TESTS / name / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Use:
    """What a process has and has used."""

    kib: int
    threads: int
    descriptors: int
    cpu: float

    @classmethod
    def of(cls, pid: int) -> Use:
        status = Path(f"/proc/{pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return cls(
            kib=int(fields["VmRSS"].split()[0]),
            threads=int(fields["Threads"]),
            descriptors=sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()),
            cpu=(int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK"),
        )


@dataclass(frozen=True)
class Cost:
    """What the sessions cost one process: each, and all together."""

    kib: float  #: of memory, a session
    threads: float  #: a session
    descriptors: float  #: a session
    core: float  #: part of a core while nothing happens


@dataclass(frozen=True)
class Answers:
    """What came of queries: how many, what failed, and seconds by percentile."""

    count: int
    failures: list[str]
    p50: float
    p99: float
    worst: float


class Part:
    """One process of the crowd, told what to do and answering by lines of JSON."""

    def __init__(self, role: str, folder: Path, *, program: str = __file__) -> None:
        self.log = folder / f"{role}.log"
        environment = {**os.environ, "PYTHONPATH": str(TESTS / "support")}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, program, role, str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
            )
        self.pid = self._process.pid
        self.said = self.answer()

    def tell(self, **order: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        """Wait for its next line. Raises RuntimeError when it has ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.log.stem} ended\n{self.log.read_text()[-3000:]}")
        return json.loads(line)

    def kill(self) -> None:
        """``kill -9``."""
        self._process.kill()
        self.stop()

    def stop(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


class Crowd:
    """``count`` sessions below ``folder``, which must be empty and private, on so many ``agents``."""

    def __init__(self, folder: Path, count: int, *, agents: int = 1) -> None:
        self.folder, self.count = folder, count
        self.agents = ["agent", *(f"agent-{number}" for number in range(1, agents))]
        self.parts: dict[str, Part] = {}
        self._before: dict[str, Use] = {}
        self._after: dict[str, Use] = {}

    def __enter__(self) -> Crowd:
        self._platform = load("agent").FakePlatform()
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _start(self) -> None:
        platform = self._platform
        platform.user_ca, platform.host_ca = USER_CA, HOST_CA
        target = self._part("target")
        platform.account("db/app", "127.0.0.1", target.said["port"])
        relay = self._part("relay")
        platform.relays.append({"name": "r1", "host": "127.0.0.1", "port": relay.said["port"]})
        for name in self.agents:
            settings = {
                "platform": platform.url,
                "state_dir": str(self.folder / name),
                "runtime_dir": str(self.folder / f"{name}-run"),
                "allow_targets": ["127.0.0.1:*"],
                "drain_timeout": 0,
                "limits": {"sessions": self.count, "connections": self.count + 10},
            }
            (self.folder / f"{name}.yml").write_text(yaml.safe_dump(settings))
            self._part(name)
        self._write_sessions(relay.said["port"])
        for number in range(CLIENT_PROCESSES):
            self._part(f"clients-{number}")
        self._before = self._at_rest()

    def _at_rest(self, quiet: float = 2.0, most: float = 60.0) -> dict[str, Use]:
        """What relay and agents use once the starts have ended: when no memory is taken any more."""
        found, changed, end = self._uses(), time.monotonic(), time.monotonic() + most
        while time.monotonic() < min(changed + quiet, end):
            time.sleep(0.1)
            now = self._uses()
            if any(now[name].kib != use.kib for name, use in found.items()):
                changed = time.monotonic()
            found = now
        return found

    def _write_sessions(self, port: int) -> None:
        now = int(time.time())
        found = []
        for _ in range(self.count):
            grant = self._platform.grant(
                x25519_public(NOISE),
                "db/app",
                session=new_session_id(),
                protocol="postgres",
                expires=now + 3600,
                session_end=now + 7200,
            )
            found.append([grant.session, self._platform.token(grant).decode()])
        (self.folder / "sessions.json").write_text(json.dumps({"port": port, "sessions": found}))

    def _part(self, role: str) -> Part:
        part = self.parts[role] = Part(role, self.folder)
        return part

    def _stop(self) -> None:
        for part in reversed(list(self.parts.values())):
            part.stop()
        self._platform.stop()

    # -- what is done with them ----------------------------------------------------------------------------

    def open(self) -> float:
        """Open all sessions; returns the seconds that took. Raises RuntimeError when one fails."""
        began = time.monotonic()
        failures = [failure for said in self._all(order="open") for failure in said]
        if failures:
            raise RuntimeError(f"{len(failures)} sessions failed: {failures[:5]}")
        return time.monotonic() - began

    def costs(self, seconds: float) -> dict[str, Cost]:
        """Measure relay and agent for ``seconds``, in which nobody does anything."""
        self.settle()
        first = self._uses()
        time.sleep(seconds)
        last = self._uses()
        return {name: self._cost(name, first[name], last[name], seconds) for name in last}

    def settle(self) -> None:
        """Wait for what opening or asking left to do: recordings synced, heads shown to the platform."""
        heads = -1
        while heads != len(self._platform.heads):
            heads = len(self._platform.heads)
            time.sleep(2 * SYNC_INTERVAL + 1)

    def _cost(self, name: str, first: Use, last: Use, seconds: float) -> Cost:
        before = self._before[name]
        return Cost(
            kib=round((last.kib - before.kib) / self.count, 1),
            threads=round((last.threads - before.threads) / self.count, 2),
            descriptors=round((last.descriptors - before.descriptors) / self.count, 2),
            core=round((last.cpu - first.cpu) / seconds, 4),
        )

    def query(self, seconds: float, *, every: float = 1.0) -> Answers:
        """One query per session each ``every`` seconds, spread evenly; at 0 as soon as the last is done."""
        said = self._all(order="query", seconds=seconds, every=every)
        times = sorted(moment for one in said for moment in one["times"])
        failures = [failure for one in said for failure in one["failures"]]
        return Answers(
            count=len(times),
            failures=failures,
            p50=round(times[len(times) // 2], 4),
            p99=round(times[len(times) * 99 // 100], 4),
            worst=round(times[-1], 4),
        )

    def close(self) -> None:
        """Close all sessions from the clients' side."""
        self._all(order="close")

    def uses(self, name: str) -> Use:
        return Use.of(self.parts[name].pid)

    def _uses(self) -> dict[str, Use]:
        return {name: self.uses(name) for name in ("relay", *self.agents)}

    def _all(self, **order: Any) -> list[Any]:
        clients = [part for role, part in self.parts.items() if role.startswith("clients")]
        for part in clients:
            part.tell(**order)
        return [part.answer() for part in clients]


# -- the other processes -----------------------------------------------------------------------------------


def say(word: Any) -> None:
    print(json.dumps(word), flush=True)


def run_relay(_folder: Path) -> None:
    module = load("relay")
    world = module.World()
    world.user_ca, world.host_ca, world.host = USER_CA, HOST_CA, HOST
    limits = module.Limits(transports=5000, channels=5000, channels_per_agent=5000)
    world.start(limits)
    say({"port": world.address[1]})
    sys.stdin.read()
    world.close()


def run_agent(folder: Path, name: str) -> None:
    from pam_agent import config, enrolment
    from pam_agent.gateway import Gateway

    settings = config.load(folder / f"{name}.yml")
    enrolment.enrol(settings, "enrol-me", f"dc1-{name}", "test")
    gateway = Gateway(settings)
    gateway.start()
    wait_for(lambda: gateway.tunnels.counts()[0] == settings.tunnels_per_relay, "the tunnels")
    say("ready")
    sys.stdin.read()
    gateway.stop()


def run_target(_folder: Path) -> None:
    """Answer start-ups and queries without looking at what they say."""
    row = b"T\0\0\0\x1a\0\1x\0\0\0\0\0\0\0\0\0\0\x17\0\4\xff\xff\xff\xff\0\0" + b"D\0\0\0\x0b\0\1\0\0\0\0011"
    answer = row + b"C\0\0\0\x0dSELECT 1\0" + READY
    greeting = b"R\0\0\0\x08\0\0\0\0" + b"S\0\0\0\x19client_encoding\0UTF8\0" + READY
    listener = socket.create_server(("127.0.0.1", 0), backlog=500)
    chooser = selectors.DefaultSelector()
    chooser.register(listener, selectors.EVENT_READ)
    chooser.register(sys.stdin, selectors.EVENT_READ)
    say({"port": listener.getsockname()[1]})
    while True:
        for key, _ in chooser.select():
            sock: Any = key.fileobj
            if sock is sys.stdin:
                return
            if sock is listener:
                chooser.register(listener.accept()[0], selectors.EVENT_READ)
                continue
            try:
                data = sock.recv(4096)
                if data[:1] in (b"Q", b"\0"):
                    sock.sendall(answer if data[:1] == b"Q" else greeting)
                    continue
            except OSError:
                pass  # an end like any other
            chooser.unregister(sock)
            sock.close()


class Clients:
    """One process's part of the sessions: every second, say, from the first or the second on."""

    def __init__(self, folder: Path, number: int) -> None:
        told = json.loads((folder / "sessions.json").read_text())
        self._address = ("127.0.0.1", told["port"])
        self._sessions = told["sessions"][number::CLIENT_PROCESSES]
        self._login = load("relay").World
        self._transports: list[fast_ssh.Transport] = []
        self._channels: list[Stream] = []

    def open(self) -> list[str]:
        """All sessions; the failures."""
        with ThreadPoolExecutor(OPENERS // CLIENT_PROCESSES) as pool:
            return [failure for failure in pool.map(self._open, self._sessions) if failure]

    def _open(self, session: tuple[str, str]) -> str | None:
        name, token = session
        try:
            sock = socket.create_connection(self._address)
            host_ca = VerifyKeys.of(HOST_CA.public)
            transport = fast_ssh.connect(
                sock, name=f"client-{name[-6:]}", host_ca=host_ca, hostname="r1", login=self._key(name)
            )
            self._transports.append(transport)
            channel = SecureChannel.connect(
                fast_ssh.open_direct(transport, "dc1"),
                gateway="dc1",
                static=NOISE,
                check_agent=lambda _key, _statement: None,
                grant=token.encode(),
            )
            channel.sendall(struct.pack(">I", len(STARTUP) + 4) + STARTUP)
            _read_until_ready(channel)
            self._channels.append(channel)
        except Exception as error:  # noqa: BLE001  told to who counts them
            return f"{type(error).__name__}: {error}"
        return None

    def _key(self, session: str) -> CertificateKey:
        world = self._login()
        world.user_ca = USER_CA
        return world.login("connect:dc1", session, lifetime=7200)

    def query(self, seconds: float, every: float) -> dict[str, Any]:
        """Each session in a thread of its own; times in seconds, and failures."""
        times: list[float] = []
        failures: list[str] = []
        began_all = time.monotonic()
        end = began_all + seconds

        def ask(number: int, channel: Stream) -> None:
            # From the one beginning: a thread that starts late asks as often, only later.
            due = began_all + every * number / len(self._channels)
            try:
                while due < end:
                    time.sleep(max(0.0, due - time.monotonic()))
                    began = time.perf_counter()
                    channel.sendall(QUERY)
                    _read_until_ready(channel)
                    times.append(round(time.perf_counter() - began, 6))
                    due = due + every if every else time.monotonic()
            except Exception as error:  # noqa: BLE001
                failures.append(f"{type(error).__name__}: {error}")

        threads = [
            threading.Thread(target=ask, args=(number, channel), daemon=True)
            for number, channel in enumerate(self._channels)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {"times": times, "failures": failures}

    def close(self) -> None:
        for transport in self._transports:
            transport.close()


def _read_until_ready(channel: Stream) -> None:
    got = b""
    while not got.endswith(READY):
        more = channel.recv(65536)
        if not more:
            raise EOFError(f"the end, after {got[-200:]!r}")
        got += more


def run_clients(folder: Path, number: int) -> None:
    clients = Clients(folder, number)
    say("ready")
    for line in sys.stdin:
        told = json.loads(line)
        match told.pop("order"):
            case "open":
                say(clients.open())
            case "query":
                say(clients.query(**told))
            case "close":
                clients.close()
                say("closed")


def main() -> None:
    logging.setup("warning")
    role, _, number = sys.argv[1].partition("-")
    folder = Path(sys.argv[2])
    if role == "clients":
        run_clients(folder, int(number))
    elif role == "agent":
        run_agent(folder, sys.argv[1])
    else:
        {"relay": run_relay, "target": run_target}[role](folder)


if __name__ == "__main__":
    main()
