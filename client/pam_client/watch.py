"""When and why a running session ended: its time, or what the platform says about it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from pam_client.grants import Grants
from pam_client.output import clean
from pam_common.errors import PamError

#: How often the platform is asked while nothing happens, in seconds: an idle session that was ended is
#: noticed within it. A lost connection asks at once.
POLL = 20.0
#: After a connection was lost the platform may hear of it later than we do.
SETTLE = 1.0
_OVER = "the session's time is over"


class Watch:
    """Asks in a thread of its own until the session has ended; then ``ended`` is set, ``reason`` says why."""

    def __init__(
        self, grants: Grants, *, ask: Callable[[str], dict[str, Any]], now: Callable[[], float]
    ) -> None:
        self._grants = grants
        self._ask = ask
        self._now = now
        self.ended = threading.Event()
        self.reason = ""
        self._look = threading.Event()
        self._thread = threading.Thread(target=self._run, name="session-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def left(self) -> float:
        """Seconds until the session's time is over."""
        return self._grants.current.session_end - self._now()

    def look_now(self) -> None:
        """Something failed: ask the platform soon whether the session goes on."""
        self._look.set()

    def settle(self) -> None:
        """A connection was lost: whether that was the session's end, as far as it can be known by now."""
        if self.left() <= 0:
            self._end(_OVER)
        # Asked twice: the agent's word of the end may reach the platform after ours.
        elif not self._check() and not self.ended.wait(SETTLE):
            self._check()

    def stop(self) -> None:
        """End watching; ``reason`` stays what it is."""
        self.ended.set()
        self._look.set()

    def _run(self) -> None:
        while not self.ended.is_set():
            hurried = self._look.wait(max(0.0, min(POLL, self.left())))
            if self.ended.is_set():
                return
            if hurried:
                self._look.clear()
                self.settle()
            elif self.left() <= 0:
                self._end(_OVER)
            else:
                self._check()

    def _check(self) -> bool:
        """Ask once; True when the session has ended. An unreachable platform ends nothing."""
        session = self._grants.current
        try:
            answer = self._ask(session.id)
        except PamError:
            return False
        state = answer.get("state")
        if state not in ("ended", "expired") or session is not self._grants.current:
            return False
        if state == "expired" and not self._grants.is_open():
            return False  # a grant that was not used in time; the next connection brings another
        reason = clean(answer.get("end_reason") or state, limit=200)
        self._end(f"the session was ended: {reason}")
        return True

    def _end(self, reason: str) -> None:
        self.reason = reason
        self.ended.set()
