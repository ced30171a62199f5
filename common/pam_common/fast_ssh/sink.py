"""Who takes what a channel receives."""

from __future__ import annotations

from typing import Protocol


class Sink(Protocol):
    """Takes what a channel receives, in the transport's reader thread: nothing here may block."""

    def data(self, data: memoryview) -> None:
        """Bytes from the peer, where they were read: they are there during the call only. Room for as many is
        given back by :meth:`ChannelStream.consumed`."""

    def adjusted(self, size: int) -> None:
        """The peer has room for so many more bytes."""

    def ended(self) -> None:
        """The peer sent EOF: no more data."""

    def closed(self) -> None:
        """The peer closed the channel, or the connection is gone. Called once, last of all."""
