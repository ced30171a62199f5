"""The inbox: one outbound long poll, through which a kill arrives within a second.

It is also what says whether the platform can be heard at all: a session that nobody could kill any more
must not go on for ever, so the time since the last answer counts (``grace`` in agent.yml).
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pam_agent.api import POLL_SECONDS, AgentApi
from pam_agent.backoff import Backoff
from pam_common.errors import AuthenticationError, PamError, ProtocolError
from pam_common.keys import is_session_id
from pam_common.logging import get_logger, kv

log = get_logger("agent.inbox")

#: One 401 may be our clock, which its answer has just corrected; the second one is meant.
REVOKED_AFTER = 2
#: A revoked agent asks on, slowly: an administrator may have been too quick.
REVOKED_WAIT = 60.0
MAX_MESSAGES = 10_000
MAX_REASON = 200
MAX_PAUSE = 30.0
#: A DNS name's length.
MAX_HOST = 253

_SCAN = re.compile(r"k-[a-z2-7]{26}")


@dataclass(frozen=True)
class Message:
    """What the platform wants of this agent now. ``session`` is set for kill and end, the last three for
    scan."""

    kind: Literal["kill", "end", "reload", "scan"]
    session: str = ""
    reason: str = ""
    scan: str = ""
    host: str = ""
    port: int = 0


class Inbox:
    """Polls in a thread ``inbox``; calls ``deliver`` there for each message, in order."""

    def __init__(
        self,
        api: AgentApi,
        *,
        deliver: Callable[[Message], None],
        heard: Callable[[], None],
        revoked: Callable[[], None],
        back: Callable[[], None] = lambda: None,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self._api = api
        self._deliver = deliver
        self._heard = heard
        self._revoked = revoked
        self._back = back
        self._beat = beat
        self._cursor = -1
        self._refusals = 0
        self._backoff = Backoff(0.5, 15.0)
        self._last_heard = time.monotonic()
        self._trouble = ""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="inbox", daemon=True)

    def start(self) -> None:
        self._last_heard = time.monotonic()
        self._thread.start()

    def stop(self) -> None:
        """The poll under way is left to end by itself; its thread is a daemon."""
        self._stopping.set()

    @property
    def trouble(self) -> str:
        """Why the last poll failed, or empty."""
        return self._trouble

    def silent(self) -> float:
        """Seconds since the platform was last heard, 0 while polls succeed."""
        return time.monotonic() - self._last_heard if self._trouble else 0.0

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._beat()
            try:
                wait = self.poll()
            except Exception:  # kills come through here: a fault of ours must not end it
                log.exception("inbox failed")
                self._failed("a fault of the agent")
                wait = self._backoff.next()
            if wait > 0:
                self._stopping.wait(wait)

    def poll(self) -> float:
        """Ask once, deliver what came; returns the seconds to wait before the next time."""
        try:
            answer = self._api.inbox(self._cursor, POLL_SECONDS if self._cursor >= 0 else 0)
            cursor, messages, pause = parse(answer)
        except AuthenticationError as error:
            return self._not_accepted(error)
        except PamError as error:
            self._failed(str(error))
            return self._backoff.next()
        # Delivered before the cursor moves: after a fault they come again, and each is idempotent.
        for message in messages:
            self._deliver(message)
        self._cursor = cursor
        self._last_heard, self._refusals = time.monotonic(), 0
        if self._trouble:
            log.info("platform heard again")
            self._back()
        self._trouble = ""
        self._backoff.reset()
        self._heard()
        return pause

    def _not_accepted(self, error: PamError) -> float:
        self._failed(str(error))
        self._refusals += 1
        if self._refusals < REVOKED_AFTER:
            return 0.0  # at once: a revoked agent's sessions must end within a second
        self._revoked()
        return REVOKED_WAIT

    def _failed(self, reason: str) -> None:
        if reason != self._trouble:
            log.warning("platform not heard", extra=kv(reason=reason))
        self._trouble = reason


def parse(answer: dict[str, Any]) -> tuple[int, list[Message], float]:
    """Cursor, messages, seconds to pause. Unknown kinds are skipped: a newer platform may have more.

    Raises ProtocolError.
    """
    cursor, items, pause = answer.get("cursor"), answer.get("messages"), answer.get("retry_ms", 0)
    if type(cursor) is not int or cursor < 0 or not isinstance(items, list) or len(items) > MAX_MESSAGES:
        raise ProtocolError("the inbox answer is not one")
    if not isinstance(pause, int | float) or pause < 0:
        raise ProtocolError("the inbox answer has no pause")
    messages = [message for item in items if (message := _message(item)) is not None]
    return cursor, messages, min(pause / 1000, MAX_PAUSE)


def _message(item: object) -> Message | None:
    if not isinstance(item, dict):
        raise ProtocolError("an inbox message is not one")
    match item:
        case {"kind": "reload"}:
            return Message("reload")
        case {"kind": ("kill" | "end") as kind, "session": session} if is_session_id(session):
            reason = str(item.get("reason") or "")[:MAX_REASON]
            return Message(kind, session, "".join(char if char.isprintable() else "?" for char in reason))
        case {"kind": "scan", "scan": str(scan), "host": str(host), "port": int(port)}:
            if not _SCAN.fullmatch(scan) or not 1 <= len(host) <= MAX_HOST or not 0 < port < 65536:
                raise ProtocolError("an inbox message asks for a scan of nothing")
            return Message("scan", scan=scan, host=host, port=port)
        case {"kind": "kill" | "end"}:
            raise ProtocolError("an inbox message names no session")
        case {"kind": str(kind)}:
            log.warning("unknown inbox message", extra=kv(kind=kind[:40]))
            return None
        case _:
            raise ProtocolError("an inbox message is not one")
