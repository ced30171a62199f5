"""The relay itself: accepts SSH connections, admits them, joins a client's channel to an agent's tunnel.

    accept ──▶ Link (its own reader thread) ──▶ admitted ─┬ serve:    tcpip-forward ──▶ Routes
    (limits)   (clock: login time limit)                  └ connect:  direct-tcpip ──▶ choose ──▶ Splice

The relay never dials: every channel it opens goes down a tunnel that an agent made. It works from a
:class:`Bundle` alone; who fetches that is not its business.

Threads: one accepts, one watches the clock, one per connection reads and carries what it read; a channel
has one while it is being opened. All counts are bounded by :class:`Limits`.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from paramiko.common import OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED, OPEN_FAILED_CONNECT_FAILED

from pam_common import fast_ssh
from pam_common.errors import AuthenticationError, PamError
from pam_common.fast_ssh import ChannelStream, IncomingChannel
from pam_common.logging import get_logger, kv
from pam_common.memory import give_back
from pam_common.ssh_certs import CertificateKey
from pam_relay.admission import Identity, check_standing
from pam_relay.bundle import Bundle
from pam_relay.config import Limits
from pam_relay.entrance import Entrance, bind
from pam_relay.link import Link
from pam_relay.metrics import Metrics
from pam_relay.routes import Route, Routes
from pam_relay.splice import Splice, Summary

log = get_logger("relay.server")

#: Seconds an agent has to take a channel; its own part is only to accept it.
OPEN_TIMEOUT = 10.0
#: How many tunnels are tried for one channel when the first turns out to be dead.
OPEN_TRIES = 3
#: Bytes that may wait for one link. Room is given by the ends and held back while a link is behind, so that
#: little more than first windows can pile up: those of an agent's channels fill a quarter, those towards a
#: session's client (200 by default) four fifths. Who fills it all the same is cut (``Switch``), not the link.
MAX_QUEUED = 512 << 20
#: How often time limits are looked at.
CLOCK_STEP = 0.5
#: Seconds that a login may take before it must give way to the next: many times what the slowest needs.
LOGIN_SHARE = 2.0
LOGIN_STEP = 0.02
#: Every so many steps of the clock the bytes of open channels are counted.
METER_ROUNDS = 10
#: Connections that came before the allocator's memory is given back, which takes milliseconds: key exchanges
#: leave holes.
MANY_LOGINS = 50
#: What a revoked session's agent has to tell the user why: it hears of a kill at the same moment, and its
#: words would otherwise lose the race against our cut. Nothing new is opened meanwhile.
LAST_WORDS = 1.0


class RelayServer:
    """A running relay. ``listen`` starts it; ``drain`` and ``close`` end it."""

    def __init__(
        self,
        bundle: Bundle,
        host_seed: bytes,
        *,
        limits: Limits | None = None,
        metrics: Metrics | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        """``host_seed`` is the private host key that the bundle's certificate is for; ``now`` gives the
        platform's time. Raises AuthenticationError when key and certificate do not match."""
        self.now = now
        self.limits = limits or Limits()
        self.metrics = metrics or Metrics()
        self.bundle = bundle
        self._host_seed = host_seed
        self._host_key = CertificateKey(host_seed, bundle.host_certificate)
        self._lock = threading.Lock()
        self._links: dict[int, Link] = {}
        self._waiting: dict[int, Link] = {}  # of these, who has not logged in yet
        self._waiting_by_source: Counter[str] = Counter()
        self._routes = Routes()
        self._splices: set[Splice] = set()
        self._bytes_lock = threading.Lock()
        self._number = 0
        self._freed_at = 0  # its value when memory was given back last
        self._entrances: list[Entrance] = []
        self._draining = False
        self._closed = threading.Event()
        #: When the clock last came round.
        self.beat = time.monotonic()

    # -- from outside ------------------------------------------------------------------------------------

    def listen(self, host: str, port: int) -> tuple[str, int]:
        """Start on ``host:port`` (port 0: any); returns where. Raises PamError when it is taken."""
        return self._serve([bind(host, port)], passed=False)

    def serve(self, listeners: list[socket.socket]) -> None:
        """Start on listening sockets that somebody else owns, and that stay open afterwards."""
        self._serve(listeners, passed=True)

    def _serve(self, listeners: list[socket.socket], *, passed: bool) -> tuple[str, int]:
        self._entrances = [Entrance(listener, self._welcome, passed=passed) for listener in listeners]
        for entrance in self._entrances:
            entrance.start()
        threading.Thread(target=self._watch_clock, name="clock", daemon=True).start()
        return self._entrances[0].address

    def update(self, bundle: Bundle) -> None:
        """Work from ``bundle`` from now on: cut who may no longer be here, show the new host certificate.

        Raises AuthenticationError when it is older than the present one or not for this relay's key; then
        nothing has changed.
        """
        if bundle.serial < self.bundle.serial:
            raise AuthenticationError(
                f"the bundle has serial {bundle.serial}, older than {self.bundle.serial} here"
            )
        host_key = CertificateKey(self._host_seed, bundle.host_certificate)
        with self._lock:
            self.bundle, self._host_key = bundle, host_key
            links = list(self._links.values())
        for link in links:
            if link.identity is None:
                continue
            try:
                check_standing(link.identity, bundle)
            except AuthenticationError as error:
                self._condemn(link, link.identity, str(error))

    @staticmethod
    def _condemn(link: Link, identity: Identity, reason: str) -> None:
        """End a link that the bundle revoked: an agent's at once, a session's after its last words."""
        if identity.role == "serve":
            link.close(reason)
        elif link.condemned is None:
            link.condemned = (reason, time.monotonic() + LAST_WORDS)

    def status(self) -> dict[str, Any]:
        """For ``pam-relay status``: counts, and every route with its channels."""
        with self._lock:
            routes = [
                {
                    "gateway": route.gateway,
                    "agent": route.agent,
                    "slot": route.slot,
                    "channels": self._routes.channels_of_route(route),
                }
                for route in self._routes
            ]
            return {
                "routes": routes,
                "sessions": self._routes.sessions,
                "channels": self._routes.channels,
                "transports": len(self._links),
                "unauthenticated": len(self._waiting),
                "draining": self._draining,
                "bundle_serial": self.bundle.serial,
                "bundle_age": max(0, int(self.now() - self.bundle.issued)),
                "host_certificate_expires": self._host_key.valid_before,
            }

    @property
    def channels(self) -> int:
        with self._lock:
            return self._routes.channels

    def drain(self) -> None:
        """Take no new connection and no new channel; what is open lives on."""
        self._draining = True
        for entrance in self._entrances:
            entrance.drain()
        log.info("draining", extra=kv(channels=self.channels))

    def close(self) -> None:
        """Cut everything. May be called again."""
        self._draining = True
        self._closed.set()
        for entrance in self._entrances:
            entrance.close()
        with self._lock:
            links = list(self._links.values())
        for link in links:
            link.close("the relay stops")

    # -- connections ---------------------------------------------------------------------------------------

    def _welcome(self, sock: socket.socket, source: str) -> None:
        self._await_place()
        with self._lock:
            reason = self._why_not(source)
            if not reason:
                victim = self._oldest_when_full()
                self._number += 1
                link = Link(self, self._number, source)
                self._links[link.number] = self._waiting[link.number] = link
                self._waiting_by_source[source] += 1
        if not reason and victim is not None:
            self.metrics.refused_connection("unauthenticated")
            victim.close("others are waiting to log in")
        if reason:
            self.metrics.refused_connection(reason)
            log.debug("connection refused", extra=kv(source=source, reason=reason))
            sock.close()
            return
        try:
            transport = fast_ssh.serve(
                sock, name=f"link-{link.number}", host_key=self._host_key, server=link.admission
            )
            link.attach(transport)
            fast_ssh.start(transport, link.admission)
        except BaseException:
            self.link_ended(link)
            raise

    def _await_place(self) -> None:
        """While many log in at once, leave the next ones in the kernel's queue.

        After a restart every agent comes back within seconds: did each push out the oldest at once, none
        would ever get to the end of its login.
        """
        while True:
            with self._lock:
                if len(self._waiting) < self.limits.unauthenticated:
                    return
                oldest = next(iter(self._waiting.values()))
            left = oldest.since + LOGIN_SHARE - time.monotonic()
            if left <= 0 or self._closed.wait(min(left, LOGIN_STEP)):
                return

    def _why_not(self, source: str) -> str:
        """The limit that one more connection from ``source`` would exceed, or nothing; under the lock."""
        if len(self._links) >= self.limits.transports:
            return "transports"
        if self._waiting_by_source[source] >= self.limits.unauthenticated_per_address:
            return "unauthenticated_per_address"
        return ""

    def _oldest_when_full(self) -> Link | None:
        """Who must go for the next one to log in; under the lock.

        Not the newcomer: whoever holds connections without logging in would shut all others out with a few
        of them a second, while an honest login takes a fraction of one.
        """
        if len(self._waiting) < self.limits.unauthenticated:
            return None
        oldest = next(iter(self._waiting.values()))
        self._no_longer_waiting(oldest)
        return oldest

    def _no_longer_waiting(self, link: Link) -> None:
        if self._waiting.pop(link.number, None) is not None:
            self._waiting_by_source[link.source] -= 1
            if not self._waiting_by_source[link.source]:
                del self._waiting_by_source[link.source]

    def link_admitted(self, link: Link) -> None:
        with self._lock:
            self._no_longer_waiting(link)
        assert link.transport is not None
        assert link.identity is not None
        self.metrics.admitted(link.identity.role)
        link.transport.watch()
        link.transport.packets.max_queued = MAX_QUEUED
        # The bundle may have changed while the signature was verified.
        try:
            check_standing(link.identity, self.bundle)
        except AuthenticationError as error:
            link.close(str(error))

    def link_ended(self, link: Link) -> None:
        with self._lock:
            self._no_longer_waiting(link)
            self._links.pop(link.number, None)
            gone = self._routes.drop(link)
        for route in gone:
            log.info("route lost", extra=kv(gateway=route.gateway, agent=route.agent, slot=route.slot))

    def _watch_clock(self) -> None:
        rounds = 0
        while not self._closed.wait(CLOCK_STEP):
            with self._lock:
                links = list(self._links.values())
            self.beat = time.monotonic()
            for link in links:
                if reason := self._overdue(link):
                    link.close(reason)
            rounds += 1
            if rounds % METER_ROUNDS == 0:
                self._meter()

    def _meter(self) -> None:
        """What can wait for longer: counting bytes, and giving back the memory that many logins needed."""
        with self._lock:
            splices, logins = list(self._splices), self._number - self._freed_at
        for splice in splices:
            self._count_bytes(splice)
        if logins >= MANY_LOGINS:
            self._freed_at = self._number
            give_back()

    def _overdue(self, link: Link) -> str:
        identity = link.identity
        if identity is None:
            late = time.monotonic() - link.since > self.limits.login_timeout
            return "no login in time" if late else ""
        if link.condemned is not None:
            reason, at = link.condemned
            return reason if time.monotonic() >= at else ""
        if self.now() < identity.valid_before:
            return ""
        # A client's certificate is for reaching the relay, and lasts minutes; a session may last hours, and
        # the agent ends it. So open channels live on, and the connection ends when there are none.
        if identity.role == "serve" or not link.channels:
            return "its certificate has expired"
        return ""

    # -- routes --------------------------------------------------------------------------------------------

    def route_wanted(self, route: Route) -> bool:
        with self._lock:
            old = self._routes.add(route)
        fields = kv(gateway=route.gateway, agent=route.agent, slot=route.slot, replaced=old is not None)
        log.info("route added", extra=fields)
        return True

    def route_cancelled(self, route: Route) -> None:
        with self._lock:
            cancelled = self._routes.cancel(route)
        if cancelled:
            fields = kv(gateway=route.gateway, agent=route.agent, slot=route.slot)
            log.info("route cancelled", extra=fields)

    # -- channels ------------------------------------------------------------------------------------------

    def channel_wanted(self, link: Link, wish: IncomingChannel) -> None:
        """In the client's reader thread: decide, and leave the opening to a thread of its own."""
        if not link.admission.may_connect(*wish.destination):
            wish.refuse(OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED, "not allowed by the certificate")
            return
        if link.condemned is not None:
            wish.refuse(OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED, link.condemned[0])
            return
        assert link.identity is not None
        session, gateway = link.identity.name, link.identity.gateway
        with self._lock:
            route, reason = self._choose(gateway, session)
            if route is not None:
                self._routes.opened(route, session)
                link.channels += 1
        if route is None:
            self._refuse(wish, session, gateway, reason)
            return
        threading.Thread(
            target=self._join,
            args=(link, wish, route),
            name=f"open-{session[-6:]}-{wish.number}",
            daemon=True,
        ).start()

    def _choose(
        self, gateway: str, session: str, without: tuple[Route, ...] = ()
    ) -> tuple[Route | None, str]:
        """The route for a channel, or None and why; under the lock."""
        if self._draining:
            return None, "the relay is stopping"
        if self._routes.channels >= self.limits.channels:
            return None, "the relay has too many channels"
        if self._routes.channels_of_session(session) >= self.limits.channels_per_session:
            return None, "the session has too many channels"
        route = self._routes.choose(gateway, session, without=without)
        if route is None:
            return None, f"no agent of gateway {gateway} is connected"
        if self._routes.channels_of_agent(route.agent) >= self.limits.channels_per_agent:
            return None, f"agent {route.agent} has too many channels"
        return route, ""

    def _refuse(self, wish: IncomingChannel, session: str, gateway: str, reason: str) -> None:
        self.metrics.channel("refused")
        log.info("channel refused", extra=kv(session=session, gateway=gateway, reason=reason))
        wish.refuse(OPEN_FAILED_CONNECT_FAILED, reason)

    def _join(self, link: Link, wish: IncomingChannel, route: Route) -> None:
        """Open the agent's side, accept the client's, join them. The channel is counted off once."""
        assert link.identity is not None
        session = link.identity.name
        tried: list[Route] = []
        try:
            while True:
                try:
                    agent = self._open(route, session, wish)
                    break
                except PamError as error:
                    tried.append(route)
                    log.info("tunnel failed", extra=kv(session=session, agent=route.agent, reason=error))
                    other = self._other_route(route, session, tuple(tried))
                    if other is None:
                        self._refuse(wish, session, route.gateway, str(error))
                        self._count_off(link, route, session)
                        return
                    route = other
            self._carry(link, wish, agent, route)
        except BaseException:
            self._count_off(link, route, session)
            raise

    def _count_off(self, link: Link, route: Route, session: str) -> None:
        with self._lock:
            self._routes.closed(route, session)
            link.channels -= 1

    def _open(self, route: Route, session: str, wish: IncomingChannel) -> ChannelStream:
        assert isinstance(route.link, Link)
        assert route.link.transport is not None
        return fast_ssh.open_forwarded(
            route.link.transport,
            route.gateway,
            route.slot,
            session=session,
            timeout=OPEN_TIMEOUT,
            # What the agent sends goes on to the client as it is: no more than the client takes.
            window=min(wish.window, fast_ssh.WINDOW),
            packet=min(wish.packet, fast_ssh.PACKET),
        )

    def _other_route(self, failed: Route, session: str, tried: tuple[Route, ...]) -> Route | None:
        """Another route in the place of ``failed``, counted in its stead, or None."""
        with self._lock:
            if len(tried) >= OPEN_TRIES:
                return None
            route, _ = self._choose(failed.gateway, session, tried)
            if route is not None:
                self._routes.closed(failed, session)
                self._routes.opened(route, session)
            return route

    def _carry(self, link: Link, wish: IncomingChannel, agent: ChannelStream, route: Route) -> None:
        """Join the channels and return; the splice lives on in the two links' reader threads."""
        assert link.identity is not None
        session = link.identity.name
        try:
            # Of all the room there is, a share at first; who uses it gets the rest.
            share = MAX_QUEUED // 4 // self.limits.channels_per_agent
            client = wish.accept(window=min(agent.window, fast_ssh.WINDOW, share), packet=agent.packet)
        except PamError:  # the client has gone meanwhile
            agent.abort()
            self._count_off(link, route, session)
            return
        self.metrics.channel("opened")
        log.info("channel opened", extra=kv(session=session, gateway=route.gateway, agent=route.agent))
        began = time.monotonic()
        splice = Splice(client, agent)

        def ended(summary: Summary) -> None:
            with self._lock:
                self._splices.discard(splice)
            self._count_bytes(splice)
            self._count_off(link, route, session)
            log.info(
                "channel closed",
                extra=kv(
                    session=session,
                    agent=route.agent,
                    up=summary.bytes_up,
                    down=summary.bytes_down,
                    seconds=int(time.monotonic() - began),
                    cut=summary.cut,
                ),
            )

        with self._lock:
            self._splices.add(splice)
        splice.start(ended)

    def _count_bytes(self, splice: Splice) -> None:
        with self._bytes_lock:
            up, down = splice.progress()
        if up:
            self.metrics.count_bytes("up", up)
        if down:
            self.metrics.count_bytes("down", down)
