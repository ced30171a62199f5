"""The user's Stream as a socket, which a transport needs: the kernel's buffer between them keeps its reader
thread from ever waiting for a peer.

    Stream ── thread "…-up" ──▶ socket pair ──▶ transport
    Stream ◀── the session's thread ── socket pair ◀── transport
"""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Final

from pam_common.errors import PamError, UnavailableError
from pam_common.frames import BATCH_DATA
from pam_common.secure_channel import deadline
from pam_common.stream import Stream

#: One read in each direction: what a batch of packets has. Touched only as far as it is filled.
SIZE: Final = BATCH_DATA
#: For the client to close once its transport has ended, before its stream is aborted.
CLOSE_SECONDS: Final = 1.0


class Bridge:
    """``far`` is the transport's socket, which it closes; ``run`` carries until it does."""

    def __init__(self, client: Stream, name: str) -> None:
        self._client = client
        self._near, self.far = socket.socketpair()
        self._thread = threading.Thread(target=self._carry_up, name=name, daemon=True)

    def start(self) -> None:
        """Begin with client → transport. Raises UnavailableError."""
        try:
            self._thread.start()
        except RuntimeError:
            raise UnavailableError("the agent has no room for one more thread") from None

    def run(self) -> None:
        """Carry transport → client until the transport has closed and everything of it was sent."""
        with memoryview(bytearray(SIZE)) as view:
            while size := self._receive(view):
                try:
                    self._client.sendall(view[:size])
                except (OSError, PamError):
                    return  # the client is gone; the other thread sees it, too

    def _receive(self, view: memoryview) -> int:
        try:
            return self._near.recv_into(view)
        except OSError:
            return 0  # it was closed with bytes of the client unread, which the kernel tells like this

    def finish(self) -> None:
        """Both directions end; returns when the second thread has."""
        for end in (self._near, self.far):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        if self._thread.ident is not None:
            with contextlib.suppress(OSError, PamError), deadline(self._client, CLOSE_SECONDS):
                self._client.shutdown(socket.SHUT_WR)
            self._thread.join(CLOSE_SECONDS)
            if self._thread.is_alive():
                self._client.abort()
                self._thread.join()
        self._near.close()

    def _carry_up(self) -> None:
        with contextlib.suppress(OSError, PamError):
            while data := self._client.recv(SIZE):
                self._near.sendall(data)
        with contextlib.suppress(OSError):
            self._near.shutdown(socket.SHUT_WR)
