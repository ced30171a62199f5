"""A socket as the stream of a client whose thread that reads it does small things for others, too."""

from __future__ import annotations

import select
from collections.abc import Callable

from pam_common.stream import SocketStream


class LendingSocket(SocketStream):
    """Waits for what it is lent in the lender's own thread, which would sleep: who lends cannot tell."""

    loans = 0  #: how often something was lent
    soon = 0  #: bytes that were sent at once

    def lend(self, fd: int, ready: Callable[[], bool]) -> bool:
        self.loans += 1
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        while poll.poll() and ready():
            pass
        return True

    def send_soon(self, data: memoryview) -> bool:
        poll = select.poll()
        poll.register(self.socket, select.POLLOUT)
        if not poll.poll(0):
            return False
        self.sendall(data)
        self.soon += len(data)
        return True
