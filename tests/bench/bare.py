"""About the least that a chain in Python costs: three processes that receive, encrypt and send, and no more.

    python tests/bench/bare.py PORT TARGET PASSES

A hop carries each connection to ``PORT`` on to ``TARGET`` (loopback ports). One thread waits for all sockets
by epoll; each batch passes AES-GCM ``PASSES`` times, as often as in the part of the chain that the hop stands
for. No framing, no sharing of a connection, no login, no policy, no message is read, nothing is recorded: an
aim that this just meets leaves nothing for all that.
"""

from __future__ import annotations

import contextlib
import select
import socket
import sys

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

BATCH = 1 << 16
TAG = 16


def main() -> None:
    port, target, passes = map(int, sys.argv[1:])
    Hop(port, target, passes).run()


class Hop:
    """One process of the bare chain."""

    def __init__(self, port: int, target: int, passes: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", port), backlog=64)
        self._target = target
        self._passes = passes
        self._cipher = AESGCM(bytes(16))
        self._batch = memoryview(bytearray(BATCH))
        self._sealed = memoryview(bytearray(BATCH + TAG))
        self._ready = select.epoll()
        self._pairs: dict[int, tuple[socket.socket, socket.socket]] = {}

    def run(self) -> None:
        self._ready.register(self._listener, select.EPOLLIN)
        while True:
            for descriptor, _ in self._ready.poll():
                if descriptor == self._listener.fileno():
                    self._accept()
                elif not self._carry(*self._pairs[descriptor]):
                    break  # what else was ready may be of the pair that was closed

    def _accept(self) -> None:
        near, _ = self._listener.accept()
        far = socket.create_connection(("127.0.0.1", self._target))
        for one, other in ((near, far), (far, near)):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._pairs[one.fileno()] = (one, other)
            self._ready.register(one, select.EPOLLIN)

    def _carry(self, source: socket.socket, sink: socket.socket) -> bool:
        """One batch; False when the pair was closed."""
        with contextlib.suppress(OSError):
            if got := source.recv_into(self._batch):
                batch, sealed = self._batch[:got], self._sealed[: got + TAG]
                for _ in range(self._passes):  # the same nonce: this is work to measure, nobody opens it
                    self._cipher.encrypt_into(bytes(12), batch, None, sealed)
                sink.sendall(batch)
                return True
        for sock in (source, sink):
            del self._pairs[sock.fileno()]
            sock.close()
        return False


if __name__ == "__main__":
    main()
