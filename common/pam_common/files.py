"""Private files: keys, tokens and state that only their owner may read."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from pam_common.errors import PamError

#: No key, token or state file of ours comes near this; a larger one is not ours.
MAX_PRIVATE_FILE = 1 << 20


def make_private_dir(path: Path) -> Path:
    """Create ``path`` (and parents) with mode 0700, or check that it is a private folder of ours."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = path.stat()
    if info.st_uid != os.geteuid():
        raise PamError(
            f"{path} belongs to uid {info.st_uid}, not to this process's user",
            hint="run it as that user: runuser -u USER -- COMMAND",
        )
    if stat.S_IMODE(info.st_mode) & 0o077:
        # Ours but too open (made by an installer's umask, say): close it rather than fail.
        path.chmod(0o700)
    return path


def write_private(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data``: 0600 from its creation on, whole or not at all, on disk on return."""
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    fd = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def remove_scratch(path: Path) -> None:
    """Remove what writes of ``path`` left that a crash cut short. For its only writer, before it writes."""
    for scratch in path.parent.glob(f".{path.name}.*"):
        scratch.unlink(missing_ok=True)


def read_private(path: Path, *, max_size: int = MAX_PRIVATE_FILE) -> bytes:
    """Read a private file; refuse one that others may read or write, or that is not ours (or root's).

    A systemd credential of this service is private by its folder and an access list, which the file's mode
    cannot show. Raises PamError with advice; FileNotFoundError when there is none.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        info = os.fstat(file.fileno())
        if not stat.S_ISREG(info.st_mode):
            raise PamError(f"{path} is not a regular file")
        if info.st_uid not in (os.geteuid(), 0):
            raise PamError(f"{path} belongs to uid {info.st_uid}, not to this process's user")
        if stat.S_IMODE(info.st_mode) & 0o077 and not _is_credential(path):
            raise PamError(
                f"{path} may be read by others (mode {stat.S_IMODE(info.st_mode):04o})",
                hint=f"chmod 600 {path}, and replace what is in it if others have a login here.",
            )
        data = file.read(max_size + 1)
    if len(data) > max_size:
        raise PamError(f"{path} is larger than {max_size} bytes")
    return data


def _is_credential(path: Path) -> bool:
    folder = os.environ.get("CREDENTIALS_DIRECTORY", "")
    return bool(folder) and path.parent == Path(folder)


def sync_folder(folder: Path) -> None:
    """Return when the names in ``folder`` are on disk: a power cut could lose those of synced files."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
