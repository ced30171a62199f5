"""One SSH connection to the relay, from its first byte to its end."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from pam_common.fast_ssh import IncomingChannel, Transport
from pam_common.logging import get_logger, kv
from pam_relay.admission import Admission, Identity
from pam_relay.routes import Route

if TYPE_CHECKING:
    from pam_relay.server import RelayServer

log = get_logger("relay.link")


class Link:
    """What the relay knows of a connection. The server holds it while it lives, under its own lock."""

    def __init__(self, server: RelayServer, number: int, source: str) -> None:
        self._server = server
        self.number = number
        self.source = source
        self.admission = Admission(lambda: server.bundle, server.now, source, self)
        self.since = time.monotonic()
        self.transport: Transport | None = None
        #: Channels of a client's link; an agent's are counted with its routes.
        self.channels = 0
        #: Why it will be cut, and when by the monotonic clock, once its session is revoked.
        self.condemned: tuple[str, float] | None = None

    @property
    def identity(self) -> Identity | None:
        return self.admission.identity

    def attach(self, transport: Transport) -> None:
        """Make ``transport``, not started yet, this link's."""
        self.transport = transport
        transport.on_authenticated = self._authenticated
        transport.on_direct_tcpip = self._channel_wanted
        transport.on_end = self._ended

    def close(self, reason: str) -> None:
        """End the connection from any thread, without waiting; open channels are cut."""
        if self.transport is not None and self.transport.is_active():
            log.info("link closed", extra=self._fields(reason=reason))
            self.transport.close()

    # -- in the connection's reader thread: nothing here may wait ----------------------------------------

    def _authenticated(self) -> None:
        identity = self.admission.authenticated()
        log.info("link admitted", extra=self._fields(gateway=identity.gateway))
        self._server.link_admitted(self)

    def _channel_wanted(self, wish: IncomingChannel) -> None:
        self._server.channel_wanted(self, wish)

    def _ended(self) -> None:
        self._server.link_ended(self)
        if self.transport is not None and self.transport.fault:
            # Anybody can come and talk nonsense; who has logged in should know better.
            level = logging.INFO if self.identity is None else logging.WARNING
            log.log(level, "link cut", extra=self._fields(reason=self.transport.fault))

    def add_route(self, slot: int) -> bool:
        route = self._route(slot)
        return route is not None and self._server.route_wanted(route)

    def cancel_route(self, slot: int) -> None:
        route = self._route(slot)
        if route is not None:
            self._server.route_cancelled(route)

    def _route(self, slot: int) -> Route | None:
        identity = self.identity
        return Route(identity.gateway, identity.name, slot, self) if identity is not None else None

    def _fields(self, **more: object) -> dict[str, object]:
        identity = self.identity
        who = {}
        if identity is not None:
            who = {"session" if identity.role == "connect" else "agent": identity.name}
        return kv(link=self.number, source=self.source, **who, **more)
