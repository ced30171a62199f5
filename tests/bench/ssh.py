"""A Linux server by three ways: login to prompt, the echo of a key, and scp.

    .venv/bin/python tests/bench/bench.py --only ssh

Direct is plain ``ssh`` with a key of the user's, jump is ``ssh -J`` through a second sshd, and chain is the
same ``ssh`` with the file that ``pam-client ssh-config`` writes: each login there is a pam-client of its own,
with its question to the platform and its session. All use aes128-gcm to the server that they see.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from measures import MIB, Measure
from ssh_server import SshServer
from ssh_tunnel import CIPHER
from stack import Stack
from ways import Way

#: No line editing: the echo is the terminal's, so the path is what is measured.
SHELL = "PS1='ready> ' exec sh -i"
PROMPT = b"ready> "
LOGINS = 5
KEYS = 300
SECONDS = 60.0


@dataclass
class Login(Way):
    """One way to the server: a host of an ssh configuration file."""

    conninfo: str = ""
    echo: int = 0
    config: Path = Path()
    host: str = ""
    environment: dict[str, str] = field(default_factory=dict)

    def words(self, program: str) -> list[str]:
        return [program, "-F", str(self.config)]


class Terminal:
    """A shell on the server, in a terminal of its own; ``after`` is the seconds until its prompt."""

    def __init__(self, way: Login) -> None:
        began = time.perf_counter()
        self._end, other = os.openpty()
        try:
            command = [*way.words("ssh"), "-tt", way.host, SHELL]
            pipes = {"stdin": other, "stdout": other, "stderr": other}
            self._process = subprocess.Popen(command, env=way.environment, start_new_session=True, **pipes)
        finally:
            os.close(other)
        self.until(PROMPT)
        self.after = time.perf_counter() - began

    def until(self, wanted: bytes) -> None:
        """Read until the terminal shows ``wanted``."""
        shown = b""
        while wanted not in shown:
            if not select.select([self._end], [], [], SECONDS)[0]:
                raise RuntimeError(f"waited for {wanted!r}; the terminal shows {shown[-500:]!r}")
            shown += os.read(self._end, 4096)

    def key(self) -> float:
        """Seconds until a typed letter is seen."""
        began = time.perf_counter()
        os.write(self._end, b"x")
        self.until(b"x")
        return time.perf_counter() - began

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        os.close(self._end)


def login_to_prompt(way: Way) -> float:
    """Milliseconds, median of LOGINS."""
    times = []
    for _ in range(LOGINS):
        with contextlib.closing(Terminal(_login(way))) as terminal:
            times.append(terminal.after)
    return statistics.median(times) * 1000


def key_echo(way: Way) -> float:
    """Microseconds, median of KEYS."""
    with contextlib.closing(Terminal(_login(way))) as terminal:
        return statistics.median(terminal.key() for _ in range(KEYS)) * 1e6


def scp(way: Way, size: int, *, up: bool) -> float:
    """MB/s of one file, without the time of a login."""
    login = _login(way)
    folder = login.config.parent
    near, far = folder / "near", f"{login.host}:{folder / 'far'}"
    small = f"{login.host}:{folder / 'empty'}"
    elapsed = []
    for source, to in (((near, far) if up else (far, near)), (small, folder / "nothing")):
        began = time.perf_counter()
        command = [*login.words("scp"), "-q", str(source), str(to)]
        done = subprocess.run(command, env=login.environment, capture_output=True, text=True, check=False)
        elapsed.append(time.perf_counter() - began)
        if done.returncode:
            raise RuntimeError(f"scp by {way.name}: {done.stderr}")
    return size / 1e6 / (elapsed[0] - elapsed[1])


def _login(way: Way) -> Login:
    assert isinstance(way, Login)
    return way


def measures(size: int) -> list[Measure]:
    """All of the rows; ``size`` of the file in bytes."""
    return [
        Measure("ssh login to prompt", "ms", login_to_prompt),
        Measure("ssh echo of a key", "µs", key_echo),
        Measure("ssh scp down", "MB/s", lambda way: scp(way, size, up=False), less=False),
        Measure("ssh scp up", "MB/s", lambda way: scp(way, size, up=True), less=False),
    ]


def cpu(way: Login, size: int) -> dict[str, float]:
    """CPU seconds of relay and agent per GiB that scp brings down."""
    before = {name: process.cpu_seconds() for name, process in way.processes.items()}
    scp(way, size, up=False)
    return {
        name: (process.cpu_seconds() - before[name]) / size * (1 << 30)
        for name, process in way.processes.items()
    }


@contextlib.contextmanager
def running(folder: Path, size: int) -> Iterator[list[Login]]:
    """Two sshds, and the ways to the first of them: direct, jump, chain."""
    folder.mkdir(mode=0o700)
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
        (folder / "empty").touch()
        for name in ("near", "far"):
            with (folder / name).open("wb") as file:
                for _ in range(size // MIB):
                    file.write(os.urandom(MIB))
        server, bastion = (SshServer(folder / name) for name in ("server", "bastion"))
        for one in (server, bastion):
            cleanup.callback(one.stop)
        stack = cleanup.enter_context(Stack(folder / "stack"))
        stack.resources.append(_resource(server))
        stack.start()
        yield [*_plain(folder, server, bastion), _chain(stack, folder)]


def _plain(folder: Path, server: SshServer, bastion: SshServer) -> list[Login]:
    hosts = {"direct": (server, ""), "bastion": (bastion, ""), "jump": (server, "ProxyJump bastion")}
    lines = []
    for name, (sshd, more) in hosts.items():
        lines += [f"Host {name}", f"  Port {sshd.port}", f"  IdentityFile {sshd.key}", f"  {more}"]
    lines += [
        "Host *",
        "  HostName 127.0.0.1",
        f"  User {server.user}",
        "  IdentitiesOnly yes",
        "  BatchMode yes",
    ]
    lines += [f"  UserKnownHostsFile {folder}/known_hosts", f"  Ciphers {CIPHER}", "  LogLevel ERROR"]
    keys = [f"[127.0.0.1]:{sshd.port} {sshd.host_keys[0]}" for sshd in (server, bastion)]
    (folder / "known_hosts").write_text("\n".join(keys) + "\n")
    config = folder / "plain"
    config.write_text("\n".join(lines) + "\n")
    return [
        Login(name, config=config, host=name, environment=dict(os.environ)) for name in ("direct", "jump")
    ]


def _resource(server: SshServer) -> dict[str, Any]:
    account = {"name": "deploy", "user": server.user, "private_key": {"file": str(server.key)}}
    return {
        "name": "web-01",
        "protocol": "ssh",
        "gateway": "dc1",
        "host": "127.0.0.1",
        "port": server.port,
        "ssh": {"host_keys": server.host_keys},
        "accounts": [account],
    }


def _chain(stack: Stack, folder: Path) -> Login:
    alice = stack.person("alice")
    alice.login()
    alice.run("ssh-config", "--write")
    config = folder / "chain"
    config.write_text(f"Host *\n  Ciphers {CIPHER}\n  LogLevel ERROR\nInclude {alice.home}/ssh/config\n")
    parts = {"relay": stack.processes["relay"], "agent": stack.processes["dc1-a"]}
    return Login("chain", config=config, host="web-01.pam", environment=alice.environment(), processes=parts)


def compare(
    folder: Path, options: argparse.Namespace, interleave: Callable[..., None]
) -> tuple[list[Measure], dict[str, float]]:
    """Take the measures that ``options`` asks for; (rows, CPU seconds per GiB of the chain's processes)."""
    size = options.bulk_mib * MIB
    rows = [row for row in measures(size) if options.only in row.title]
    if not rows:
        return [], {}
    with running(folder, size) as ways:
        for run in range(options.runs):
            interleave(run, options.runs, rows, ways)
        return rows, cpu(ways[-1], size)
