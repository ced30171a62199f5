"""Where the vault's master keys come from; never from the database.

In this order: ``vault_key`` of platform.yml, the systemd credential ``vault-key``, the file that
``PAM_VAULT_KEY_FILE`` names, and else ``keys/vault.key`` in the state folder, which ``init`` makes.

The file holds one key a line, 32 bytes in base64url: the first seals, all open. That is how two overlap
while entries are re-keyed. Commands that seal or re-key hold `locked` for as long as they run.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pam_common.errors import ConfigError, UnavailableError
from pam_common.files import read_private, write_private
from pam_common.keys import KEY_SIZE, b64decode, b64encode
from pam_platform import config
from pam_platform.vault.seal import MasterKey

CREDENTIAL = "vault-key"
FILE_VARIABLE = "PAM_VAULT_KEY_FILE"
#: The current key and those being re-keyed away from; more is a mistake.
MAX_MASTER_KEYS = 8
_MAX_FILE = 4096
#: An apply of thousands of accounts, or a re-keying, is done by then.
LOCK_TIMEOUT = 60
_LOCK_PAUSE = 0.1


@dataclass(frozen=True)
class Source:
    """The file in use. ``ours``: the platform may rewrite it; a credential belongs to systemd."""

    path: Path
    ours: bool


class MasterKeys:
    """The keys of a source; the first is current."""

    def __init__(self, keys: list[MasterKey]) -> None:
        self.current = keys[0]
        self.by_kid = {key.kid: key for key in keys}
        if len(self.by_kid) != len(keys):
            raise ConfigError(["the vault's master key file has a key twice"])


_lock = threading.Lock()
_loaded: tuple[Source, MasterKeys] | None = None


def source() -> Source:
    """Which file holds the master keys now."""
    settings = config.current()
    if settings.vault_key is not None:
        return Source(settings.vault_key, ours=True)
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    if folder and (Path(folder) / CREDENTIAL).exists():
        return Source(Path(folder) / CREDENTIAL, ours=False)
    named = os.environ.get(FILE_VARIABLE)
    if named:
        return Source(Path(named), ours=True)
    return Source(settings.keys_dir / "vault.key", ours=True)


def load(*, fresh: bool = False) -> MasterKeys:
    """The master keys, read once per process, or again when ``fresh`` (another process re-keyed).

    Raises ConfigError when there are none or the file is not as it must be.
    """
    global _loaded
    with _lock:
        where = source()
        if fresh or _loaded is None or _loaded[0] != where:
            _loaded = where, MasterKeys(read(where))
        return _loaded[1]


@contextmanager
def locked() -> Iterator[None]:
    """Let no other process seal or re-key meanwhile; for commands, as the server does neither.

    What an apply has sealed and not committed yet a re-keying cannot see: it would drop its key, and with it
    the secrets. Raises UnavailableError when another command does not end. The lock is the kernel's and ends
    with the process.
    """
    global _loaded
    fd = _open_lock(config.current().keys_dir)
    try:
        _await_lock(fd)
        with _lock:
            _loaded = None  # whoever had the lock may have re-keyed
        yield
    finally:
        os.close(fd)


def _open_lock(folder: Path) -> int:
    path = folder / "lock"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        if os.geteuid() == 0:  # made by root, it would shut the service's own user out
            owner = folder.stat()
            os.fchown(fd, owner.st_uid, owner.st_gid)
    except OSError as error:
        raise ConfigError(
            [f"cannot lock {path}: {error.strerror}"], hint="run it as the user that the keys belong to."
        ) from None
    return fd


def _await_lock(fd: int) -> None:
    deadline = time.monotonic() + LOCK_TIMEOUT
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise UnavailableError(
                    "another pam-platform apply, init, keys rotate or vault rekey is running",
                    hint="try again when it is done.",
                ) from None
        time.sleep(_LOCK_PAUSE)


def read(where: Source) -> list[MasterKey]:
    """The keys in the file. Raises ConfigError; no message quotes its content."""
    try:
        # systemd guards credentials by ACL and folder, which a file mode cannot show.
        data = read_private(where.path) if where.ours else where.path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(
            [f"{where.path}: the vault's master key is missing"], hint="run pam-platform init, or restore it."
        ) from None
    lines = data[: _MAX_FILE + 1].split()
    if not 1 <= len(lines) <= MAX_MASTER_KEYS or len(data) > _MAX_FILE:
        raise ConfigError([f"{where.path}: expected 1 to {MAX_MASTER_KEYS} lines, each a master key"])
    try:
        return [MasterKey(b64decode(line.decode("ascii"), KEY_SIZE)) for line in lines]
    except ValueError:
        raise ConfigError(
            [f"{where.path}: a line is not 32 bytes in base64url without padding"],
            hint="make one with: python3 -c 'import secrets; print(secrets.token_urlsafe(32))'",
        ) from None


def write(where: Source, keys: list[MasterKey]) -> None:
    """Replace the file's keys, and what this process has loaded."""
    write_private(where.path, b"".join(b64encode(key.secret).encode() + b"\n" for key in keys))
    load(fresh=True)


def generate() -> MasterKey:
    """A new random key."""
    return MasterKey(secrets.token_bytes(KEY_SIZE))
