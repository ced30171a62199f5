"""A TCP port that leads to another one and keeps a copy of all that passes, for tests."""

from __future__ import annotations

import contextlib
import socket
import threading
from dataclasses import dataclass, field


@dataclass
class Tapped:
    """What passed on one connection: ``up`` from who connected, ``down`` to them."""

    up: bytearray = field(default_factory=bytearray)
    down: bytearray = field(default_factory=bytearray)
    ended: threading.Event = field(default_factory=threading.Event)


class Tap:
    """Listens on the loopback ``port`` and leads every connection to the loopback port ``to``."""

    def __init__(self, to: int) -> None:
        self.to = to
        self.connections: list[Tapped] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, name="tap", daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self.to))
            except OSError:
                near.close()
                continue
            for sock in (near, far):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            kept = Tapped()
            self.connections.append(kept)
            threading.Thread(target=self._carry, args=(near, far, kept), name="tap", daemon=True).start()

    @staticmethod
    def _carry(near: socket.socket, far: socket.socket, kept: Tapped) -> None:
        down = threading.Thread(target=_copy, args=(far, near, kept.down), name="tap-down", daemon=True)
        down.start()
        _copy(near, far, kept.up)
        down.join()
        near.close()
        far.close()
        kept.ended.set()


def _copy(source: socket.socket, sink: socket.socket, kept: bytearray) -> None:
    try:
        while data := source.recv(1 << 17):
            kept += data
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        # One side broke: so does the other.
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
