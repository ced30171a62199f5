"""Looks for secrets where everybody on a machine could read them: command lines, journals, files, output."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path

from harness.hosts import Host

#: Where a host keeps what is not part of its system.
PLACES = "/etc /var /home /root /tmp /run /opt /srv"
#: A command that takes a tenth of a second is seen; more often would take a processor away from the test.
EVERY_SECONDS = 0.1


class CommandLines:
    """Collects every command line of the machine, which includes those inside of all hosts."""

    def __init__(self) -> None:
        self.seen: set[bytes] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="command-lines", daemon=True)
        self._thread.start()

    def holding(self, secrets: Iterable[str]) -> list[bytes]:
        seen = self.seen.copy()  # the watch goes on
        return [line for line in seen if any(secret.encode() in line for secret in secrets)]

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(EVERY_SECONDS):
            for process in Path("/proc").iterdir():
                if not process.name.isdigit():
                    continue
                try:
                    self.seen.add((process / "cmdline").read_bytes())
                except OSError:
                    continue  # it has ended


def in_journal(host: Host, secrets: Iterable[str]) -> list[str]:
    """The lines of the host's journal and logs with a secret in them."""
    patterns = "\n".join(secrets)
    script = "{ journalctl --no-pager -o cat; find /var/log -type f ! -path '*/journal/*' -exec cat {} +; }"
    done = host.ssh(f"f=$(mktemp); cat > $f; {script} | grep -aFf $f; rm $f", input=patterns, timeout=300)
    assert done.returncode == 0, f"{host.name} was not searched: {done.stderr}"
    return done.stdout.splitlines()


def readable_files(host: Host, secrets: Iterable[str]) -> list[str]:
    """Files of the host with a secret in them that others than their owner may read."""
    command = f"grep -rlaFsf - --exclude-dir=journal {PLACES} | xargs -r stat -c '%a %U %n'"
    done = host.ssh(command, input="\n".join(secrets), timeout=300)
    assert done.returncode == 0, f"{host.name} was not searched: {done.stderr}"
    return [line for line in done.stdout.splitlines() if int(line.split()[0], 8) & 0o077]
