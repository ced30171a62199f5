"""Where recordings lie: one file per part, appended to while it arrives, then never changed.

Reading goes through Django's storage interface (``open``, ``size``, ``exists``), so finished parts can
move to object storage by another class of that interface; appending needs a local disk.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from django.conf import settings
from django.core.files.storage import FileSystemStorage

from pam_common.errors import PamError, UnavailableError
from pam_common.files import sync_folder
from pam_common.recording import part_name

# Uploads stop before the disk is full: the database usually lives on the same one.
MIN_FREE = 256 * 1024 * 1024


class OffsetError(PamError):
    """The bytes sent do not continue what is stored; ``received`` is how much that is."""

    def __init__(self, received: int) -> None:
        super().__init__(f"{received} bytes are stored; continue from there")
        self.received = received


class PartStore(FileSystemStorage):
    """Files ``<xy>/<session>.<part>.pamrec``; names are built from ids that were checked for shape."""

    def __init__(self, root: Path | None = None) -> None:
        super().__init__(
            location=root or settings.PAM_RECORDINGS_DIR,
            file_permissions_mode=0o600,
            directory_permissions_mode=0o700,
        )

    @staticmethod
    def name_of(session: str, part: int) -> str:
        """The name of a part; RecordingError when the id is not one. The folder spreads the files."""
        return f"{session[2:4]}/{part_name(session, part)}"

    def received(self, name: str) -> int:
        """How many bytes are stored, 0 when there is no file."""
        try:
            return self.size(name)
        except FileNotFoundError:
            return 0

    @contextmanager
    def reading(self, name: str) -> Iterator[BinaryIO]:
        """The part's file from its beginning. Raises FileNotFoundError."""
        with self.open(name) as file:
            yield cast("BinaryIO", file.file)

    @contextmanager
    def locked(self, name: str) -> Iterator[int]:
        """The part's file, open for reading and writing, while no other worker appends to it.

        Yields the descriptor. The lock is the kernel's and ends with the process.
        """
        path = Path(self.path(name))
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        is_new = not path.exists()
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if is_new:
                # The new file's name must survive a power cut too: its folder's, and that folder's own.
                sync_folder(path.parent)
                sync_folder(Path(self.location))
            yield fd
        finally:
            os.close(fd)


def append(fd: int, offset: int, data: bytes) -> int:
    """Write ``data`` at ``offset``, which must be the file's end, onto the disk; the new size.

    Raises OffsetError when it is not the end, UnavailableError when the disk is (nearly) full; the
    file is then as before.
    """
    size = os.fstat(fd).st_size
    if offset != size:
        raise OffsetError(size)
    if shutil.disk_usage(fd).free < MIN_FREE + len(data):
        raise UnavailableError("the platform's disk for recordings is nearly full")
    try:
        rest = memoryview(data)
        while rest:
            written = os.pwrite(fd, rest, offset + len(data) - len(rest))
            rest = rest[written:]
        os.fsync(fd)
    except OSError as error:
        os.ftruncate(fd, size)
        raise UnavailableError(f"the recording cannot be stored: {error.strerror}") from error
    return size + len(data)
