"""A real systemd host: an overlay on a cached image, booted by systemd-nspawn in its own network namespace.

    with Fleet() as fleet:
        host = fleet.add("relay", "trixie")
        fleet.boot()
        host.run("systemctl", "is-system-running")

Everything is reached by ssh from the controller's namespace, as an operator would. ``Fleet.close`` stops all
hosts and removes mounts, cgroups, namespaces and folders, also after a failure half-way.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from harness import cgroups
from harness.images import image
from harness.network import Network
from harness.sweep import FOLDERS, fresh_label, sweep

#: systemd is up in a second or two; ten hosts on two busy processors take longer, and on slow ones minutes.
BOOT_SECONDS = 300.0
STOP_SECONDS = 20.0
#: systemd-nspawn's exit status when the host asks for a reboot.
REBOOTED = 133


class HostError(Exception):
    """A host did not do what it was asked; the message holds what it printed."""


class Host:
    """One machine. ``address`` is on the network of all hosts, ``private`` where it has a second one."""

    def __init__(self, fleet: Fleet, name: str, suite: str, number: int, *, private: bool) -> None:
        self.fleet, self.name, self.suite = fleet, name, suite
        self.address = f"10.77.0.{number}"
        self.private = f"10.78.0.{number}" if private else ""
        self.space = fleet.network.add_host(name, number, private=private)
        self.group = f"{fleet.label}{name}"
        self.folder = fleet.folder / name
        self.root = self.folder / "root"
        self._process: subprocess.Popen[bytes] | None = None
        fleet.hosts[name] = self  # from here on there is something to remove
        self._mount(image(suite))
        self._personalise()

    # -- life ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to boot; ``wait_ready`` waits for ssh."""
        cgroups.make(self.group)
        words = ["systemd-nspawn", "--quiet", f"--directory={self.root}", f"--machine={self.name}"]
        words += ["--register=no", "--keep-unit", "--boot", "--resolv-conf=off", "--timezone=off"]
        words += [f"--network-namespace-path=/run/netns/{self.space}", "--console=read-only"]
        words += ["--kill-signal=SIGRTMIN+3", "--link-journal=no"]
        script = f"{cgroups.enter_command(self.group)}; exec {shlex.join(words)}"
        with (self.folder / "console").open("ab") as console:
            self._process = subprocess.Popen(
                ["sh", "-c", script],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_ready(self) -> None:
        """Wait until ssh answers and systemd has started what it starts. Raises HostError."""
        deadline = time.monotonic() + BOOT_SECONDS
        while True:
            done = self.ssh("systemctl is-system-running", timeout=30)
            if done.stdout.strip() in ("running", "degraded"):
                return
            if self._process is None or self._process.poll() is not None:
                raise HostError(f"{self.name} did not boot\n{self.console()}")
            if time.monotonic() > deadline:
                raise HostError(f"{self.name} is not up: {done.stdout}{done.stderr}\n{self.console()}")
            time.sleep(0.2)

    def reboot(self) -> None:
        """Ask the host to reboot, as its own `systemctl reboot` does, and boot it again."""
        assert self._process is not None
        self.ssh("systemctl reboot")
        try:
            code = self._process.wait(BOOT_SECONDS)
        except subprocess.TimeoutExpired:
            raise HostError(f"{self.name} did not go down\n{self.console()}") from None
        if code != REBOOTED:
            raise HostError(f"{self.name} ended with {code} instead of a reboot\n{self.console()}")
        self.start()
        self.wait_ready()

    def stop(self) -> None:
        """Power off, by force if need be, and remove what the host leaves on this machine."""
        process = self._process
        if process is not None:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_SECONDS)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self._kill_left()
            cgroups.remove(self.group)
        subprocess.run(["umount", "--recursive", str(self.root)], capture_output=True, check=False)

    def console(self) -> str:
        """The last of what the host printed while booting."""
        file = self.folder / "console"
        return file.read_text(errors="replace")[-3000:] if file.exists() else ""

    # -- use -----------------------------------------------------------------------------------------

    def run(self, *words: str, input: str = "", user: str = "root", timeout: float = 120) -> str:
        """Run a command to its end; its output. Raises HostError when it fails."""
        command = shlex.join(words if user == "root" else ("runuser", "-u", user, "--", *words))
        done = self.ssh(command, input=input, timeout=timeout)
        if done.returncode:
            raise HostError(f"{self.name}: {command}: {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def sh(self, script: str, *, timeout: float = 120) -> str:
        """Run a shell script as root; its output. Raises HostError when it fails."""
        return self.run("sh", "-euc", script, timeout=timeout)

    def ok(self, *words: str, timeout: float = 120) -> bool:
        """Whether a command succeeds."""
        return self.ssh(shlex.join(words), timeout=timeout).returncode == 0

    def ssh(
        self, command: str, *, input: str = "", timeout: float = 120, user: str = "root"
    ) -> subprocess.CompletedProcess[str]:
        """One remote command line, whatever comes of it. A timeout counts as failed (code 255)."""
        try:
            return subprocess.run(
                [*self.ssh_command(user=user), command],
                input=input,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            return subprocess.CompletedProcess(error.cmd, 255, "", f"not done in {timeout:g} s")

    def popen(self, command: str, *, user: str = "root") -> subprocess.Popen[str]:
        """Start a remote command line as somebody who logs in; ending this process ends it there, too."""
        return subprocess.Popen(
            [*self.ssh_command("-tt", user=user), command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )

    def ssh_command(self, *options: str, user: str = "root") -> list[str]:
        fleet = self.fleet
        words = ["ssh", *fleet.ssh_options(), *options, f"{user}@{self.address}"]
        return fleet.network.inside(fleet.network.controller, words)

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Put a file of root's there."""
        self.run("sh", "-euc", f"umask 077; cat > {shlex.quote(path)}", input=text)
        self.run("chmod", f"{mode:o}", path)

    def read(self, path: str) -> str:
        return self.run("cat", path)

    def wait(self, *words: str, what: str, timeout: float = 180) -> None:
        """Wait until a command succeeds there. Raises HostError."""
        wait_for(lambda: self.ok(*words), f"{self.name}: {what}", timeout=timeout)

    def journal(self, *words: str) -> str:
        return self.run("journalctl", "--no-pager", "-o", "cat", *words)

    # -- making --------------------------------------------------------------------------------------

    def _mount(self, lower: Path) -> None:
        for part in ("upper", "work", "root"):
            (self.folder / part).mkdir(parents=True)
        upper, work = self.folder / "upper", self.folder / "work"
        layers = f"lowerdir={lower},upperdir={upper},workdir={work}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, str(self.root)], check=True)

    def _personalise(self) -> None:
        etc = self.root / "etc"
        (etc / "hostname").write_text(f"{self.name}\n")
        (etc / "machine-id").write_text(f"{secrets.token_hex(16)}\n")
        (etc / "resolv.conf").unlink(missing_ok=True)
        (etc / "resolv.conf").write_text("")
        key = etc / "ssh/ssh_host_ed25519_key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        self.host_key = key.with_suffix(".pub").read_text().split()[1]
        for home in (self.root / "root", self.root / "home/ops", self.root / "home/alice"):
            folder = home / ".ssh"
            folder.mkdir(mode=0o700, exist_ok=True)
            shutil.copy(self.fleet.folder / "key.pub", folder / "authorized_keys")
            owner = home.stat()
            for path in (folder, folder / "authorized_keys"):
                os.chown(path, owner.st_uid, owner.st_gid)

    def _kill_left(self) -> None:
        """What is still in the host's cgroups when its first process is gone (by name they are ours)."""
        for folder in cgroups.folders(self.group):
            for file in folder.rglob("cgroup.procs"):
                with contextlib.suppress(OSError):
                    for pid in file.read_text().split():
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(int(pid), signal.SIGKILL)


class Fleet:
    """The hosts of one topology, with the controller's ssh key and known hosts."""

    def __init__(self) -> None:
        sweep()
        self.label = fresh_label()
        self.hosts: dict[str, Host] = {}
        #: Not below /tmp, which may be too small, and not on a tmpfs: an overlay's upper folder needs xattrs.
        self.folder = Path(tempfile.mkdtemp(prefix=f"pam-hosts-{self.label}-", dir=FOLDERS))
        self.network: Network
        try:
            key = self.folder / "key"
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
            self.network = Network(self.label)
        except BaseException:
            shutil.rmtree(self.folder)
            raise

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(self, name: str, suite: str, *, private: bool = False) -> Host:
        """A host that is not booted yet. Raises ImageError where its suite cannot be had."""
        return Host(self, name, suite, 10 + len(self.hosts), private=private)

    def boot(self) -> None:
        """Boot every host that does not run, all at once, each knowing the others' names."""
        names = {f"{host.name}.test": host.address for host in self.hosts.values()}
        self.network.hosts_file(names)
        known = [f"{host.address} ssh-ed25519 {host.host_key}" for host in self.hosts.values()]
        (self.folder / "known_hosts").write_text("\n".join(known) + "\n")
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in names.items())]
        fresh = [host for host in self.hosts.values() if host._process is None]
        for host in fresh:
            (host.root / "etc/hosts").write_text("\n".join([*lines, f"127.0.1.1 {host.name}"]) + "\n")
            host.start()
        with ThreadPoolExecutor(max(1, len(fresh))) as pool:
            list(pool.map(Host.wait_ready, fresh))

    def ssh_options(self) -> list[str]:
        given = {
            "UserKnownHostsFile": f"{self.folder / 'known_hosts'}",
            "GlobalKnownHostsFile": "/dev/null",
            "StrictHostKeyChecking": "yes",
            "BatchMode": "yes",
            "ConnectTimeout": "30",
            "IdentitiesOnly": "yes",
            "LogLevel": "ERROR",
            "ServerAliveInterval": "10",
        }
        options = [word for name, value in given.items() for word in ("-o", f"{name}={value}")]
        return ["-F", "/dev/null", "-i", str(self.folder / "key"), *options]

    def close(self) -> None:
        """Stop and remove everything; raises only after all was tried."""
        problems: list[Exception] = []
        with ThreadPoolExecutor(max(1, len(self.hosts))) as pool:
            for ending in [pool.submit(host.stop) for host in self.hosts.values()]:
                error = ending.exception()
                if isinstance(error, Exception):
                    problems.append(error)
        try:
            self.network.close()
        except (OSError, subprocess.SubprocessError) as error:
            problems.append(error)
        if any(os.path.ismount(host.root) for host in self.hosts.values()):
            problems.append(HostError(f"still mounted below {self.folder}"))
        else:
            shutil.rmtree(self.folder)
        self.hosts.clear()
        if problems:
            raise ExceptionGroup("the hosts were not removed cleanly", problems)


def wait_for(condition: Callable[[], bool], what: str, *, timeout: float = 180) -> None:
    """Wait until ``condition()`` is true. Raises HostError naming ``what``."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise HostError(f"waited {timeout:g} s for {what}")
        time.sleep(0.2)
