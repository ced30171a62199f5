"""One session: what a grant opened, from its first use to its end.

    opening ──▶ open ──▶ ending ──▶ finished
        └──(refused)──────────────────▲

``request_end`` may be called from any thread and returns at once: it notes the reason, then shuts the target
sockets, which wakes an Interceptor wherever it is blocked. The registry then ``finish``es the session
in a thread of its own: a moment for last words to the client, then the client streams are cut
too, the connections' threads are awaited, and the recording is finalised.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from pam_agent.conversation import LiveConversation
from pam_agent.protocols.base import Event, Interceptor, Opening
from pam_agent.target import TargetRules
from pam_common.errors import PamError, RefusedError
from pam_common.logging import get_logger, kv
from pam_common.stream import Stream
from pam_common.tokens import Grant

log = get_logger("agent.session")

#: Time for an Interceptor to tell its client why, in the protocol's own words.
LAST_WORDS = 0.3
#: A wait for threads of ours goes by in such steps: what keeps them from running keeps us as often.
STEP = 0.02
#: With both sides shut down, a thread that runs on is stuck in something else (a name resolver, say).
STRAGGLER_TIMEOUT = 10.0
#: The platform's answer is bounded at 10 s; more is not worth a user's wait.
OPENING_TIMEOUT = 20.0
#: What a trickling answer can take before PlatformClient gives it up, and then some.
SETTLE_TIMEOUT = 180.0


def suspend_aware_clock() -> float:
    """Seconds that go on while the machine sleeps: a session must not outlive its end by a suspend."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True)
class End:
    """Why a session ended: a word for the platform, and a sentence for the user."""

    code: str
    message: str


EXPIRED = End("expired", "the session has expired: its time is over")
IDLE = End("idle", "the session was idle for too long")
ENDED = End("ended", "the session was ended by its user")
STOPPING = End("agent-stopped", "the agent is stopping")
LOST = End("unauthorised", "the platform can no longer be asked whether this session may go on")
REVOKED = End("revoked", "the agent is no longer part of its gateway")
RECORDING = End("recording-failed", "the session cannot be recorded any more")


def killed(reason: str) -> End:
    """The end of a session that somebody killed, for ``reason`` (may be empty)."""
    return End("killed", f"the session was killed: {reason}" if reason else "the session was killed")


class Part(Protocol):
    """The recording of one session by this agent, as the Recorder gives it."""

    def record(self, connection: int, events: Sequence[Event]) -> None:
        """Returns when the kernel has the events. Raises PamError when it cannot."""

    def finalise(self, end: str) -> None:
        """End it with ``end`` as the reason and hand it to the upload; ``record`` raises afterwards."""


class Session:
    """The state that a session's connections share. Safe for use from several threads."""

    def __init__(
        self,
        grant: Grant,
        *,
        rules: Callable[[], TargetRules],
        max_connections: int,
        on_end: Callable[[Session], None],
        clock: Callable[[], float] = suspend_aware_clock,
    ) -> None:
        self.grant = grant
        self.id = grant.session
        self.rules = rules
        self.started = clock()
        self.connections = 0  #: ever
        self.arriving = 0  #: connections on their way to ``join``; under the registry's lock
        self.end: End | None = None
        self._max_connections = max_connections
        self._on_end = on_end
        self._clock = clock
        self._condition = threading.Condition()
        self._live: set[LiveConversation] = set()
        self._settled = threading.Event()  # opened, or failed to
        self._failure: PamError | None = None
        self._opening: Opening | None = None
        self._interceptor: Interceptor | None = None
        self._part: Part | None = None
        self._deadline = float("inf")
        self._last_activity = self.started
        self._bytes = [0, 0]
        self._alarmed = False

    def first_alarm(self) -> bool:
        """Whether nobody was alarmed about this session yet: its user may try again and again."""
        with self._condition:
            before, self._alarmed = self._alarmed, True
            return not before

    # -- opening -------------------------------------------------------------------------------------

    def set_open(self, opening: Opening, interceptor: Interceptor, part: Part, remaining: float) -> None:
        """Let connections in; ``remaining`` seconds are left. What an end came for meanwhile stays shut."""
        with self._condition:
            self._opening, self._interceptor, self._part = opening, interceptor, part
            self._last_activity = self._clock()
            self._deadline = self._last_activity + remaining
        self._settled.set()

    def set_failed(self, error: PamError) -> None:
        """Tell everyone who waits for the opening that it failed, and why."""
        self._failure = error
        self._settled.set()

    def wait_open(self) -> None:
        """Wait for the one opening in flight. Raises RefusedError with its reason when it failed."""
        if not self._settled.wait(OPENING_TIMEOUT):
            raise RefusedError("the session is still being opened", hint="try again in a moment.")
        if self._failure is not None:
            # Each thread that waits raises its own; not every kind of error can be made from a message.
            raise RefusedError(str(self._failure), hint=self._failure.hint)

    # -- connections ---------------------------------------------------------------------------------

    def join(self, client: Stream) -> LiveConversation:
        """Count one more connection. Raises RefusedError when the session is over or full."""
        with self._condition:
            if self.end is not None:
                raise RefusedError(self.end.message)
            if len(self._live) >= self._max_connections:
                raise RefusedError(
                    f"the session already has {self._max_connections} connections",
                    hint="close some of them, or make the pool smaller.",
                )
            self.connections += 1
            conversation = LiveConversation(self, self.connections, client)
            self._live.add(conversation)
            self._last_activity = self._clock()
            return conversation

    def leave(self, conversation: LiveConversation) -> None:
        """The connection's thread is done with it."""
        conversation.release()
        with self._condition:
            self._live.discard(conversation)
            self._bytes[0] += conversation.client.bytes_up
            self._bytes[1] += conversation.client.bytes_down
            self._last_activity = self._clock()
            self._condition.notify_all()

    @property
    def opening(self) -> Opening:
        opening = self._opening
        if opening is None:
            raise RefusedError(self.end.message if self.end else "the session is not open")
        return opening

    @property
    def interceptor(self) -> Interceptor:
        interceptor = self._interceptor
        if interceptor is None:
            raise RefusedError(self.end.message if self.end else "the session is not open")
        return interceptor

    @property
    def end_reason(self) -> str | None:
        return self.end.message if self.end else None

    def touch(self) -> None:
        # Without the lock: a float is written whole, and whoever reads it does so four times a second only.
        self._last_activity = self._clock()

    def record(self, connection: int, events: Sequence[Event]) -> None:
        """Write events; a recording that cannot go on ends the session before anything is forwarded."""
        part = self._part
        if part is None:
            raise RefusedError(self.end_reason or "the session is not open")
        try:
            part.record(connection, events)
        except PamError:
            self.request_end(RECORDING)
            raise

    # -- the end -------------------------------------------------------------------------------------

    def overdue(self) -> End | None:
        """The end that time brings, if it has come."""
        now = self._clock()
        if now >= self._deadline:
            return EXPIRED
        limit = self._opening.idle_limit if self._opening else 0
        if limit and now - self._last_activity >= limit:
            return IDLE
        return None

    def request_end(self, end: End) -> bool:
        """Stop the session at once, from any thread; True for the call that did it. Never blocks."""
        with self._condition:
            if self.end is not None:
                return False
            self.end = end
            live = list(self._live)
            self._condition.notify_all()
        for conversation in live:
            conversation.abort_targets()
        self._on_end(self)
        return True

    def finish(self) -> dict[str, object] | None:
        """After ``request_end``: cut the clients, await the threads, finalise the recording, forget the
        credential. Returns the report for the platform, or None when the session never opened."""
        assert self.end is not None
        if not self._wait_empty(LAST_WORDS):
            with self._condition:
                live = list(self._live)
            for conversation in live:
                conversation.abort_client()
            if not self._wait_empty(STRAGGLER_TIMEOUT):
                log.error("connection threads still busy", extra=kv(session=self.id, count=self.live))
        self._settled.wait(SETTLE_TIMEOUT)
        part, opening = self._part, self._opening
        self._part = self._interceptor = self._opening = None
        if part is None or opening is None:
            return None
        part.finalise(self.end.code)
        return {
            "part": opening.part,
            "reason": self.end.code,
            "connections": self.connections,
            "bytes_up": self._bytes[0],
            "bytes_down": self._bytes[1],
        }

    def _wait_empty(self, timeout: float) -> bool:
        with self._condition:
            for _ in range(max(1, round(timeout / STEP))):
                if self._condition.wait_for(lambda: not self._live, STEP):
                    return True
            return not self._live

    # -- what it tells -------------------------------------------------------------------------------

    @property
    def live(self) -> int:
        """Connections that are open now."""
        return len(self._live)

    def status(self) -> dict[str, object]:
        now = self._clock()
        return {
            "session": self.id,
            "account": self.grant.account,
            "user": self.grant.user,
            "connections": self.live,
            "state": "ending" if self.end else "open" if self._opening else "opening",
            "age": int(now - self.started),
            "idle": int(now - self._last_activity),
        }
