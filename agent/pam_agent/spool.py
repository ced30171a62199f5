"""The spool: where parts wait on the agent's disk, from their first byte to the platform's receipt.

    spool/lock         held while an agent uses the spool
    spool/active/      parts being written; after a crash, parts to be recovered
    spool/ready/       finished and signed, to be uploaded, then deleted
    spool/refused/     finished, but the platform will not have them (move back to ready/ to try again)
    spool/receipts     what the platform acknowledged last (pam_agent.receipts)
    spool/quarantine/  what is no recording of this agent, or was cut from one; for a person to look at

Nothing but ``delete`` after a receipt ever removes recorded events. File names are built from checked ids
only. All folders are 0700 and all files 0600 from their creation.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from pam_common.errors import AuthenticationError, PamError
from pam_common.files import make_private_dir, sync_folder
from pam_common.keys import SigningKey
from pam_common.logging import get_logger, kv
from pam_common.recording.format import (
    END_CRASH,
    MAX_CHUNK,
    Head,
    RecordingError,
    parse_part_name,
    part_name,
)
from pam_common.recording.scan import Scan

log = get_logger("agent.spool")

#: A session that could record nothing but its beginning is better refused.
NEW_PART_ROOM = 65536
#: When full, look at the disk again at most this often: a person may have made room by hand.
RECOUNT_INTERVAL = 1.0
_COPY_PIECE = 1 << 20


class SpoolFullError(PamError):
    """The spool has reached ``recording.max_spool``: what cannot be recorded is not allowed."""


@dataclass(frozen=True)
class ReadyPart:
    """A finished part that waits for its upload."""

    session: str
    part: int
    path: Path
    size: int


class Spool:
    """One agent's spool folder. Safe for use from several threads; ``with`` releases its lock."""

    def __init__(self, root: Path, *, max_bytes: int) -> None:
        """Raises PamError when it cannot be used, or another agent process uses it."""
        self.root, self.max_bytes = root, max_bytes
        self._lock_fd = -1
        try:
            for folder in (root, *(root / name for name in ("active", "ready", "refused", "quarantine"))):
                make_private_dir(folder)
            self._active, self._ready = root / "active", root / "ready"
            self._refused, self._quarantine = root / "refused", root / "quarantine"
            self._lock_fd = _lock(root / "lock")
            self._used = self._count()
        except OSError as error:
            self.close()
            reason = (error.strerror or str(error)).lower()
            raise PamError(
                f"the spool {root} cannot be used: {error.filename or root}: {reason}",
                hint="its folders must be the agent's own, on a disk that can be written.",
            ) from None
        self._lock = threading.Lock()
        self._counted = time.monotonic()

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let another agent process use the spool."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    # --- space -----------------------------------------------------------------------------------

    @property
    def used(self) -> int:
        """Bytes on disk, of all folders."""
        return self._used

    def charge(self, size: int, *, room: int = 0) -> None:
        """Count ``size`` bytes about to be written; ``room`` more must be free beyond them.

        Raises SpoolFullError when they do not fit ``max_bytes``.
        """
        with self._lock:
            if self._used + size + room > self.max_bytes and time.monotonic() >= (
                self._counted + RECOUNT_INTERVAL
            ):
                self._used, self._counted = self._count(), time.monotonic()
            if self._used + size + room > self.max_bytes:
                raise SpoolFullError(
                    f"the recording spool is full ({self._used} of {self.max_bytes} bytes)",
                    hint=f"it empties when the platform can be reached; else look at {self.root}/refused"
                    " and quarantine, or raise recording.max_spool.",
                )
            self._used += size

    def adjust(self, change: int) -> None:
        """Count what the limit must not stop: trailers, which make a part ready, and cut tails."""
        with self._lock:
            self._used += change

    def _count(self) -> int:
        folders = (self._active, self._ready, self._refused, self._quarantine)
        total = 0
        for folder in folders:
            with os.scandir(folder) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):
                        total += entry.stat(follow_symlinks=False).st_size
        return total

    # --- a part's way ----------------------------------------------------------------------------

    def create(self, session: str, part: int) -> int:
        """A new file in ``active``, open for appending. Raises PamError when there is such a part."""
        name = part_name(session, part)
        if any((folder / name).exists() for folder in (self._ready, self._refused)):
            raise PamError(f"part {part} of session {session} is already recorded")
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(self._active / name, flags, 0o600)
        except FileExistsError:
            raise PamError(f"part {part} of session {session} is already being recorded") from None
        sync_folder(self._active)  # else a power cut could lose the name of synced bytes
        return fd

    def abandon(self, session: str, part: int) -> None:
        """Remove a part whose header could not be written: it holds nothing, and a full disk would
        leave one more with every attempt to open a session."""
        (self._active / part_name(session, part)).unlink(missing_ok=True)

    def publish(self, session: str, part: int) -> None:
        """Move a finished, synced part from ``active`` to ``ready``."""
        self._move(self._active / part_name(session, part), self._ready)

    def ready(self) -> list[ReadyPart]:
        """The parts to upload, oldest first."""
        found: list[tuple[int, ReadyPart]] = []
        for path in self._ready.iterdir():
            ids = parse_part_name(path.name)
            with contextlib.suppress(FileNotFoundError):
                info = path.lstat()
                if ids and stat.S_ISREG(info.st_mode):
                    found.append((info.st_mtime_ns, ReadyPart(*ids, path, info.st_size)))
        return [ready for _, ready in sorted(found, key=lambda item: (item[0], item[1].path.name))]

    def delete(self, ready: ReadyPart) -> None:
        """Remove a part that the platform has acknowledged."""
        ready.path.unlink()
        self.adjust(-ready.size)

    def refuse(self, ready: ReadyPart) -> None:
        """Put a part aside that the platform will never accept."""
        self._move(ready.path, self._refused)

    def counts(self) -> dict[str, int]:
        """How many files each folder holds, for ``status``."""
        folders = (self._active, self._ready, self._refused, self._quarantine)
        return {folder.name: sum(1 for _ in folder.iterdir()) for folder in folders}

    # --- after a crash ---------------------------------------------------------------------------

    def recover(self, identity: SigningKey, now: Callable[[], float]) -> list[str]:
        """Finish what an earlier process left in ``active``: cut torn tails, sign, make ready.

        To be called before any part is created. Returns the names that could not be finished now for
        want of space or an I/O error; ``seal`` may be tried again. Everything else that is there is put
        into quarantine with a log line.
        """
        for path in list(self._ready.iterdir()):
            if parse_part_name(path.name) is None or not stat.S_ISREG(path.lstat().st_mode):
                self._isolate(path, "not a recording's name")
        left = []
        for path in sorted(self._active.iterdir()):
            if parse_part_name(path.name) is None:
                self._isolate(path, "not a recording's name")
            elif not self.seal(path.name, identity, END_CRASH, now):
                left.append(path.name)
        return left

    def seal(self, name: str, identity: SigningKey, end: str, now: Callable[[], float]) -> bool:
        """Sign what is whole of an unfinished part as ``end`` and make it ready; False to try later."""
        path = self._active / name
        try:
            with _opened(path) as file:
                size, head = self._finish(file, path, identity, end, int(now()))
            self._move(path, self._ready)
        except FileNotFoundError:
            return True
        except (RecordingError, AuthenticationError) as error:
            self._isolate(path, str(error))
            return True
        except OSError as error:
            log.error("unfinished recording kept", extra=kv(file=name, reason=error.strerror))
            return False
        fields = kv(session=head.session, recording_part=head.part, end=head.end, chunks=head.count, cut=size)
        log.warning("unfinished recording signed", extra=fields)
        return True

    def _finish(
        self, file: BinaryIO, path: Path, identity: SigningKey, end: str, now: int
    ) -> tuple[int, Head]:
        """Cut and sign; returns how many bytes were cut and the final head."""
        scan = Scan(file)
        for _ in scan.chunks():
            pass
        header = scan.header
        if (header.session, header.part) != parse_part_name(path.name):
            raise RecordingError("the file is of another session or part than its name")
        if header.identity_kid != identity.kid:
            raise RecordingError("the file is of another agent identity and cannot be signed")
        if scan.trailer is not None:
            scan.trailer.verify(identity.public)
            return 0, scan.trailer
        cut = os.fstat(file.fileno()).st_size - scan.length
        # A torn write leaves less than a few chunks. More was not torn but damaged: kept to be looked at.
        if cut > 4 * MAX_CHUNK:
            self._keep_tail(file, scan.length, path.name)
        head = Head(
            header.session, header.part, scan.count, scan.length, scan.hash, max(now, header.created), end
        ).sign(identity)
        os.ftruncate(file.fileno(), scan.length)
        file.seek(scan.length)
        trailer = head.to_trailer(identity.kid)
        file.write(trailer)
        file.flush()
        os.fsync(file.fileno())
        self.adjust(len(trailer) - cut)
        return cut, head

    def _keep_tail(self, file: BinaryIO, offset: int, name: str) -> None:
        target = self._quarantine / f"{name}.{time.time_ns()}.tail"
        fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as kept:
            file.seek(offset)
            while piece := file.read(_COPY_PIECE):
                kept.write(piece)
        log.error("damaged end of a recording kept", extra=kv(file=target.name))

    def _isolate(self, path: Path, reason: str) -> None:
        target = self._quarantine / f"{path.name}.{time.time_ns()}"
        try:
            path.rename(target)
        except OSError as error:
            reason = f"{reason}; it could not be moved: {error.strerror}"
        log.error("file put into quarantine", extra=kv(file=path.name, reason=reason))

    def _move(self, path: Path, folder: Path) -> None:
        target = folder / path.name
        if target.exists():
            raise RecordingError(f"there is a {path.name} in {folder.name} already")
        path.rename(target)
        sync_folder(folder)
        sync_folder(path.parent)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise RecordingError(f"not a readable file: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise RecordingError("not a regular file")
    with os.fdopen(fd, "r+b") as file:
        yield file


def _lock(path: Path) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise PamError(
            f"another agent process uses the spool {path.parent}",
            hint="each agent needs its own state_dir; is this one running already?",
        ) from None
    return fd
