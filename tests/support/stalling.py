"""TCP servers in the place of a target that stall where a test wants them to.

A :class:`Target` either forwards to a real server, up to a number of bytes, or says a few prepared things
and then nothing more. ``open_connections`` asks the kernel, not the target, whether a connection is still up.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterable
from pathlib import Path

_ESTABLISHED = "01"


class Target:
    """Listens on a free loopback ``port`` until ``close``; each connection costs two threads.

    With ``upstream`` it forwards to that loopback port, but takes no more than ``most_up`` bytes of each
    connection and gives no more than ``most_down``. Without, it answers what it reads with the next of
    ``answers``, then reads on in silence.
    """

    def __init__(
        self,
        upstream: int | None = None,
        *,
        answers: Iterable[bytes] = (),
        most_up: int | None = None,
        most_down: int | None = None,
    ) -> None:
        self.connections = 0  #: ever accepted
        self.up = 0  #: bytes taken from the agent, of all connections
        self.down = 0
        self.changed = time.time()  #: when bytes or a connection came last
        self._upstream = upstream
        self._answers = tuple(answers)
        self._most_up = most_up
        self._most_down = most_down
        self._open: list[socket.socket] = []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, name="target-accept", daemon=True).start()

    def quiet(self, seconds: float) -> bool:
        """Whether a connection is up on which nothing has moved for ``seconds``."""
        return bool(open_connections(self.port)) and time.time() - self.changed > seconds

    def close(self) -> None:
        for sock in (self._listening, *self._open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listening.accept()
                self.changed = time.time()
                self.connections += 1
                self._open.append(sock)
                if self._upstream is None:
                    self._start(self._answer, sock)
                    continue
                upstream = socket.create_connection(("127.0.0.1", self._upstream))
                self._open.append(upstream)
                self._start(self._carry_up, sock, upstream)
                self._start(self._carry_down, upstream, sock)

    @staticmethod
    def _start(work: object, *sockets: socket.socket) -> None:
        threading.Thread(target=work, args=sockets, name="target", daemon=True).start()  # type: ignore[arg-type]

    def _answer(self, sock: socket.socket) -> None:
        answers = iter(self._answers)
        with contextlib.suppress(OSError), sock:
            while data := sock.recv(65536):
                self.up += len(data)
                self.changed = time.time()
                sock.sendall(next(answers, b""))

    def _carry_up(self, sock: socket.socket, upstream: socket.socket) -> None:
        taken = 0
        with contextlib.suppress(OSError):
            while self._most_up is None or taken < self._most_up:
                data = sock.recv(1 << 17)
                if not data:
                    upstream.shutdown(socket.SHUT_WR)
                    return
                if self._most_up is not None:
                    data = data[: self._most_up - taken]
                upstream.sendall(data)
                taken += len(data)
                self.up += len(data)
                self.changed = time.time()

    def _carry_down(self, upstream: socket.socket, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            given = 0
            while data := upstream.recv(1 << 17):
                if self._most_down is not None:
                    data = data[: max(0, self._most_down - given)]
                sock.sendall(data)
                given += len(data)
                self.down += len(data)
                self.changed = time.time()
            sock.shutdown(socket.SHUT_WR)


def open_connections(port: int) -> int:
    """How many loopback connections to ``port`` are up at the end that dialled; 0 once it shut them down."""
    return sum(row[1] == port and row[2] == _ESTABLISHED for row in _tcp())


def inodes_of_connections(port: int) -> set[str]:
    """The socket inodes of whoever has dialled ``port``, as ``/proc/PID/fd`` names them."""
    return {row[3] for row in _tcp() if row[1] == port}


def _tcp() -> list[tuple[int, int, str, str]]:
    """Local port, remote port, state and inode of every IPv4 connection of this machine."""
    rows = []
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        local, remote = (int(address.rpartition(":")[2], 16) for address in fields[1:3])
        rows.append((local, remote, fields[3], fields[9]))
    return rows
