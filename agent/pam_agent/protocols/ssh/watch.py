"""What looks at a channel: says what may pass, and what is recorded of it.

A watch does no I/O and has no clock. The events it gives are recorded before the message they come from goes
on; a message that it does not let pass never does.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Sequence
from typing import Protocol

from pam_agent.protocols.base import Event
from pam_agent.protocols.ssh.codec import Request


class Verdict(enum.Enum):
    """What becomes of a request."""

    PASS = enum.auto()
    REFUSE = enum.auto()  #: the peer is told, when it asked to be
    DROP = enum.auto()  #: nothing is forwarded and nothing said


class Watch(Protocol):
    """Sides are ``channel.USER`` and ``channel.TARGET``: whose message it is."""

    def opened(self, ok: bool, reason: str) -> Sequence[Event]:
        """The other side opened the channel, or refused it for ``reason``."""

    def data(self, side: int, stream: str, data: memoryview) -> Sequence[Event]:
        """``stream``: stdin, stdout or stderr."""

    def request(self, side: int, request: Request) -> tuple[Verdict, Sequence[Event]]:
        """A channel request."""

    def replied(self, side: int, ok: bool) -> Sequence[Event]:
        """``side`` answered the oldest request that was passed to it."""

    def ended(self, side: int) -> Sequence[Event]:
        """``side`` has no more data."""

    def closed(self) -> Sequence[Event]:
        """Nothing more comes. Called once for every channel."""


class Content:
    """One direction of a byte stream: its first bytes up to a budget, then only count and hash."""

    def __init__(self, budget: int) -> None:
        self.bytes = 0
        self._left = budget
        self._hash = hashlib.sha256()

    def take(self, data: memoryview) -> str | None:
        """Count ``data``; the text to record of it, or None. Not UTF-8 is replaced."""
        self.bytes += len(data)
        self._hash.update(data)
        if not self._left:
            return None
        kept = bytes(data[: self._left])
        self._left -= len(kept)
        return kept.decode("utf-8", "replace")

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()
