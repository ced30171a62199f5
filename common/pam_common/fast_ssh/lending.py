"""Lets the thread that reads an ssh connection wait for other sockets as well.

    own thread ── lend(fd, ready) ──▶ asleep ◀── ready() says no, or the connection ends ── own thread goes on
    reader ──▶ epoll ─┬─ the connection ──▶ its packets
                      └─ fd ──▶ ready()

A thread per direction and connection is simple, and dear where messages are small: each one wakes a thread
that wants the interpreter while another has it, on whatever processor. One thread that waits for all of them
wakes once for what many have to say, and what it sends goes out together.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable

#: Sockets that one round looks at; the others come next.
MAX_EVENTS = 64


class _Loan:
    """One socket that is lent, until ``ready`` says no."""

    def __init__(self, ready: Callable[[], bool]) -> None:
        self.ready = ready
        self.error: Exception | None = None
        self.back = threading.Lock()  # a binary semaphore: cheaper than an Event
        self.back.acquire()


class Lending:
    """Who waits for ``sock``, an ssh connection's, waits for what is lent to it, too."""

    def __init__(self, sock: socket.socket, flush: Callable[[], None]) -> None:
        """``flush`` is called in the reader thread before each wait."""
        self._epoll = select.epoll()
        self._own = sock.fileno()
        self._epoll.register(self._own, select.EPOLLIN)
        self._flush = flush
        self._lock = threading.Lock()
        self._loans: dict[int, _Loan] = {}  # by descriptor
        self._over = False

    def lend(self, fd: int, ready: Callable[[], bool]) -> bool:
        """Have the reader thread call ``ready`` when ``fd`` can be read or is at its end, until that returns
        False; then, or when the connection ends, return True. False at once when that cannot be done.

        ``ready`` must not block and may be called for nothing; what it raises is raised here. It never runs
        while the thread that lends does.
        """
        loan = _Loan(ready)
        with self._lock:
            if self._over:
                return False
            try:
                self._epoll.register(fd, select.EPOLLIN)
            except OSError:  # the system watches no more
                return False
            self._loans[fd] = loan
        loan.back.acquire()
        if loan.error is not None:
            raise loan.error
        return True

    def wait(self, seconds: float) -> bool:
        """Wait until the connection can be read, and serve what is lent meanwhile; False when it was silent
        for so long. Only for the reader thread."""
        own, until = self._own, 0.0
        while True:
            self._flush()
            events = self._epoll.poll(seconds, MAX_EVENTS)
            found = False
            for fd, _ in events:
                if fd == own:
                    found = True
                else:
                    self._serve(fd)
            if found:
                return True
            now = time.monotonic()
            until = until or now + seconds
            if not events or now > until:
                return False

    def _serve(self, fd: int) -> None:
        loan = self._loans.get(fd)
        if loan is None:
            return
        try:
            if loan.ready():
                return
        except Exception as error:  # noqa: BLE001  for who lent it: this thread carries other people's sessions
            loan.error = error
        with self._lock, contextlib.suppress(OSError):
            del self._loans[fd]
            # Not only unwatched: an end would be told again and again.
            self._epoll.unregister(fd)
        loan.back.release()

    def close(self) -> None:
        """The connection has ended: all get theirs back. In the reader thread, or when it never ran."""
        with self._lock:
            self._over = True
            self._epoll.close()
            loans, self._loans = self._loans, {}
        for loan in loans.values():
            loan.back.release()
