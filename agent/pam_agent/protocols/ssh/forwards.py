"""Forwarded connections: what the account may reach through the target, and what may be bound there.

``-L`` and ``-D`` are ``direct-tcpip`` channels, which the target opens from where it is. ``-R`` is a global
request and then ``forwarded-tcpip`` channels from the target; only those that belong to a port that this very
connection asked for are let through, and only those can be cancelled (RFC 4254, chapter 7).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from pam_agent.protocols.base import ClientProtocolError, Event
from pam_agent.protocols.ssh.channel import USER
from pam_agent.protocols.ssh.codec import MAX_HOST, Endpoints, Reader, Request
from pam_agent.protocols.ssh.policy import Policy
from pam_agent.protocols.ssh.watch import Verdict

#: Ports that one connection may have bound at the target.
MAX_BINDS: Final = 16


class ForwardWatch:
    """The :class:`~pam_agent.protocols.ssh.watch.Watch` of a forwarded connection: counted, not read."""

    def __init__(self, number: int, direction: str, where: Endpoints) -> None:
        self._number = number
        self._direction = direction
        self._where = where
        self._bytes = [0, 0]

    def event(self, **fields: Any) -> Event:
        where = self._where
        return {
            "kind": "forward",
            "ch": self._number,
            "dir": self._direction,
            "host": where.host,
            "port": where.port,
            **fields,
        }

    def opened(self, ok: bool, reason: str) -> Sequence[Event]:
        return () if ok else [self.event(ok=False, reason=reason)]

    def data(self, side: int, stream: str, data: memoryview) -> Sequence[Event]:
        self._bytes[side] += len(data)
        return ()

    def request(self, side: int, request: Request) -> tuple[Verdict, Sequence[Event]]:
        return Verdict.REFUSE, ()  # a forwarded connection has no use for any

    def replied(self, side: int, ok: bool) -> Sequence[Event]:
        return ()

    def ended(self, side: int) -> Sequence[Event]:
        return ()

    def closed(self) -> Sequence[Event]:
        return [self.event(up=self._bytes[USER], down=self._bytes[1 - USER])]


class Binds:
    """The ports that one connection has bound at the target."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._bound: set[tuple[str, int]] = set()
        self._wanted = 0  # asked for, not answered yet

    @staticmethod
    def parse(body: bytes) -> tuple[str, int]:
        """Address and port of ``tcpip-forward`` and ``cancel-tcpip-forward``."""
        reader = Reader(body, ClientProtocolError, 0)
        found = reader.text(MAX_HOST), reader.uint32()
        reader.end()
        return found

    def want(self, address: str, port: int) -> bool:
        """May it be asked of the target? Then :meth:`answered` follows."""
        if len(self._bound) + self._wanted >= MAX_BINDS or not self._policy.may_bind(address, port):
            return False
        self._wanted += 1
        return True

    def answered(self, address: str, port: int, ok: bool) -> None:
        self._wanted -= 1
        if ok:
            self._bound.add((address, port))

    def cancel(self, address: str, port: int) -> bool:
        """Whether it was bound by this connection; it no longer is."""
        known = (address, port) in self._bound
        self._bound.discard((address, port))
        return known

    def expects(self, where: Endpoints) -> bool:
        """Whether a connection that came in there is one that was asked for."""
        return any(port == where.port for _, port in self._bound)
