"""Recorder: writes what happens in sessions to encrypted parts in the spool.

    session threads ── record() ──▶ PartRecorder ── write ──▶ spool/active/<session>.<part>.pamrec
    recorder-sync   ── fdatasync, every 2.5 s ──▶ signed head ──▶ Witness ──▶ platform
    finalise()      ── FINAL chunk, trailer, fsync ──▶ spool/ready/ ──▶ Uploader

``record`` returns when the kernel has the bytes, so a killed agent loses nothing that a party saw; a
power cut loses what was written since the last sync. A part that cannot be written is dead: every later
``record`` fails, and the session is told to end.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from pam_agent.protocols.base import Event, Opening
from pam_agent.spool import NEW_PART_ROOM, Spool, SpoolFullError
from pam_agent.witness import Witness
from pam_common.errors import PamError
from pam_common.keys import SigningKey
from pam_common.logging import get_logger, kv
from pam_common.memory import give_back
from pam_common.platform_client import PlatformClient
from pam_common.recording.format import (
    ABRUPT_ENDS,
    END_CRASH,
    END_FAILED,
    MAX_END,
    Head,
    Header,
    Recipient,
    RecordingError,
)
from pam_common.recording.writer import PartWriter

log = get_logger("agent.recorder")

#: Half of the 5 s that a power cut may cost: leaves as much for the disk.
SYNC_INTERVAL = 2.5

#: Compressors that were freed, before memory is given back to the system, which takes milliseconds.
FEW_RESTING = 16

#: What ends a session whose recording failed. Called once, from any thread; must not block for long.
OnFailure = Callable[[PamError], None]


class Recorder:
    """All recordings of one agent process. ``on_ready`` is called when a part can be uploaded."""

    def __init__(
        self,
        spool: Spool,
        identity: SigningKey,
        agent: str,
        platform: PlatformClient,
        *,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        self.spool, self.identity, self.agent = spool, identity, agent
        self.now = platform.now
        self._on_ready = on_ready
        self._witness = Witness(platform)
        self._lock = threading.Lock()
        self._parts: set[PartRecorder] = set()  # bounded by the agent's session limit
        self._most_busy = 0  # parts that compressed at once, since memory was given back last
        self._unsealed: dict[str, str] = {}  # name → end, of parts that could not be finished yet
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._sync_loop, name="recorder-sync", daemon=True)

    def start(self) -> None:
        """Finish what a crash left, then keep the parts synced and witnessed."""
        self._unsealed = dict.fromkeys(self.spool.recover(self.identity, self.now), END_CRASH)
        self._on_ready()
        self._thread.start()
        self._witness.start()

    def stop(self) -> None:
        """Finalise what is still open and stop the threads."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(10)
        for part in self._snapshot():
            part.finalise("agent stopped")
        self._witness.stop()

    def start_part(
        self,
        opening: Opening,
        recipients: Sequence[Recipient],
        statement: str,
        *,
        on_failure: OnFailure = lambda error: None,
    ) -> PartRecorder:
        """Begin a part that ``recipients`` can read; its header is written on return.

        Whether the local list allows the recipients is checked where the platform's answer is parsed.
        Raises PamError: then there is no session.
        """
        wall = self.now()
        writer = PartWriter(
            session=opening.session,
            part=opening.part,
            agent=self.agent,
            identity_kid=self.identity.kid,
            created=int(wall),
            recipients=recipients,
            statement=statement,
        )
        try:
            self.spool.charge(len(writer.opening), room=NEW_PART_ROOM)
            fd = self.spool.create(opening.session, opening.part)
        except OSError as error:
            raise _cannot_write(error, self.spool) from None
        try:
            _write_all(fd, writer.opening)
        except OSError as error:
            os.close(fd)
            self.spool.abandon(opening.session, opening.part)
            raise _cannot_write(error, self.spool) from None
        # ``created`` has whole seconds; times count from it exactly.
        part = PartRecorder(self, fd, writer, time.monotonic() - (wall - int(wall)), on_failure)
        with self._lock:
            self._parts.add(part)
        return part

    def status(self) -> dict[str, Any]:
        """For ``status``: counts and bytes."""
        with self._lock:
            recording, unsealed = len(self._parts), len(self._unsealed)
        return {
            "running": self._thread.is_alive(),
            "recording": recording,
            "unfinished": unsealed,
            "spool_bytes": self.spool.used,
            "spool_limit": self.spool.max_bytes,
            "spool_files": self.spool.counts(),
        }

    def _closed(self, part: PartRecorder, end: str | None) -> None:
        """A part's file is closed: whole and signed if ``end`` is None, else to be sealed as ``end``."""
        header = part.header
        with self._lock:
            self._parts.discard(part)
        self._witness.forget(header.session, header.part)
        if end is not None and not self.spool.seal(part.name, self.identity, end, self.now):
            with self._lock:
                self._unsealed[part.name] = end
        self._on_ready()

    def _snapshot(self) -> list[PartRecorder]:
        with self._lock:
            return list(self._parts)

    def _sync_loop(self) -> None:
        while not self._stopping.wait(SYNC_INTERVAL):
            parts = self._snapshot()
            self._give_back_memory(parts)
            for part in parts:
                head = part.sync()
                with self._lock:  # a part that was closed meanwhile is not to be witnessed any more
                    if head is not None and part in self._parts:
                        self._witness.offer(head)
            self._retry_sealing()

    def _give_back_memory(self, parts: Sequence[PartRecorder]) -> None:
        """Once most of what compressed rests: each compressor leaves 38 KiB."""
        busy = sum(part.busy for part in parts)
        if self._most_busy - busy >= max(busy, FEW_RESTING):
            give_back()
            self._most_busy = busy
        self._most_busy = max(self._most_busy, busy)

    def _retry_sealing(self) -> None:
        with self._lock:
            waiting = dict(self._unsealed)
        for name, end in waiting.items():
            if not self.spool.seal(name, self.identity, end, self.now):
                # The others would most likely fail too, each with a log line: one per round, in turn.
                with self._lock:
                    self._unsealed[name] = self._unsealed.pop(name)
                return
            with self._lock:
                del self._unsealed[name]
            self._on_ready()


class PartRecorder:
    """One part being written. Safe for use by all connections of its session."""

    def __init__(
        self, recorder: Recorder, fd: int, writer: PartWriter, began: float, on_failure: OnFailure
    ) -> None:
        self._recorder, self._fd, self._writer = recorder, fd, writer
        self._began = began  # monotonic clock at ``created``
        self._on_failure = on_failure
        # Guards writer, file end and state; held for one write.
        self._lock = threading.Lock()
        # Keeps the descriptor open during a sync, which may take long: record() must not wait for it.
        self._sync_lock = threading.Lock()
        self._whole = writer.state  # the chain up to what the kernel has
        self._synced = -1
        self._failure: PamError | None = None
        self._finished = False

    @property
    def header(self) -> Header:
        return self._writer.header

    @property
    def name(self) -> str:
        """The file's name in the spool."""
        return f"{self.header.session}.{self.header.part}.pamrec"

    @property
    def busy(self) -> bool:
        """Whether it holds a compressor."""
        return self._writer.busy

    @property
    def failure(self) -> PamError | None:
        """Why the part is dead, or None."""
        return self._failure

    def record(self, connection: int, events: Sequence[Event]) -> None:
        """Append ``events`` of ``connection`` (0: the session itself); returns when the kernel has them.

        Raises RecordingError for an event that the format cannot hold (nothing of the batch is written)
        and PamError when the part is dead or finished: nothing may be forwarded then.
        """
        if not events:
            return
        with self._lock:
            self._require_open()
            try:
                self._append(connection, events)
                return
            except RecordingError:
                raise
            except (OSError, SpoolFullError, MemoryError) as error:
                failure = self._die(error)
        self._on_failure(failure)
        raise failure

    def _append(self, connection: int, events: Sequence[Event]) -> None:
        data = self._writer.append(time.monotonic() - self._began, connection, events)
        self._recorder.spool.charge(len(data))
        _write_all(self._fd, data)
        self._whole = self._writer.state

    def head(self) -> Head:
        """The signed head of everything recorded so far."""
        with self._lock:
            whole = self._whole
        return self._signed(whole)

    def sync(self) -> Head | None:
        """Put on disk what the kernel has; returns the signed head to witness, None if nothing is new."""
        with self._sync_lock:
            with self._lock:
                whole = self._whole
                if self._finished or self._failure:
                    return None
                if whole[0] == self._synced:
                    self._writer.rest()
                    return None
            try:
                os.fdatasync(self._fd)
            except OSError as error:
                with self._lock:
                    failure = self._die(error)
            else:
                self._synced = whole[0]
                return self._signed(whole)
        self._on_failure(failure)
        return None

    def finalise(self, end: str) -> None:
        """End the part as ``end`` (a few words) and hand it to the upload. May be called again.

        A part that cannot be finished now is signed as ``failed`` as soon as the disk allows; a log line
        says so. Raises nothing.
        """
        with self._sync_lock, self._lock:
            if self._finished:
                return
            self._finished = True
            if self._failure is None:
                try:
                    self._finish(_end_text(end))
                except (OSError, MemoryError) as error:
                    self._die(error)
            os.close(self._fd)
        if self._failure is None:
            try:
                self._recorder.spool.publish(self.header.session, self.header.part)
            except (OSError, PamError) as error:
                log.error("recording not moved", extra=kv(session=self.header.session, reason=error))
                self._recorder._closed(self, END_FAILED)
                return
        self._recorder._closed(self, END_FAILED if self._failure else None)

    def _finish(self, end: str) -> None:
        # Beyond max_spool if need be: a few hundred bytes that free the whole part by making it ready.
        last = self._writer.finish()
        head = self._writer.head(self._time(), end).sign(self._recorder.identity)
        data = last + head.to_trailer(self.header.identity_kid)
        self._recorder.spool.adjust(len(data))
        _write_all(self._fd, data)
        os.fsync(self._fd)

    def _signed(self, whole: tuple[int, int, bytes]) -> Head:
        head = Head(self.header.session, self.header.part, *whole, self._time())
        return head.sign(self._recorder.identity)

    def _time(self) -> int:
        return max(int(self._recorder.now()), self.header.created)

    def _require_open(self) -> None:
        if self._failure is not None:
            raise PamError(str(self._failure), hint=self._failure.hint)
        if self._finished:
            raise PamError("the session's recording has ended")

    def _die(self, error: OSError | SpoolFullError | MemoryError) -> PamError:
        """Under the lock: no byte is written after this. The torn tail goes now, or when it is sealed."""
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, self._whole[1])
        self._failure = _cannot_write(error, self._recorder.spool)
        fields = kv(session=self.header.session, recording_part=self.header.part, reason=self._failure)
        log.error("recording failed", extra=fields)
        return self._failure


def _cannot_write(error: OSError | SpoolFullError | MemoryError, spool: Spool) -> PamError:
    if isinstance(error, SpoolFullError):
        return error
    reason = error.strerror if isinstance(error, OSError) else "out of memory"
    return PamError(
        f"the session cannot be recorded: {reason}",
        hint=f"see whether the disk of {spool.root} on the agent's host is full or broken.",
    )


def _end_text(end: str) -> str:
    """``end`` as the trailer can hold it: printable, short, and not a word of the format's own."""
    text = "".join(char if char.isprintable() else "?" for char in end) or "ended"
    text = text.encode("utf-8")[:MAX_END].decode("utf-8", "ignore")
    return f"session {text}" if text in ABRUPT_ENDS else text


def _write_all(fd: int, data: bytes) -> None:
    written = os.write(fd, data)
    while written < len(data):  # a disk that fills up, or a signal: the rest, or its error
        written += os.write(fd, memoryview(data)[written:])
