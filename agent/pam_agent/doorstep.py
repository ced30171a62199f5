"""From a forwarded ssh channel to a verified grant: the part that strangers can reach.

Whatever comes down a tunnel is a stranger until the Noise handshake has ended and its grant has been
verified for this gateway and for the very key of that handshake. Until then it gets ten seconds, one of a
bounded number of places, and no words beyond "refused".
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress

from pam_agent.registry import SessionRegistry
from pam_agent.state import AgentState
from pam_common.errors import AuthenticationError, PamError
from pam_common.keys import is_session_id
from pam_common.logging import get_logger, kv
from pam_common.secure_channel import SecureChannel, deadline
from pam_common.stream import Stream
from pam_common.tokens import Grant

log = get_logger("agent.session")

#: Three messages, one of them after the client has verified ours.
HANDSHAKE_TIMEOUT = 10.0
#: Handshakes at once. Each takes milliseconds of CPU; whoever stalls all places blocks for ten seconds.
MAX_HANDSHAKES = 128


class Doorstep:
    """Takes the channels of all tunnels; each gets a thread of its own."""

    def __init__(self, state: AgentState, registry: SessionRegistry, now: Callable[[], float]) -> None:
        self._state = state
        self._registry = registry
        self._now = now
        self._taken = 0
        self._condition = threading.Condition()

    def welcome(self, stream: Stream, origin: str, done: Callable[[], None]) -> None:
        """Start serving ``stream``; never blocks. ``origin`` is what the relay says of it (unverified: it
        only names the thread). The stream is closed, then ``done`` called, in every case."""
        if not self._take_place():
            log.warning("channel refused", extra=kv(reason="too many handshakes"))
            stream.abort()
            done()
            return
        name = f"session-{origin}" if is_session_id(origin) else "session-unknown"
        thread = threading.Thread(target=self._serve, args=(stream, done), name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system gives no more threads
            self._leave_place()
            stream.abort()
            done()

    def wait_empty(self, timeout: float) -> bool:
        """Wait until everybody who came was refused or is known to the registry; True if so."""
        with self._condition:
            return self._condition.wait_for(lambda: not self._taken, max(0.0, timeout))

    def _take_place(self) -> bool:
        with self._condition:
            if self._taken >= MAX_HANDSHAKES:
                return False
            self._taken += 1
            return True

    def _leave_place(self) -> None:
        with self._condition:
            self._taken -= 1
            self._condition.notify_all()

    def _serve(self, stream: Stream, done: Callable[[], None]) -> None:
        place = ExitStack()
        place.callback(self._leave_place)
        try:
            with place:
                arrived = self._admit(stream, place)
                if arrived is not None:
                    channel, grant = arrived
                    try:
                        self._registry.serve(grant, channel, entered=place.close)
                    finally:
                        channel.close()
        finally:
            with suppress(OSError):
                stream.close()
            done()

    def _admit(self, stream: Stream, place: ExitStack) -> tuple[SecureChannel, Grant] | None:
        """The channel and the verified grant, or None when the peer was refused. The place is given up before
        words are lost on one that may not read them."""
        standing = self._state.standing
        try:
            with deadline(stream, HANDSHAKE_TIMEOUT):
                channel, payload = SecureChannel.accept(
                    stream,
                    gateway=standing.gateway,
                    static=self._state.keys.noise,
                    statement=standing.statement.encode(),
                )
        except (PamError, OSError) as error:
            log.info("handshake failed", extra=kv(reason=str(error) or type(error).__name__))
            stream.abort()
            return None
        try:
            return channel, self._verify(payload, channel.peer)
        except AuthenticationError as error:
            place.close()
            log.warning("grant refused", extra=kv(reason=str(error)))
            with suppress(PamError, OSError), deadline(stream, HANDSHAKE_TIMEOUT):
                channel.send_error(str(error))
            return None

    def _verify(self, payload: bytes, peer: bytes) -> Grant:
        standing, now = self._state.standing, self._now()
        if standing.trust.expires <= now:
            raise AuthenticationError(
                "this agent's trust list has expired", hint="does the agent reach the platform?"
            )
        grant = Grant.parse(
            payload,
            standing.trust.grant_keys,
            issuer=standing.issuer,
            gateway=standing.gateway,
            now=now,
            first_opening=False,  # who opens the session knows whether it is, and checks then
        )
        grant.require_key(peer)
        return grant
