"""The relay's public port: its own listening socket, or one that a systemd socket unit passed to it.

A socket of systemd's stays open when the relay stops, and waits with its connections for the next one. So it
must not be shut down here; while the relay drains, whoever comes is closed at once, to go to another relay.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable

from pam_common.errors import PamError
from pam_common.logging import get_logger, kv

log = get_logger("relay.server")

#: The listener's queue in the kernel: of the thousands of tunnels that come back after a restart, those that
#: find no room try again after a second.
BACKLOG = 1024
#: How often the loop of a passed socket looks whether the relay has ended: nothing else can wake it.
ACCEPT_STEP = 0.5
#: Between two tries when nothing can be accepted: out of descriptors, say.
RETRY_STEP = 0.2

Welcome = Callable[[socket.socket, str], None]


def bind(host: str, port: int) -> socket.socket:
    """A listening socket on ``host:port`` (port 0: any). Raises PamError when it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG, dualstack_ipv6=host == "::")
    except OSError as error:
        raise PamError(f"cannot listen on {host}:{port}: {error.strerror or error}") from None


class Entrance:
    """One listening socket and the thread that accepts from it. ``welcome(socket, source)`` takes each."""

    def __init__(self, listener: socket.socket, welcome: Welcome, *, passed: bool) -> None:
        self._listener = listener
        self._welcome = welcome
        self._passed = passed
        self._draining = False
        self._closed = threading.Event()
        self.address: tuple[str, int] = listener.getsockname()[:2]

    def start(self) -> None:
        if self._passed:
            self._listener.settimeout(ACCEPT_STEP)
        threading.Thread(target=self._accept, name="accept", daemon=True).start()
        log.info("listening", extra=kv(host=self.address[0], port=self.address[1], passed=self._passed))

    def drain(self) -> None:
        """Welcome nobody any more."""
        self._draining = True
        if not self._passed:
            self.close()

    def close(self) -> None:
        """Stop. May be called again."""
        self._draining = True
        self._closed.set()
        if not self._passed:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                sock, address = self._listener.accept()
            except TimeoutError:
                continue
            except OSError as error:
                if self._draining and not self._passed:
                    return
                # Out of descriptors, say: the peers that are here go on, so must we.
                log.error("accept failed", extra=kv(reason=error))
                self._closed.wait(RETRY_STEP)
                continue
            self._take(sock, str(address[0]))

    def _take(self, sock: socket.socket, source: str) -> None:
        if self._draining:
            sock.close()
            return
        try:
            self._welcome(sock, source)
        except Exception:  # one bad connection must not end the relay
            log.exception("connection failed", extra=kv(source=source))
            sock.close()
