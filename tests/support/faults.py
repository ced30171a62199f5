"""Faults of the world around a process: a bad line to the platform, a disk that is too small."""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import TracebackType

_PIECE = 16384
_UNAVAILABLE = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class FaultyLine:
    """A loopback port that leads to another one, as well or as badly as ``mode`` says:

    ``fine``; ``503`` for every request; ``cut``: reset after a random number of bytes from either side;
    ``slow``: ``rate`` bytes per second from the client. Setting a mode resets what is open.
    """

    def __init__(self, target: int, rng: Random, *, rate: int = 1 << 20) -> None:
        self._target, self._rng, self._rate = target, rng, rate
        self._mode = "fine"
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self.cuts = 0
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        threading.Thread(target=self._accept, name="faulty-line", daemon=True).start()

    def __enter__(self) -> FaultyLine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        self.mode = "503"  # resets what is open

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def mode(self) -> str:
        return self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        with self._lock:
            self._mode = mode
            for sock in self._open:
                _shut(sock)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), name="faulty-line", daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            if self._mode == "503":
                _refuse(client)
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                return
            with server:
                self._carry(client, server)

    def _carry(self, client: socket.socket, server: socket.socket) -> None:
        with self._lock:
            mode = self._mode
            self._open |= {client, server}
            # Within the second or third piece of an upload, or in an answer's headers.
            up = self._rng.randrange(1 << 20, 3 << 20) if mode == "cut" else 1 << 60
            down = self._rng.randrange(500, 5000) if mode == "cut" else 1 << 60
        back = threading.Thread(target=self._pipe, args=(server, client, down, 0), daemon=True)
        back.start()
        self._pipe(client, server, up, self._rate if mode == "slow" else 0)
        back.join()
        with self._lock:
            self._open -= {client, server}

    def _pipe(self, source: socket.socket, sink: socket.socket, budget: int, rate: int) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(min(_PIECE, budget)):
                sink.sendall(data)
                budget -= len(data)
                if budget <= 0:
                    self.cuts += 1
                    break
                if rate:
                    time.sleep(len(data) / rate)
        for sock in (source, sink):
            _shut(sock)


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        # A reset, not an orderly end: what a cut line looks like.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.shutdown(socket.SHUT_RDWR)


def _refuse(client: socket.socket) -> None:
    """503, once the request's headers are there; its body is taken, else the answer is reset away."""
    client.settimeout(5)
    with contextlib.suppress(OSError):
        client.recv(_PIECE)
        client.sendall(_UNAVAILABLE)
        client.shutdown(socket.SHUT_WR)
        while client.recv(_PIECE):
            pass


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A real file system of that size at ``folder`` (made if missing). Needs root."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    options = f"size={size},mode=0700"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "pam-test", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(path: Path) -> None:
    """Write a file until its disk is full."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
