"""Notes about running connects, for ``pam-client status``.

Each connect holds a lock on its note for as long as it lives, so a note whose lock is free is a dead one's:
no pid to compare, nothing to clean up after a crash.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pam_client.home import Home
from pam_common.files import make_private_dir

_FOLDER = "running"


@contextlib.contextmanager
def noted(home: Home, name: str, **fields: Any) -> Iterator[None]:
    """Keep a note with ``fields`` while the block runs."""
    folder = make_private_dir(home.make() / _FOLDER)
    path = folder / f"{name}.json"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        os.ftruncate(fd, 0)
        os.write(fd, json.dumps({"pid": os.getpid(), **fields}).encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(fd)


def running(home: Home) -> list[dict[str, Any]]:
    """The notes of connects that run now; dead ones are removed."""
    return [
        note for path in sorted((home.folder / _FOLDER).glob("*.json")) if (note := _read(path)) is not None
    ]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    with os.fdopen(fd, "rb") as file:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with contextlib.suppress(ValueError):
                note = json.loads(file.read(65536))
                return note if isinstance(note, dict) else None
            return None
        path.unlink(missing_ok=True)
        return None
