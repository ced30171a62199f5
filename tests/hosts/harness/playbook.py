"""ansible-playbook as an operator runs it, from the controller's namespace, and what it said task by task."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from harness.hosts import Fleet

ROOT = Path(__file__).resolve().parents[3]
ANSIBLE = ROOT / "ansible"
#: Six hosts on two busy processors; a run takes one to two minutes.
RUN_SECONDS = 1200


@dataclass
class Run:
    """One run: its exit code, all that it printed, and (host, task, outcome, message) of every task."""

    code: int
    output: str
    tasks: list[tuple[str, str, str, str]] = field(repr=False)

    def changed(self) -> list[tuple[str, str]]:
        """(host, task) of all that changed, or would change, in order."""
        return [(host, task) for host, task, outcome, _ in self.tasks if outcome == "changed"]

    def failed(self) -> list[tuple[str, str, str]]:
        """(host, task, message) of what failed."""
        return [
            (host, task, message)
            for host, task, outcome, message in self.tasks
            if outcome in ("failed", "unreachable")
        ]

    def check(self) -> Run:
        assert self.code == 0, f"{self.failed()}\n{self.output[-6000:]}"
        return self


class Controller:
    """Runs playbooks against a fleet with one inventory, which tests may change."""

    def __init__(self, fleet: Fleet, inventory: dict[str, Any]) -> None:
        self.fleet = fleet
        self.inventory = inventory
        self._file = fleet.folder / "inventory.yml"
        self._runs = 0
        #: All that ansible-playbook has ever printed.
        self.printed = ""

    def run(self, playbook: str, *words: str, **variables: Any) -> Run:
        """Run a playbook of ours; ``variables`` come before those of the inventory."""
        self._runs += 1
        self._file.touch(mode=0o600)
        self._file.write_text(yaml.dump(self.inventory, Dumper=_Dumper, sort_keys=False))
        record = self.fleet.folder / f"run-{self._runs}.jsonl"
        given = self.fleet.folder / "variables.yml"
        given.touch(mode=0o600)
        given.write_text(yaml.dump(variables, Dumper=_Dumper))
        command = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", str(self._file)]
        command += ["--extra-vars", f"@{given}", str(ANSIBLE / playbook), *words]
        try:
            done = subprocess.run(
                self.fleet.network.inside(self.fleet.network.controller, command),
                cwd=ANSIBLE,
                env=self._environment(record),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=RUN_SECONDS,
                check=False,
            )
        finally:
            self._end_masters()
        self.printed += done.stdout
        lines = record.read_text().splitlines() if record.exists() else []
        return Run(done.returncode, done.stdout, [tuple(json.loads(line)) for line in lines])

    def _environment(self, record: Path) -> dict[str, str]:
        keep = ("PATH", "HOME", "TMPDIR")
        ssh = self.fleet.ssh_options()
        return {
            **{name: os.environ[name] for name in keep if name in os.environ},
            "LC_ALL": "C.UTF-8",
            "ANSIBLE_CONFIG": str(ANSIBLE / "ansible.cfg"),
            "ANSIBLE_HOME": str(self.fleet.folder / "ansible"),
            "ANSIBLE_CALLBACK_PLUGINS": str(Path(__file__).parent / "callback"),
            "ANSIBLE_CALLBACKS_ENABLED": "record",
            "PAM_TEST_RECORD": str(record),
            "ANSIBLE_SSH_ARGS": " ".join([*ssh, "-o ControlMaster=auto -o ControlPersist=30s"]),
            "ANSIBLE_SSH_CONTROL_PATH_DIR": str(self._sockets()),
            "ANSIBLE_FORKS": "6",
            "ANSIBLE_TIMEOUT": "120",  # for sudo's answer, too, on hosts that share two cores
            "ANSIBLE_NOCOLOR": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def _sockets(self) -> Path:
        folder = self.fleet.folder / "cp"
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder

    def _end_masters(self) -> None:
        """Connections that Ansible keeps open must not outlive a run: a host may be rebooted next."""
        for socket in self._sockets().iterdir():
            subprocess.run(
                ["ssh", "-F", "/dev/null", "-o", f"ControlPath={socket}", "-O", "exit", "any"],
                capture_output=True,
                check=False,
            )


class Unsafe(str):
    """A value that Ansible must not take for a template: ``!unsafe`` in the file."""


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(Unsafe, lambda dumper, text: dumper.represent_scalar("!unsafe", str(text), style="'"))
