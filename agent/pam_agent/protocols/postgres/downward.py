"""Target → client: small messages in the thread that reads the ssh connection, the rest in one's own.

The other half of ``upward``, for the same reason. The own thread lends the target's socket to the thread that
brings the client's bytes, and sleeps. That one calls ``_ready`` when the target has something to say. It must
not wait: whatever is large, finds no room on its way to the client, or is an end or a failure, is left to the
own thread, which goes on by itself until messages are small again. The two never run at the same time.
"""

from __future__ import annotations

import time
from typing import Final

from pam_agent.protocols.base import Conversation, TargetProtocolError
from pam_agent.protocols.postgres.codec import TARGET_KINDS
from pam_agent.protocols.postgres.framing import COPY_DATA, DATA_ROW, Framer
from pam_agent.protocols.postgres.target_side import TargetSide
from pam_agent.target_tls import TargetStream
from pam_common.buffer import IDLE, ReadBuffer
from pam_common.errors import TruncatedError
from pam_common.frames import BATCH_DATA
from pam_common.stream import LendingStream, Stream

#: What one read of the target fills, and is sent on at once. Larger ones gained nothing; memory is touched
#: only as far as it is filled.
DOWN_SIZE: Final = BATCH_DATA
#: What the reading thread does itself, as in ``upward``.
INLINE: Final = 8 << 10
#: Seconds of CPU that one of them may take, for which other sessions wait: else the own thread goes on.
LONG: Final = 0.005
#: So many small reads in a row, and messages are small again: to hand the socket to and fro costs more than
#: what is gained by a few.
SMALL_READS: Final = 16


class Downward:
    """One connection's bytes from target to client."""

    def __init__(
        self, client: Stream, target: TargetStream, conversation: Conversation, side: TargetSide
    ) -> None:
        self.bytes = 0
        self.client_gone = False
        self.at_boundary = True  #: the client has got whole messages only, so that one more can be understood
        self._client = client
        self._lender = client if isinstance(client, LendingStream) else None
        self._target = target
        self._conversation = conversation
        self._side = side
        self._framer = Framer(TARGET_KINDS, frozenset({DATA_ROW, COPY_DATA}), side, TargetProtocolError)
        self._memory = ReadBuffer(DOWN_SIZE)
        self._kept = 0  # bytes at the front of it that were not sent on: less than a header
        # What _ready() left to do; not empty only while our thread is being woken.
        self._unsent = 0
        self._ended = False

    def carry(self, early: bytes) -> None:
        """Carry until either side is at its end, beginning with what was read ``early``. Raises PamError."""
        self._memory.memory[: len(early)] = early  # a login reads less than a buffer
        if early and not self._send(self._looked_at(len(early))):
            return
        small = SMALL_READS
        while True:
            if small >= SMALL_READS and self._lend():
                small = 0
                if not self._finish_ready():
                    return
            fresh = self._read()
            if not fresh or not self._send(self._looked_at(fresh)):
                return
            small = small + 1 if fresh < INLINE else 0

    def _looked_at(self, fresh: int) -> int:
        """Look at what was kept and ``fresh`` bytes behind it, and record it; how much of it may go on."""
        self._kept += fresh
        safe = self._framer.feed(self._memory.view, self._kept)
        events = self._side.take_events()
        if events:
            self._conversation.record(events)
        return safe

    def _send(self, safe: int) -> bool:
        """Send on what may; False when the client is gone."""
        try:
            if safe:
                self._client.sendall(self._memory.view[:safe])
                self._count(safe)
        except (OSError, TruncatedError):
            self.client_gone = True
        return not self.client_gone

    def _count(self, safe: int) -> None:
        self.bytes += safe
        self.at_boundary = self._framer.at_boundary
        self._conversation.touch()
        self._kept -= safe
        if self._kept:
            self._memory.memory.move(0, safe, self._kept)

    def _read(self) -> int:
        """Wait for more, in our own thread; 0 at the target's end."""
        try:
            if self._memory.used and self._target.quiet(IDLE):
                self._memory.release()  # not what is kept: that is a header at most
            fresh = self._target.recv_into(self._memory.view[self._kept :])
        except OSError:
            return 0
        self._memory.note(self._kept + fresh)
        return fresh

    # -- while the target's socket is lent ---------------------------------------------------------------

    def _lend(self) -> bool:
        """Whether it was, and is ours again."""
        if self._lender is None or self._target.pending:
            return False
        self._memory.release()
        self._target.release()
        return self._lender.lend(self._target.fileno(), self._ready)

    def _ready(self) -> bool:
        """In the thread that reads the ssh connection: carry what is small. False when more is to be done."""
        assert self._lender is not None
        began = time.thread_time()
        try:
            fresh = self._target.recv_soon(self._memory.view[self._kept : self._kept + INLINE])
        except OSError:
            fresh = 0
        if not fresh:
            self._ended = fresh == 0
            return not self._ended
        self._memory.note(self._kept + fresh)
        safe = self._looked_at(fresh)
        if safe:
            if not self._lender.send_soon(self._memory.view[:safe]):
                self._unsent = safe
                return False
            self._count(safe)
        return fresh < INLINE and not self._target.pending and time.thread_time() - began < LONG

    def _finish_ready(self) -> bool:
        """In our own thread again: send what _ready() could not; False when the end has come."""
        unsent, self._unsent = self._unsent, 0
        return self._send(unsent) and not self._ended
