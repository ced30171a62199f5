"""The Stream: anything with ``recv``, ``sendall``, ``shutdown``, ``close`` and ``abort``.

A socket, an ssh channel and a SecureChannel are used through this one shape. Exactly one owner closes
a stream; any thread may ``abort`` it.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Callable
from typing import Protocol, TypeAlias, runtime_checkable

#: What can be sent without a copy.
Data: TypeAlias = bytes | bytearray | memoryview
#: Bytes that a stream below may need around what it sends, to wrap it where it lies.
ROOM = 64


class Stream(Protocol):
    """A two-way byte stream with half-close. All calls block; ``OSError`` means it is broken."""

    def recv(self, size: int, /) -> bytes:
        """Return 1 to ``size`` bytes, or ``b""`` at the peer's clean end (never for a cut)."""

    def sendall(self, data: Data, /) -> None:
        """Send all of ``data``; blocks while the peer is slow."""

    def shutdown(self, how: int, /) -> None:
        """``socket.SHUT_WR``: no more data from here (the peer reads a clean end)."""

    def close(self) -> None:
        """Release it. For the one owner, when no thread uses it any more."""

    def abort(self) -> None:
        """End both directions at once, from any thread: a blocked recv or sendall wakes and fails
        (recv may also return ``b""``). Never blocks, never raises, may be called again."""


@runtime_checkable
class InPlaceStream(Stream, Protocol):
    """A Stream that can send without a copy."""

    def sendall_in_place(self, memory: memoryview, start: int, end: int, /) -> None:
        """Send ``memory[start:end]``; it, and ROOM bytes before and behind it, are overwritten."""


@runtime_checkable
class DeliveringStream(Stream, Protocol):
    """A Stream whose bytes come in some other thread, which may as well act on them."""

    def deliver_to(self, take: Callable[[memoryview], int], /) -> None:
        """While ``recv`` waits, give data to ``take`` in the thread that brings it.

        That saves waking another thread for every message. What ``take`` is given is there during the call
        only. It must not block, nor raise anything but what follows; it returns how many bytes it took. If
        not all, the rest is what ``recv`` returns next. If it raises InterruptedError it took all, and wants
        ``recv`` woken, which raises the same. Ends and failures are always ``recv``'s.
        """


@runtime_checkable
class LendingStream(Stream, Protocol):
    """A Stream that some other thread reads, which may as well do small things for a socket's own thread."""

    def lend(self, fd: int, ready: Callable[[], bool], /) -> bool:
        """Sleep, while the thread that brings the stream's bytes calls ``ready`` when ``fd``, a socket, can
        be read or is at its end. True when ``ready`` returned False or the stream's connection ended; the
        socket is the caller's own again then. False at once where there is no such thread.

        ``ready`` must not block, and may be called for nothing. What it raises is raised here.
        """

    def send_soon(self, data: memoryview, /) -> bool:
        """For ``ready``: send ``data`` without waiting. If False nothing of it was sent, and it is for
        ``sendall``, in a thread that may wait."""


@runtime_checkable
class ReservingStream(Stream, Protocol):
    """What a LendingStream needs below it."""

    def lend(self, fd: int, ready: Callable[[], bool], /) -> bool: ...

    def reserve_soon(self, size: int, /) -> bool:
        """Whether ``size`` bytes can go without waiting. If so, they must: by ``send_reserved``, next."""

    def send_reserved(self, data: memoryview, /) -> None: ...


class SocketStream:
    """A connected TCP, UNIX or TLS socket as a :class:`Stream`."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        # Bound once: the pumps call these for every batch.
        self.recv = sock.recv
        self.sendall = sock.sendall

    def shutdown(self, how: int) -> None:
        if isinstance(self.socket, ssl.SSLSocket):
            # TLS half-close is not something database servers speak: the end of one is the end of both.
            return
        with contextlib.suppress(OSError):
            self.socket.shutdown(how)

    def close(self) -> None:
        self.socket.close()

    def abort(self) -> None:
        # shutdown on the raw descriptor wakes threads that are blocked in recv or send; close would not.
        with contextlib.suppress(OSError, ValueError):
            socket.socket.shutdown(self.socket, socket.SHUT_RDWR)
