"""A splice with two threads and the bytes in hand, for tests that read or alter them on their way.

In the place of ``pam_relay.server.Splice``, which never sees what it carries.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

from pam_common.stream import Stream
from pam_relay.splice import Summary

#: What one recv may take.
PIECE = 128 << 10


class Splice:
    """Carries between ``client`` and ``agent`` until both directions have ended, then closes both."""

    def __init__(self, client: Stream, agent: Stream, *, name: str = "splice") -> None:
        self._client = client
        self._agent = agent
        self._name = name
        self._up = self._down = 0
        self._cut = False

    def start(self, ended: Callable[[Summary], None]) -> None:
        """Carry in threads; ``ended`` is told once."""
        threading.Thread(target=lambda: ended(self.run()), name=f"{self._name}-up", daemon=True).start()

    def progress(self) -> tuple[int, int]:
        """Nothing is counted on the way."""
        return 0, 0

    def run(self, count: Callable[[str, int], None] = lambda direction, size: None) -> Summary:
        """Carry until the end, in this thread and one more; ``count`` is told of every piece."""
        down = threading.Thread(
            target=self._carry_down, args=(count,), name=f"{self._name}-down", daemon=True
        )
        down.start()
        self._carry_up(count)
        down.join()
        self._client.close()
        self._agent.close()
        return Summary(self._up, self._down, self._cut)

    def abort(self) -> None:
        """End it from any thread, without waiting."""
        self._cut = True
        self._client.abort()
        self._agent.abort()

    def _carry_up(self, count: Callable[[str, int], None]) -> None:
        try:
            while data := self._client.recv(PIECE):
                self._agent.sendall(data)
                self._up += len(data)
                count("up", len(data))
            self._agent.shutdown(socket.SHUT_WR)
        except OSError:
            self.abort()

    def _carry_down(self, count: Callable[[str, int], None]) -> None:
        try:
            while data := self._agent.recv(PIECE):
                self._client.sendall(data)
                self._down += len(data)
                count("down", len(data))
            self._client.shutdown(socket.SHUT_WR)
        except OSError:
            self.abort()
