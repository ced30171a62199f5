"""Join a stream to stdin and stdout, or to any two file descriptors."""

from __future__ import annotations

import contextlib
import os
import socket
import threading

from pam_common.errors import PamError
from pam_common.frames import PACKET_DATA
from pam_common.stream import Stream

#: One read; as the listener's own.
CHUNK = PACKET_DATA


class Splice:
    """``run`` in one thread; :meth:`stop` from any other."""

    def __init__(self, stream: Stream, source: int, sink: int) -> None:
        self._stream = stream
        self._source = source
        self._sink = sink
        self._stopped = False

    def run(self) -> None:
        """Carry until the stream has ended, or nobody reads what it says.

        The end of the source is passed on as the stream's half-close. Raises OSError or PamError when the
        stream breaks, unless it was stopped.
        """
        # A daemon: a read from a terminal cannot be woken, and need not be when all else is over.
        threading.Thread(target=self._up, name="stdin-up", daemon=True).start()
        try:
            while data := self._stream.recv(CHUNK):
                if not self._write(data):
                    self._stream.abort()
                    return
        except (OSError, PamError):
            if not self._stopped:
                raise

    def stop(self) -> None:
        """End both directions at once."""
        self._stopped = True
        self._stream.abort()

    def _up(self) -> None:
        with contextlib.suppress(OSError, PamError):
            while data := os.read(self._source, CHUNK):
                self._stream.sendall(data)
            self._stream.shutdown(socket.SHUT_WR)

    def _write(self, data: bytes) -> bool:
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._sink, view) :]
        except OSError:
            return False
        return True
