"""One SSH channel through the interceptor: two ends, and how much may be sent between them.

What a sender may send is never more than what the receiver at the other end takes, and never more than the
channel's share of what one connection may keep: a slow reader so slows the writer at the far end, and
nothing piles up between them but a window.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

from pam_agent.protocols.base import ClientProtocolError, TargetProtocolError
from pam_agent.protocols.ssh.codec import ProtocolFault
from pam_agent.protocols.ssh.watch import Watch

#: The sides of an interceptor, and which fault is whose.
USER: Final = 0
TARGET: Final = 1
FAULTS: Final[tuple[ProtocolFault, ProtocolFault]] = (ClientProtocolError, TargetProtocolError)

#: Bytes of data in one packet, towards both peers: RFC 4253, 6.1.
PACKET: Final = 32 << 10
#: A peer that takes smaller packets than any real one would have its data cut into endless ones.
MIN_PACKET: Final = 512
#: RFC 4254, 5.2.
MAX_ROOM: Final = (1 << 32) - 1
#: Requests of one channel that wait for their answers: programs send a handful and wait.
MAX_REPLIES: Final = 128


@dataclass
class End:
    """One side of a channel: its numbers on that connection, and what may be sent over it."""

    number: int  #: ours
    remote: int = 0  #: the peer's
    room: int = 0  #: bytes that the peer takes now
    packet: int = 0  #: bytes that it takes at once
    credit: int = 0  #: bytes that the peer may still send
    eof: bool = False  #: the peer has no more data
    closed: bool = False  #: the peer closed it
    #: Answers that the peer waits for, in its order: None is still to come from the other side.
    replies: deque[bool | None] = field(default_factory=deque)


class Channel:
    """What is between two ends. All methods are called under the switchboard's lock."""

    def __init__(self, ends: tuple[End, End], watch: Watch, opener: int) -> None:
        self.ends = ends
        self.watch = watch
        self.opener = opener
        self.open = False

    def received(self, side: int, size: int) -> None:
        """Data of ``size`` came from the peer of ``side``. Raises PamError for what it may not send."""
        end = self.ends[side]
        if end.eof:
            raise FAULTS[side]("ssh data after its end")
        if size > PACKET or size > end.credit:
            raise FAULTS[side]("more ssh data than was allowed")
        end.credit -= size
        self.ends[1 - side].room -= size

    def adjusted(self, side: int, size: int) -> None:
        """The peer of ``side`` takes ``size`` bytes more."""
        end = self.ends[side]
        if end.room + size > MAX_ROOM:
            raise FAULTS[side]("an ssh window beyond 4 GiB")
        end.room += size

    def grant(self, side: int, share: int) -> int:
        """How many bytes more the peer of ``side`` may send now; 0 when it is not worth a packet."""
        end, ceiling = self.ends[side], min(self.ends[1 - side].room, share)
        size = ceiling - end.credit
        if end.eof or size <= 0 or (end.credit > ceiling // 2):
            return 0
        end.credit += size
        return size

    def expect_reply(self, side: int, answer: bool | None) -> None:
        """The peer of ``side`` waits for an answer: ours, or None for the other side's."""
        replies = self.ends[side].replies
        if len(replies) >= MAX_REPLIES:
            raise FAULTS[side]("too many ssh requests without waiting for an answer")
        replies.append(answer)

    def replied(self, side: int, answer: bool) -> None:
        """The peer of ``side`` answers the oldest request that it has not."""
        replies = self.ends[1 - side].replies
        for at, known in enumerate(replies):
            if known is None:
                replies[at] = answer
                return
        raise FAULTS[side]("an answer to an ssh request that was not made")

    def due_replies(self, side: int) -> list[bool]:
        """The answers that can be given to the peer of ``side`` now."""
        replies, due = self.ends[side].replies, []
        while replies and replies[0] is not None:
            due.append(bool(replies.popleft()))
        return due

    @property
    def over(self) -> bool:
        """Whether both peers have closed it."""
        return all(end.closed for end in self.ends)
