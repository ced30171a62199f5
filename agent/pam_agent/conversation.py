"""One local connection of the user, as a session lends it to its Interceptor."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pam_agent import target
from pam_agent.protocols.base import Event
from pam_common.errors import PamError, RefusedError
from pam_common.stream import Data, DeliveringStream, LendingStream, Stream

if TYPE_CHECKING:
    from pam_agent.session import Session

#: A database connection needs one and perhaps one more to cancel; a loop of dials is a fault.
MAX_DIALS = 16


class CountedStream:
    """The client's stream, counting the bytes of both directions for the session's report."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._lending = stream if isinstance(stream, LendingStream) else None
        self.bytes_up = 0  #: from the client
        self.bytes_down = 0
        self.shutdown = stream.shutdown
        self.close = stream.close
        self.abort = stream.abort

    def recv(self, size: int) -> bytes:
        data = self._stream.recv(size)
        self.bytes_up += len(data)
        return data

    def deliver_to(self, take: Callable[[memoryview], int]) -> None:
        if not isinstance(self._stream, DeliveringStream):
            return

        def counted(data: memoryview) -> int:
            self.bytes_up += len(data)
            taken = take(data)
            self.bytes_up -= len(data) - taken  # recv counts the rest
            return taken

        self._stream.deliver_to(counted)

    def sendall(self, data: Data) -> None:
        self._stream.sendall(data)
        self.bytes_down += len(data)

    def lend(self, fd: int, ready: Callable[[], bool]) -> bool:
        return self._lending is not None and self._lending.lend(fd, ready)

    def send_soon(self, data: memoryview) -> bool:
        if self._lending is None or not self._lending.send_soon(data):
            return False
        self.bytes_down += len(data)
        return True


class LiveConversation:
    """The :class:`~pam_agent.protocols.base.Conversation` of a running session."""

    def __init__(self, session: Session, number: int, client: Stream) -> None:
        self._session = session
        self._number = number
        self.client = CountedStream(client)
        self._lock = threading.Lock()
        self._dials = 0
        # Second descriptors of the target sockets. Wrapping a socket in TLS detaches the object that
        # dial() gave away, so only a descriptor of our own can still shut the connection down.
        self._targets: list[socket.socket] = []

    @property
    def number(self) -> int:
        return self._number

    @property
    def end_reason(self) -> str | None:
        return self._session.end_reason

    def record(self, events: Sequence[Event]) -> None:
        self._session.record(self._number, events)

    def touch(self) -> None:
        self._session.touch()

    def dial(self, host: str | None = None, port: int | None = None) -> socket.socket:
        session = self._session
        where = session.opening.target
        self._dials += 1
        if self._dials > MAX_DIALS:
            raise RefusedError("too many connections to the target from one connection")
        try:
            sock = target.dial(
                host or where.host,
                port or where.port,
                session.rules(),
                cancelled=lambda: session.end_reason is not None,
            )
        except PamError:
            self._check_running()  # the better reason, when both are true
            raise
        try:
            with self._lock:
                self._check_running()
                self._targets.append(sock.dup())
        except BaseException:
            sock.close()
            raise
        return sock

    def permitted(self, host: str, port: int) -> str:
        return target.permitted(host, port, self._session.rules())

    def abort_targets(self) -> None:
        """Shut every target connection down. The session's end reason must be set before."""
        with self._lock:
            for sock in self._targets:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def abort_client(self) -> None:
        self.client.abort()

    def release(self) -> None:
        """Close what was kept of the target sockets, once the Interceptor is done."""
        with self._lock:
            for sock in self._targets:
                sock.close()
            self._targets.clear()

    def _check_running(self) -> None:
        if self.end_reason is not None:
            raise RefusedError(self.end_reason)
