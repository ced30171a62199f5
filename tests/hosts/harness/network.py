"""The hosts' network: namespaces of our own, with no way out of the machine.

    controller (10.77.0.1) ── bridge ── every host (10.77.0.x, eth0)
    private    (10.78.0.1) ── bridge ── the gateways' hosts alone (10.78.0.x, eth1)

``controller`` is where ansible-playbook and the people's browser run, ``private`` where the targets do. No
namespace has a default route, so nothing here ever reaches anything else.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

CONTROLLER_ADDRESS = "10.77.0.1"
PRIVATE_ADDRESS = "10.78.0.1"
#: Time for processes of a namespace that is given up.
GOODBYE_SECONDS = 30.0


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


class Network:
    """The namespaces and bridges of one topology; ``close`` removes them and whatever runs in them."""

    def __init__(self, label: str) -> None:
        #: Kept short: an interface's name has at most 15 characters.
        self.label = label
        self.controller = f"{label}ctl"
        self.private = f"{label}prv"
        self._names: list[str] = []
        try:
            self._add_bridged(self.controller, CONTROLLER_ADDRESS)
            self._add_bridged(self.private, PRIVATE_ADDRESS)
        except BaseException:
            self.close()
            raise

    def add_host(self, name: str, number: int, *, private: bool = False) -> str:
        """A namespace for ``name`` with eth0, and eth1 where it is ``private``; returns its name."""
        space = f"{self.label}{name}"
        self._add(space)
        self._join(space, "eth0", f"10.77.0.{number}", self.controller, f"ve-{name}")
        if private:
            self._join(space, "eth1", f"10.78.0.{number}", self.private, f"vp-{name}")
        return space

    def link(self, name: str, state: str) -> None:
        """Put the link between the host ``name`` and everybody but its private network ``up`` or ``down``."""
        ip("-n", self.controller, "link", "set", f"ve-{name}", state)

    def refuse_inbound(self, name: str) -> None:
        """The packet filter of a gateway's host: nothing comes in but the controller's ssh."""
        rules = f"""
            table inet test {{
                counter refused {{ }}
                chain input {{
                    type filter hook input priority 0; policy drop;
                    ct state established,related accept
                    iif "lo" accept
                    ip saddr {CONTROLLER_ADDRESS} tcp dport 22 accept
                    counter name refused drop
                }}
                chain forward {{ type filter hook forward priority 0; policy drop; }}
            }}"""
        self.run_in(f"{self.label}{name}", ["nft", "-f", "-"], input=rules)

    def refused(self, name: str) -> int:
        """How many packets the filter of ``name`` has dropped."""
        shown = self.run_in(f"{self.label}{name}", ["nft", "-j", "list", "counters"])
        counters = [row["counter"] for row in json.loads(shown)["nftables"] if "counter" in row]
        return sum(int(counter["packets"]) for counter in counters)

    def hosts_file(self, names: dict[str, str]) -> None:
        """What programs in the controller's namespace find in /etc/hosts (`ip netns exec` mounts it)."""
        folder = Path("/etc/netns") / self.controller
        folder.mkdir(parents=True, exist_ok=True)
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in names.items())]
        (folder / "hosts").write_text("\n".join(lines) + "\n")
        (folder / "resolv.conf").write_text("")

    def run_in(self, space: str, command: list[str], *, input: str = "") -> str:
        done = subprocess.run(
            self.inside(space, command), input=input, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    @staticmethod
    def inside(space: str, command: Iterable[str]) -> list[str]:
        return ["ip", "netns", "exec", space, *command]

    def close(self) -> None:
        """End what runs in the namespaces, then remove them; their interfaces go with them."""
        for name in self._names:
            end_processes(name)
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "delete", name)
        self._names.clear()
        shutil.rmtree(Path("/etc/netns") / self.controller, ignore_errors=True)
        with contextlib.suppress(OSError):
            Path("/etc/netns").rmdir()

    def _add(self, name: str) -> None:
        ip("netns", "add", name)
        self._names.append(name)
        ip("-n", name, "link", "set", "lo", "up")

    def _add_bridged(self, name: str, address: str) -> None:
        self._add(name)
        ip("-n", name, "link", "add", "br0", "type", "bridge")
        ip("-n", name, "addr", "add", f"{address}/24", "dev", "br0")
        ip("-n", name, "link", "set", "br0", "up")

    def _join(self, space: str, device: str, address: str, bridged: str, peer: str) -> None:
        ip("-n", bridged, "link", "add", peer, "type", "veth", "peer", "name", device, "netns", space)
        ip("-n", bridged, "link", "set", peer, "master", "br0", "up")
        ip("-n", space, "addr", "add", f"{address}/24", "dev", device)
        ip("-n", space, "link", "set", device, "up")


def end_processes(space: str) -> None:
    """Kill what runs in a namespace of ours, until nothing does."""
    deadline = time.monotonic() + GOODBYE_SECONDS
    while time.monotonic() < deadline:
        try:
            left = [int(pid) for pid in ip("netns", "pids", space).split()]
        except subprocess.CalledProcessError:
            return
        if not left:
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
