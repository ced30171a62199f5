"""All sessions of this agent: who may join one, which are over, and what ends them.

A connection arrives with a verified grant (:meth:`SessionRegistry.serve`). The first one of a session
opens it with the platform, once, while the others wait for the same answer; each later one only joins.
Ended sessions are remembered until their grant can no longer be shown, so a grant never reopens one.
"""

from __future__ import annotations

import gc
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from pam_agent.config import Limits
from pam_agent.conversation import LiveConversation
from pam_agent.protocols.base import Interceptor, Opening, TargetIdentityError
from pam_agent.session import LOST, RECORDING, End, Part, Session, suspend_aware_clock
from pam_agent.target import TargetRules
from pam_common.errors import AuthenticationError, PamError, RefusedError, UnavailableError
from pam_common.logging import get_logger, kv
from pam_common.secure_channel import SecureChannel, deadline
from pam_common.tokens import Grant

log = get_logger("agent.session")

#: What a refusal may take: a protocol's first message read, the error written.
REFUSAL_TIMEOUT = 10.0
#: For a client that does not read to take the end of its stream.
FAREWELL_TIMEOUT = 10.0
#: Ids of ended sessions kept. Beyond it the oldest goes; the platform refuses those as well.
MAX_REMEMBERED = 20_000
#: For a kill of a session that was never seen here: no policy grants longer sessions.
REMEMBER_UNSEEN = 7 * 86400.0

#: Asks the platform, starts the recording, makes the session's Interceptor. Raises PamError, also for a grant
#: that comes too late to open a session that never was. The second argument is to be called, once, when the
#: recording fails later.
Opener = Callable[[Grant, Callable[[PamError], None]], tuple[Opening, Interceptor, Part]]


class SessionRegistry:
    """Safe for use from several threads. ``report`` gets each finished session's report, ``alarm`` why a
    session's target was not who it must be."""

    def __init__(
        self,
        *,
        protocols: Mapping[str, type[Interceptor]],
        limits: Limits,
        rules: Callable[[], TargetRules],
        opener: Opener,
        report: Callable[[str, dict[str, Any]], None],
        alarm: Callable[[str, str], None] = lambda session, reason: None,
        platform_now: Callable[[], float] = time.time,
        clock: Callable[[], float] = suspend_aware_clock,
    ) -> None:
        self._protocols = protocols
        self._limits = limits
        self._rules = rules
        self._opener = opener
        self._report = report
        self._alarm = alarm
        self._platform_now = platform_now
        self._clock = clock
        self._condition = threading.Condition()
        self._sessions: dict[str, Session] = {}
        self._over: OrderedDict[str, tuple[float, End]] = OrderedDict()
        self._connections = 0
        self._closing: End | None = None
        self._forget = False  # a session is over, and something may still hold its credential

    # -- connections ---------------------------------------------------------------------------------

    def serve(self, grant: Grant, channel: SecureChannel, entered: Callable[[], None] = lambda: None) -> None:
        """Carry one connection to its end, in the calling thread. ``channel.peer`` must be checked
        against the grant by the caller. Failures are told to the client, then logged. ``entered`` is called
        once its session is known here, so that ``close`` finds it, or once it is known to be refused."""
        interceptor = self._protocols.get(grant.protocol)
        if interceptor is None:
            entered()
            self._log_refusal(grant, "unknown protocol")
            channel.send_error(f"this agent does not speak {grant.protocol}; it may need an update")
            return
        try:
            self._count(+1)
        except PamError as error:
            entered()
            self._refuse(interceptor, grant, channel, error)
            return
        try:
            with self._arrival(grant, entered) as session:
                conversation = session.join(channel)
        except PamError as error:
            self._refuse(interceptor, grant, channel, error)
        else:
            self._carry(session, conversation)
        finally:
            self._count(-1)

    def _carry(self, session: Session, conversation: LiveConversation) -> None:
        fields = {"session": session.id, "connection": conversation.number}
        log.info("connection opened", extra=kv(**fields))
        outcome = "end"
        try:
            session.interceptor.serve(conversation.client, conversation)
            _end_cleanly(conversation)
        except PamError as error:
            outcome = str(error)  # the client was told, in its protocol's form
            if isinstance(error, TargetIdentityError) and session.first_alarm():
                self._alarm(session.id, outcome)
            _end_cleanly(conversation)
        except OSError as error:
            outcome = f"cut: {error.strerror or error}"
        except Exception:
            # A fault of ours ends this connection only; the client sees a cut stream, never a clean end.
            log.exception("interceptor failed", extra=kv(**fields))
            conversation.abort_client()
            outcome = "fault"
        finally:
            session.leave(conversation)
            up, down = conversation.client.bytes_up, conversation.client.bytes_down
            log.info("connection closed", extra=kv(**fields, outcome=outcome, up=up, down=down))

    def _count(self, change: int) -> None:
        with self._condition:
            if change > 0 and self._connections >= self._limits.connections:
                raise RefusedError("the agent has no room for more connections", hint="try again later.")
            self._connections += change
            self._condition.notify_all()

    def _refuse(
        self, interceptor: type[Interceptor], grant: Grant, channel: SecureChannel, error: PamError
    ) -> None:
        self._log_refusal(grant, str(error))
        with suppress(PamError, OSError), deadline(channel, REFUSAL_TIMEOUT):
            interceptor.refuse(channel, str(error), error.hint)
            channel.shutdown(socket.SHUT_WR)

    @staticmethod
    def _log_refusal(grant: Grant, reason: str) -> None:
        fields = kv(session=grant.session, account=grant.account, reason=reason)
        log.warning("connection refused", extra=fields)

    # -- sessions ------------------------------------------------------------------------------------

    @contextmanager
    def _arrival(self, grant: Grant, entered: Callable[[], None]) -> Iterator[Session]:
        """The open session of ``grant``, opened first if need be, and in use until the connection has
        joined it. Raises PamError."""
        try:
            with self._condition:
                session, first = self._find_or_add(grant)
                session.arriving += 1
        finally:
            entered()
        try:
            if first:
                self._open(session)
            session.wait_open()
            yield session
        finally:
            with self._condition:
                session.arriving -= 1

    def _find_or_add(self, grant: Grant) -> tuple[Session, bool]:
        over = self._over.get(grant.session)
        if over is not None:
            raise RefusedError(over[1].message, hint="connect again for a new session.")
        session = self._sessions.get(grant.session)
        if session is not None:
            # One session, one key, one account: whatever was signed under this id later is not it.
            grant.require_key(session.grant.client_key)
            if (grant.account, grant.protocol) != (session.grant.account, session.grant.protocol):
                raise AuthenticationError("the grant is for another account than its session")
            return session, False
        if self._closing is not None:
            raise UnavailableError(
                self._closing.message, hint="connect again: another agent may serve the gateway."
            )
        if len(self._sessions) >= self._limits.sessions:
            raise RefusedError("the agent has no room for more sessions", hint="try again later.")
        session = Session(
            grant,
            rules=self._rules,
            max_connections=self._limits.connections_per_session,
            on_end=self._ended,
            clock=self._clock,
        )
        self._sessions[grant.session] = session
        return session, True

    def _open(self, session: Session) -> None:
        """Ask the platform, once per session; on failure the session is as if it had never been."""
        grant = session.grant
        fields = kv(session=session.id, account=grant.account, user=grant.user)

        def failed(_error: PamError) -> None:
            session.request_end(RECORDING)

        try:
            opening, interceptor, part = self._opener(grant, failed)
        except Exception as error:
            if isinstance(error, PamError):
                session.set_failed(error)
            else:
                log.exception("opening failed", extra=fields)
                session.set_failed(RefusedError("the agent failed to open the session"))
            with self._condition:
                if session.end is None and self._sessions.get(session.id) is session:
                    del self._sessions[session.id]
            self._forget = True
            return
        remaining = opening.session_end - self._platform_now()
        session.set_open(opening, interceptor, part, remaining)
        log.info("session opened", extra=fields)

    def _ended(self, session: Session) -> None:
        """Called once per session, by whoever ended it."""
        assert session.end is not None
        self._remember(session.id, session.end, session.grant.session_end - self._platform_now())
        log.info("session ending", extra=kv(session=session.id, reason=session.end.code))
        thread = threading.Thread(target=self._finish, args=(session,), name=f"session-{session.id}-end")
        thread.daemon = True
        thread.start()

    def _finish(self, session: Session) -> None:
        try:
            report = session.finish()
            log.info("session ended", extra=kv(session=session.id, connections=session.connections))
            if report is not None:
                self._report(session.id, report)
        finally:
            with self._condition:
                self._forget = True
                self._sessions.pop(session.id, None)
                self._condition.notify_all()

    def _remember(self, session: str, end: End, seconds: float) -> None:
        with self._condition:
            self._over[session] = (self._clock() + max(seconds, 0.0) + 60, end)
            while len(self._over) > MAX_REMEMBERED:
                self._over.popitem(last=False)

    # -- what ends them ------------------------------------------------------------------------------

    def end(self, session_id: str, end: End) -> None:
        """End one session at once. One that is not here is remembered: it may be on its way."""
        with self._condition:
            session = self._sessions.get(session_id)
        if session is not None:
            session.request_end(end)
        elif session_id not in self._over:
            self._remember(session_id, end, REMEMBER_UNSEEN)

    def end_all(self, end: End) -> None:
        """End every session at once."""
        with self._condition:
            sessions = list(self._sessions.values())
        for session in sessions:
            session.request_end(end)

    def tick(self, *, silent: float = 0.0, grace: float = float("inf")) -> None:
        """To be called four times a second: ends what is overdue, or all when the platform was ``silent``
        for longer than ``grace`` seconds; forgets what no grant can reopen any more."""
        now = self._clock()
        with self._condition:
            sessions = list(self._sessions.values())
            for session_id in [key for key, (until, _) in self._over.items() if until <= now]:
                del self._over[session_id]
        for session in sessions:
            end = LOST if silent > grace else session.overdue()
            if end is not None:
                session.request_end(end)
        if self._forget:
            # A traceback refers to its frames and they to it, and with them to the credential: Python
            # frees such a cycle only when it happens to look, which an idle agent may not do for days.
            # Here, not at each end: one look does for all that ended meanwhile.
            self._forget = False
            gc.collect()

    def close(self, end: End) -> None:
        """Open no session any more and end those without a connection; the others may go on."""
        with self._condition:
            self._closing = end
            # In this order: who has arrived is live, or has left.
            unused = [row for row in self._sessions.values() if not row.arriving and not row.live]
        for session in unused:
            session.request_end(end)

    def wait_empty(self, timeout: float) -> bool:
        """Wait until no session is left; True if so. After ``close`` a session ends with its last
        connection."""
        give_up = time.monotonic() + timeout
        while time.monotonic() < give_up:
            with self._condition:
                if not self._sessions:
                    return True
                self._condition.wait(min(0.5, max(0.0, give_up - time.monotonic())))
                closing = self._closing
            if closing is not None:
                self.close(closing)
        return not self._sessions

    # -- what it tells -------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._sessions)

    def status(self) -> list[dict[str, object]]:
        with self._condition:
            return [session.status() for session in self._sessions.values()]


def _end_cleanly(conversation: LiveConversation) -> None:
    """What the client got was all: without this it would read a cut stream."""
    client = conversation.client
    with suppress(PamError, OSError), deadline(client, FAREWELL_TIMEOUT):
        client.shutdown(socket.SHUT_WR)
