"""A person at a workstation host: logs in there over ssh, and confirms the login in a browser elsewhere.

As a program, ``python people.py URL CA NAME CODE`` confirms a device code as that browser would, with the
password from standard input; it runs in the controller's namespace.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve()
LOGIN_SECONDS = 180


class Colleague:
    """``name`` has an account on the workstation ``desk`` and on the platform at ``url``."""

    def __init__(self, desk: Any, name: str, password: str, url: str, ca: Path) -> None:
        self.desk, self.name, self.password, self.url, self.ca = desk, name, password, url, ca

    def login(self) -> str:
        """``pam-client login``, confirmed in a browser on the controller; its output."""
        process = self.desk.popen("pam-client login --no-browser", user=self.name)
        timer = threading.Timer(LOGIN_SECONDS, process.kill)
        timer.start()
        shown = ""
        try:
            for line in process.stdout:
                shown += line
                if code := re.search(r"\b([A-Z0-9]{4}-[A-Z0-9]{4})\b", shown):
                    self._confirm(code[1])
                    break
            shown += process.stdout.read()
            assert process.wait(LOGIN_SECONDS) == 0, shown
            return shown
        finally:
            timer.cancel()
            process.kill()
            process.wait()

    def run(self, *words: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """``pam-client`` with ``words``, whatever comes of it."""
        return self.desk.ssh(shlex.join(["pam-client", *words]), user=self.name, timeout=timeout)

    def query(self, account: str, sql: str, *, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """One session: connect, run ``sql`` by psql, and end."""
        return self.run("connect", account, "--", "psql", "-XAtqc", sql, timeout=timeout)

    def start(self, account: str, *psql: str) -> subprocess.Popen[str]:
        """A session that goes on, with psql at a terminal."""
        words = ["pam-client", "connect", account, "--", "psql", "-X", *psql]
        return self.desk.popen(shlex.join(words), user=self.name)

    def recorded(self) -> bool:
        """Whether the recording of every session that was used is complete; False if nobody can say now."""
        done = self.run("sessions", "ls", "--json")
        if done.returncode:
            return False
        return {row["recording"] for row in json.loads(done.stdout) if row["connections"]} == {"complete"}

    def sessions(self) -> list[dict[str, Any]]:
        done = self.run("sessions", "ls", "--json")
        assert done.returncode == 0, done.stderr
        rows: list[dict[str, Any]] = json.loads(done.stdout)
        return rows

    def _confirm(self, code: str) -> None:
        network = self.desk.fleet.network
        words = [sys.executable, str(HERE), self.url, str(self.ca), self.name, code]
        network.run_in(network.controller, words, input=self.password)


def main(url: str, ca: str, name: str, code: str) -> None:
    sys.path.insert(0, str(HERE.parents[2] / "support"))
    from stack import Person

    stack = SimpleNamespace(url=url, ca=Path(ca), logs=lambda: "")
    Person(stack, name, sys.stdin.read(), Path()).approve(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
