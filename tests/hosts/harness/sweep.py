"""What a test run that was killed has left on this machine, removed by the next one.

Everything a fleet makes carries its label, and the label the number of the process that made it: a label
whose process is gone belongs to nobody.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import subprocess
from pathlib import Path

from harness import cgroups
from harness.network import end_processes, ip

PREFIX = "pth"
FOLDERS = Path("/var/tmp")
_numbers = itertools.count()


def fresh_label() -> str:
    """A label for a fleet of this process."""
    return f"{PREFIX}{os.getpid()}{'abcdefghijklmnopqrstuvwxyz'[next(_numbers)]}"


def sweep() -> None:
    """Remove what belongs to processes that are no more."""
    for name in _namespaces():
        if _orphaned(name):
            end_processes(name)
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "delete", name)
    for folder in [*_hierarchies(), *Path("/etc/netns").glob(f"{PREFIX}*")]:
        if folder.exists() and _orphaned(folder.name):
            if folder.is_relative_to(cgroups.ROOT):
                cgroups.remove(folder.name)
            else:
                shutil.rmtree(folder)
    for folder in FOLDERS.glob(f"pam-hosts-{PREFIX}*"):
        if _orphaned(folder.name.removeprefix("pam-hosts-")):
            for mount in folder.glob("*/root"):
                subprocess.run(["umount", "--recursive", str(mount)], capture_output=True, check=False)
            if not any(os.path.ismount(mount) for mount in folder.glob("*/root")):
                shutil.rmtree(folder)


def left_over(label: str) -> list[str]:
    """What a fleet of this label has left: namespaces, cgroups, mounts, folders. Empty when clean."""
    found = [f"namespace {name}" for name in _namespaces() if name.startswith(label)]
    found += [f"cgroup {folder}" for folder in _hierarchies() if folder.name.startswith(label)]
    found += [f"folder {folder}" for folder in FOLDERS.glob(f"pam-hosts-{label}*")]
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    return found + [f"mount {line.split()[4]}" for line in mounts if f"/pam-hosts-{label}" in line]


def _namespaces() -> list[str]:
    return [line.split()[0] for line in ip("netns", "list").splitlines() if line.startswith(PREFIX)]


def _hierarchies() -> list[Path]:
    return [*cgroups.ROOT.glob(f"*/{PREFIX}*"), *cgroups.ROOT.glob(f"{PREFIX}*")]


def _orphaned(name: str) -> bool:
    number = re.match(rf"{PREFIX}([0-9]+)[a-z]", name)
    return number is not None and not Path(f"/proc/{number[1]}").exists()
