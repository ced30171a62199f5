"""A place of its own in every cgroup hierarchy for a host, whether the machine has v1, v2 or both."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
#: The kernel empties a cgroup a moment after its last process has ended; a busy machine takes its time.
EMPTY_SECONDS = 60.0


def folders(name: str) -> list[Path]:
    """The folders that ``name`` has in each hierarchy."""
    if (ROOT / "cgroup.controllers").exists():
        return [ROOT / name]
    # Not cpuset: a new group has no processor until somebody gives it one.
    return [
        hierarchy / name
        for hierarchy in sorted(ROOT.iterdir())
        if hierarchy.name != "cpuset" and (hierarchy / "cgroup.procs").exists() and not hierarchy.is_symlink()
    ]


def enter_command(name: str) -> str:
    """Shell words that put the shell into the cgroups of ``name``; what it then runs is in them, too."""
    return "; ".join(f"echo $$ > {folder}/cgroup.procs" for folder in folders(name))


def make(name: str) -> None:
    for folder in folders(name):
        folder.mkdir(exist_ok=True)


def remove(name: str) -> None:
    """Remove the groups, those that the host made below them too; its processes must have ended."""
    deadline = time.monotonic() + EMPTY_SECONDS
    while time.monotonic() < deadline:
        for folder in folders(name):
            for below in sorted(folder.rglob("*/"), key=lambda path: len(path.parts), reverse=True):
                with contextlib.suppress(OSError):
                    below.rmdir()
            with contextlib.suppress(OSError):
                folder.rmdir()
        if not any(folder.exists() for folder in folders(name)):
            return
        time.sleep(0.1)
    left = [str(folder) for folder in folders(name) if folder.exists()]
    raise RuntimeError(f"cgroups are left over: {left}")
