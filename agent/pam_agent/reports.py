"""Tells the platform, once it can be reached, which sessions have ended and what administrators must know."""

from __future__ import annotations

import queue
import threading
import time
from typing import Any

from pam_agent.api import AgentApi
from pam_agent.backoff import Backoff
from pam_common.errors import PamError, UnavailableError
from pam_common.logging import get_logger, kv

log = get_logger("agent.session")

#: A day of sessions while the platform is away. What does not fit is in the recording as well.
MAX_WAITING = 10_000
#: Characters of an alarm's reason, as many as the platform takes.
MAX_REASON = 200


class Reports:
    """A bounded queue with one thread, ``reports``. ``add`` never blocks."""

    def __init__(self, api: AgentApi) -> None:
        self._api = api
        # A session and its report; or, for an alarm, the reason.
        self._queue: queue.Queue[tuple[str, dict[str, Any] | str]] = queue.Queue(MAX_WAITING)
        self._backoff = Backoff(1.0, 60.0)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reports", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def alarm(self, session: str, reason: str) -> None:
        """Have it in the audit trail that ``session`` met a target that is not who it must be."""
        text = "".join(char if char.isprintable() else "?" for char in reason)
        self.add(session, text[:MAX_REASON])

    def add(self, session: str, report: dict[str, Any] | str) -> None:
        try:
            self._queue.put_nowait((session, report))
        except queue.Full:
            log.error("end not reported", extra=kv(session=session, reason="too many wait"))

    @property
    def waiting(self) -> int:
        return self._queue.unfinished_tasks

    def stop(self, timeout: float) -> None:
        """Give what waits ``timeout`` seconds to leave."""
        give_up = time.monotonic() + timeout
        while self.waiting and time.monotonic() < give_up and self._thread.is_alive():
            time.sleep(0.02)
        self._stopping.set()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                session, report = self._queue.get(timeout=1.0)
            except queue.Empty:
                continue
            self._send(session, report)
            self._queue.task_done()

    def _send(self, session: str, report: dict[str, Any] | str) -> None:
        while not self._stopping.is_set():
            try:
                if isinstance(report, str):
                    self._api.alarm(session, report)
                else:
                    self._api.closed(session, report)
            except UnavailableError:
                self._stopping.wait(self._backoff.next())
            except PamError as error:
                # Refused for good: the platform has ended it by itself, say.
                log.warning("end not taken by the platform", extra=kv(session=session, reason=error))
                return
            else:
                self._backoff.reset()
                return
