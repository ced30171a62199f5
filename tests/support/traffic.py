"""Two-way traffic whose every byte is checked, over channels that end in all the ways there are.

A client's :class:`Exchange` tells the agent's side (:func:`answer`) with its first bytes what to send, how
long to wait before it reads, and how to end. Both send the same endless pattern, so that what came before a
cut is checked as well.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time
from dataclasses import dataclass

from pam_common.fast_ssh import ChannelStream

_ORDER = struct.Struct(">IIfB")
#: A prime, so that a lost or doubled packet never falls into step again.
PATTERN = random.Random(1).randbytes(65537)
_TWICE = PATTERN * 2

CLEAN, AGENT_CUTS, CLIENT_CUTS = range(3)


class CorruptionError(Exception):
    """Other bytes came than were sent."""


@dataclass(frozen=True)
class Exchange:
    """``up`` and ``down`` bytes; each side begins to read only after its pause (s). ``end`` is one of CLEAN,
    AGENT_CUTS (half-way) and CLIENT_CUTS."""

    up: int
    down: int
    client_pause: float = 0.0
    agent_pause: float = 0.0
    end: int = CLEAN

    @classmethod
    def random(cls, rng: random.Random, largest: int) -> Exchange:
        pause = (rng.random() < 0.2) * rng.random()
        other = (rng.random() < 0.2) * rng.random()
        end = rng.choice((CLEAN, CLEAN, CLEAN, AGENT_CUTS, CLIENT_CUTS))
        return cls(rng.randrange(largest), rng.randrange(largest), pause, other, end)

    def run(self, stream: ChannelStream) -> int:
        """Do it from the client's side; returns the bytes that were checked. Raises CorruptionError."""
        stream.sendall(_ORDER.pack(self.up, self.down, self.agent_pause, self.end))
        limit = self.down // 2 if self.end == CLIENT_CUTS else None
        return _both(stream, self.up, self.down, self.client_pause, limit, clean=self.end == CLEAN)


def answer(stream: ChannelStream) -> int:
    """The agent's side of an Exchange; returns the bytes that were checked. Raises CorruptionError."""
    head = b""
    while len(head) < _ORDER.size:
        more = stream.recv(_ORDER.size - len(head))
        if not more:
            stream.abort()
            return 0
        head += more
    up, down, pause, end = _ORDER.unpack(head)
    limit = up // 2 if end == AGENT_CUTS else None
    return _both(stream, down, up, pause, limit, clean=end == CLEAN)


def _both(
    stream: ChannelStream, send: int, expect: int, pause: float, limit: int | None, *, clean: bool
) -> int:
    """Send and receive at once; with a ``limit`` cut the channel once so much was received."""
    sender = threading.Thread(target=_send, args=(stream, send), name="traffic-send", daemon=True)
    sender.start()
    try:
        if pause:
            time.sleep(pause)
        received = _receive(stream, limit)
        if clean and received != expect:
            raise CorruptionError(f"{received} bytes came instead of {expect}")
        return received
    except OSError:
        if clean:
            raise CorruptionError("the channel was cut, and nobody had cut it") from None
        return 0
    finally:
        if limit is not None:
            stream.abort()
        sender.join()
        stream.close()


def _send(stream: ChannelStream, size: int) -> None:
    rng, sent = random.Random(size), 0
    with contextlib.suppress(OSError):
        while sent < size:
            at = sent % len(PATTERN)
            piece = min(size - sent, rng.choice((1, 100, 5000, 40_000)), len(PATTERN))
            stream.sendall(_TWICE[at : at + piece])
            sent += piece
        stream.shutdown(socket.SHUT_WR)


def _receive(stream: ChannelStream, limit: int | None) -> int:
    received = 0
    while limit is None or received < limit:
        piece = stream.recv(len(PATTERN))
        if not piece:
            break
        at = received % len(PATTERN)
        if piece != _TWICE[at : at + len(piece)]:
            raise CorruptionError(f"other bytes than were sent, after {received}")
        received += len(piece)
    return received
