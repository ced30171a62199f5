"""Uploader: brings finished parts to the platform, and deletes each after the platform's receipt.

    GET  …/{session}/{part}            how much is there already
    PUT  …/{session}/{part}?offset=N   the rest, piece by piece
    POST …/{session}/{part}/head       the final head: the platform checks everything → complete

One thread, oldest part first. A part that fails goes to the end of the queue, so none blocks the others;
one that the platform will never accept is put aside in the spool's ``refused`` folder, never deleted.
"""

from __future__ import annotations

import os
import random
import threading
import time
from typing import Any

from pam_agent.receipts import Receipts
from pam_agent.spool import ReadyPart, Spool
from pam_common.errors import AuthenticationError, PamError, ProtocolError, RefusedError, UnavailableError
from pam_common.logging import get_logger, kv
from pam_common.platform_client import ConflictError, PlatformClient
from pam_common.recording.format import Head, RecordingError
from pam_common.recording.scan import final_head

log = get_logger("agent.uploader")

#: One request's bytes, and the memory an upload takes. The API takes 4 MiB; a quarter loses less when a
#: slow line is cut.
PIECE = 1 << 20
#: First and longest wait after a failure, in seconds.
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0
#: The platform checks the whole chain before it answers the final head: about 1 s per gigabyte.
FINAL_TIMEOUT = 120.0
#: As often may the platform say 409 without any progress before the part is put aside.
MAX_CONFLICTS = 5


class Uploader:
    """Uploads what the spool has ready, from a thread of its own."""

    def __init__(self, spool: Spool, platform: PlatformClient) -> None:
        self._spool, self._platform = spool, platform
        self._receipts = Receipts(spool.root / "receipts", platform)
        self._wake = threading.Event()
        self._stopping = threading.Event()
        # Per waiting part, so bounded by the files in the spool: failures so far (orders the queue) and
        # conflicts in a row.
        self._failures: dict[str, int] = {}
        self._conflicts: dict[str, int] = {}
        self._sent = 0
        self._completed = 0
        self._trouble = ""
        self._thread = threading.Thread(target=self._run, name="uploader", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """There is a new part, or the platform is known to be back: look now."""
        self._wake.set()

    def platform_is_back(self) -> None:
        """It was away: see whether it still has what it acknowledged."""
        self._receipts.soon()
        self._wake.set()

    def stop(self, timeout: float = 5.0) -> None:
        """Stop after the request under way; the rest is uploaded by the next start."""
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def status(self) -> dict[str, Any]:
        """For ``status``: what waits, what was done by this process, the last trouble."""
        waiting = self._spool.ready()
        return {
            "running": self._thread.is_alive(),
            "pending": len(waiting),
            "pending_bytes": sum(ready.size for ready in waiting),
            "uploaded": self._completed,
            "uploaded_bytes": self._sent,
            "trouble": self._trouble,
            "lost": self._receipts.lost,
        }

    def wait_until_empty(self, timeout: float) -> bool:
        """Whether nothing waits any more, within ``timeout`` seconds (for a clean shutdown)."""
        deadline = time.monotonic() + timeout
        while self._spool.ready():
            if time.monotonic() >= deadline or self._stopping.wait(0.05):
                return False
        return True

    def _run(self) -> None:
        wait = FIRST_WAIT
        while not self._stopping.is_set():
            self._wake.clear()  # before looking: a part that comes later sets it again
            ready, sent = self._next(), self._sent
            if ready is None:
                self._receipts.check()
                self._trouble, wait = "", FIRST_WAIT
                self._wake.wait(LONGEST_WAIT)  # a person may have moved a refused part back
            elif self._attempt(ready):
                self._trouble, wait = "", FIRST_WAIT
            else:
                if self._sent > sent:  # a line that is cut now and then still gets on
                    wait = FIRST_WAIT
                # Not cut short by wake(): a busy agent must not turn into a busy loop.
                self._stopping.wait(wait * random.uniform(0.5, 1.0))  # noqa: S311  jitter, not a secret
                wait = min(wait * 2, LONGEST_WAIT)
        self._platform.close()

    def _next(self) -> ReadyPart | None:
        try:
            waiting = self._spool.ready()
        except OSError as error:
            log.error("spool cannot be read", extra=kv(reason=error.strerror))
            return None
        known = {ready.path.name for ready in waiting}
        self._failures = {name: n for name, n in self._failures.items() if name in known}
        self._conflicts = {name: n for name, n in self._conflicts.items() if name in known}
        return min(waiting, key=lambda ready: self._failures.get(ready.path.name, 0), default=None)

    def _attempt(self, ready: ReadyPart) -> bool:
        """Upload one part, or find that it is to be put aside. False: try again later."""
        name = ready.path.name
        try:
            self._upload(ready)
        except ConflictError as error:
            self._conflicts[name] = self._conflicts.get(name, 0) + 1
            if self._conflicts[name] >= MAX_CONFLICTS:
                return self._put_aside(ready, error)
            return self._later(ready, error)
        except (UnavailableError, AuthenticationError, ProtocolError) as error:
            # 401 is no verdict on the part: a clock, or an agent not known at the moment.
            return self._later(ready, error)
        except (RefusedError, RecordingError) as error:
            return self._put_aside(ready, error)
        except OSError as error:
            return self._later(ready, PamError(error.strerror or type(error).__name__))
        self._completed += 1
        self._failures.pop(name, None)
        self._conflicts.pop(name, None)
        log.info("recording uploaded", extra=kv(session=ready.session, recording_part=ready.part))
        return True

    def _upload(self, ready: ReadyPart) -> None:
        path = f"/agent/recordings/{ready.session}/{ready.part}"
        fd = os.open(ready.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            state = self._platform.get(path)
            head = final_head(file)
            if state.get("complete") is not True:
                self._send(ready, path, fd, _received(state, ready.size))
                self._close(path, head)
        self._receipts.add(head)
        self._spool.delete(ready)

    def _send(self, ready: ReadyPart, path: str, fd: int, offset: int) -> None:
        while offset < ready.size:
            if self._stopping.is_set():
                raise UnavailableError("the agent is stopping")
            piece = os.pread(fd, PIECE, offset)
            try:
                answer = self._platform.put(f"{path}?offset={offset}", data=piece)
            except ConflictError as error:
                # Another request of ours arrived after all: go on where the platform is.
                answer = error.body
                if _received(answer, ready.size) == offset:
                    raise
            received = _received(answer, ready.size)
            if received > offset:
                self._sent += received - offset
                self._conflicts.pop(ready.path.name, None)
            elif received == offset:
                raise ProtocolError("the platform takes no bytes of the recording")
            offset = received

    def _close(self, path: str, head: Head) -> None:
        answer = self._platform.post(f"{path}/head", json=head.to_json(), timeout=FINAL_TIMEOUT)
        if answer.get("complete") is not True:
            raise UnavailableError("the platform has not completed the recording yet")

    def _later(self, ready: ReadyPart, error: PamError) -> bool:
        name = ready.path.name
        self._failures[name] = self._failures.get(name, 0) + 1
        if str(error) != self._trouble:  # one line per trouble, not per attempt
            fields = kv(session=ready.session, recording_part=ready.part, reason=error)
            log.warning("recording not uploaded, will try again", extra=fields)
        self._trouble = str(error)
        return False

    def _put_aside(self, ready: ReadyPart, error: PamError) -> bool:
        try:
            self._spool.refuse(ready)
        except (OSError, PamError) as problem:
            return self._later(ready, PamError(f"it could not be put aside: {problem}"))
        fields = kv(session=ready.session, recording_part=ready.part, reason=error, kept="spool/refused")
        log.error("platform refuses a recording", extra=fields)
        return True


def _received(answer: dict[str, Any], size: int) -> int:
    received = answer.get("received")
    if type(received) is not int or not 0 <= received <= size:
        raise ProtocolError("the platform does not say how much of the recording it has")
    return received
