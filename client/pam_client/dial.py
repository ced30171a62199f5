"""From a local connection to the agent: relay, ssh channel, SecureChannel.

One SSH connection to a relay serves all local connections of a session. When it is lost, or its relay has
no way to the gateway, the next dial makes another one, with the next relay of the platform's list if need
be. Every local connection has its own channel and its own Noise handshake.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

from pam_client.grants import Grants
from pam_client.session import RelayAddress, Session
from pam_common.errors import AuthenticationError, PamError, RefusedError, TruncatedError, UnavailableError
from pam_common.fast_ssh import ChannelStream, Transport, connect, open_direct
from pam_common.logging import get_logger, kv
from pam_common.secure_channel import SecureChannel, deadline
from pam_common.stream import Stream

log = get_logger("client.dial")

#: Reaching a relay by TCP; then the same for our handshake with the agent, whose platform call is not in it.
CONNECT_TIMEOUT = 10.0
HANDSHAKE_TIMEOUT = 20.0


class Dialer:
    """Opens SecureChannels for one connect. ``dial`` from any thread; ``close`` once, at the end."""

    def __init__(self, grants: Grants, now: Callable[[], float], on_lost: Callable[[], None]) -> None:
        """``on_lost`` is called when a link to a relay ends; in its thread, so it must not block."""
        self._grants = grants
        self._on_lost = on_lost
        self._now = now
        self._closed = False
        # Held while a relay is being reached: connections that come meanwhile share the result.
        self._lock = threading.Lock()
        # What belongs to one session; begun anew when another is granted.
        self._session = grants.current
        self._transports: dict[str, Transport] = {}  # by relay; at most one per relay
        self._order = list(grants.current.relays)  # the relay that worked last comes first

    def dial(self) -> Stream:
        """A new SecureChannel to an agent of the gateway, the grant presented.

        Raises AuthenticationError when a relay or agent is not who it must be, RefusedError with the
        relay's reason, UnavailableError when no relay leads there.
        """
        session, order = self._begin()
        problems: dict[str, PamError] = {}
        for relay in order:
            try:
                channel = self._channel(session, relay)
            except PamError as error:
                log.info("relay failed", extra=kv(session=session.id, relay=relay.name, error=error))
                problems[relay.name] = error
                continue
            return self._secure(session, channel, relay)
        raise self._summary(problems)

    def reach(self) -> None:
        """Connect to a relay without a channel: its certificate lasts minutes, and a person who is told
        where to connect should not find out later that nothing can be reached. Raises as :meth:`dial`."""
        session, order = self._begin()
        problems: dict[str, PamError] = {}
        for relay in order:
            try:
                self._transport(session, relay)
            except PamError as error:
                problems[relay.name] = error
            else:
                return
        raise self._summary(problems)

    def close(self) -> None:
        """End all links. Channels that are still open are cut."""
        with self._lock:
            self._closed = True
            self._drop_links()

    def _begin(self) -> tuple[Session, list[RelayAddress]]:
        with self._lock:
            linked = any(transport.is_active() for transport in self._transports.values())
            session = self._grants.for_use(linked=linked)
            if session is not self._session:
                self._drop_links()
                self._session = session
                self._order = list(session.relays)
            return session, list(self._order)

    def _drop_links(self) -> None:
        for transport in self._transports.values():
            transport.close()
        self._transports.clear()

    def _channel(self, session: Session, relay: RelayAddress) -> ChannelStream:
        transport, fresh = self._transport(session, relay)
        asked = time.monotonic()
        try:
            return self._open(session, relay, transport)
        except UnavailableError:
            # One that lives carries others: that an agent keeps the relay waiting is no reason to cut them.
            if fresh or (transport.is_active() and transport.heard > asked):
                raise
        # The kept connection was dead without our knowing: once more with a new one.
        transport.close()
        return self._open(session, relay, self._transport(session, relay)[0])

    def _open(self, session: Session, relay: RelayAddress, transport: Transport) -> ChannelStream:
        channel = open_direct(transport, session.gateway)
        with self._lock:
            self._order.sort(key=lambda other: other is not relay)
        return channel

    def _transport(self, session: Session, relay: RelayAddress) -> tuple[Transport, bool]:
        """The link to ``relay`` and whether it was just made."""
        with self._lock:
            if self._closed or session is not self._session:
                raise UnavailableError("the session is being closed")
            kept = self._transports.get(relay.name)
            if kept is not None and kept.is_active():
                return kept, False
            fresh = self._connect(session, relay)
            self._transports[relay.name] = fresh
            return fresh, True

    def _connect(self, session: Session, relay: RelayAddress) -> Transport:
        try:
            sock = socket.create_connection((relay.host, relay.port), timeout=CONNECT_TIMEOUT)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise UnavailableError(
                f"relay {relay.name} does not answer at {relay.host}:{relay.port}: {reason}",
                hint="is it up, and is a firewall between? Ask your administrator.",
            ) from None
        transport = connect(
            sock,
            name=f"relay-{relay.name}",
            host_ca=session.relay_host_ca,
            # Its name, not its address: unique, and the platform's to give.
            hostname=relay.name,
            login=session.ssh_key,
            now=self._now,
        )
        transport.on_end = self._on_lost
        log.info("relay reached", extra=kv(session=session.id, relay=relay.name))
        return transport

    def _secure(self, session: Session, channel: ChannelStream, relay: RelayAddress) -> Stream:
        try:
            with deadline(channel, HANDSHAKE_TIMEOUT, f"the handshake with gateway {session.gateway}"):
                secure = SecureChannel.connect(
                    channel,
                    gateway=session.gateway,
                    static=session.keys.noise,
                    check_agent=lambda key, statement: session.check_agent(key, statement, now=self._now()),
                    grant=session.grant.encode("ascii"),
                )
        except (OSError, TruncatedError):
            channel.close()
            raise UnavailableError(
                f"gateway {session.gateway} did not answer through relay {relay.name}",
                hint="its agent may just be restarting; try again.",
            ) from None
        except BaseException:
            channel.close()
            raise
        self._grants.mark_open(session)
        return secure

    @staticmethod
    def _summary(problems: dict[str, PamError]) -> PamError:
        """One error for all relays: the only one's own, or each relay with its reason."""
        if not problems:
            return UnavailableError("the platform names no relay", hint="ask your administrator.")
        if len({str(error) for error in problems.values()}) == 1:
            return next(iter(problems.values()))
        # Some name their relay themselves.
        words = {name: str(error).removeprefix(f"relay {name} ") for name, error in problems.items()}
        text = "; ".join(f"relay {name}: {said}" for name, said in words.items())
        for kind in (AuthenticationError, RefusedError):
            if all(isinstance(error, kind) for error in problems.values()):
                return kind(text)
        hint = next((error.hint for error in problems.values() if error.hint), "")
        return UnavailableError(f"no relay leads to the gateway: {text}", hint=hint)
