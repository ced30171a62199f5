"""Joins two channels of two connections in their reader threads: no thread, no buffer, no decryption of
what they carry.

    reader of a ── data ──▶ number of b's peer instead of a's ──▶ sealed, sent; or queue of b, if others wait
    reader of b ── window adjust ──▶ as much room for a's peer

The windows are those of the two ends: who reads slowly gives no room, and so the writer at the other end
waits. What a peer may have under way is bounded twice: by its channel's window, which each ChannelStream
checks, and by the connection that it goes to: while that is behind it gives no more room to anybody, and then
to all who waited alike. A channel that fills its queue all the same is cut, and no other.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable

import paramiko
from paramiko.common import MSG_CHANNEL_WINDOW_ADJUST

from pam_common.fast_ssh.channel import MAX_WINDOW, WINDOW, ChannelStream
from pam_common.fast_ssh.outgoing import PACKET_COST

#: A connection that has more than this to send is behind: a few windows, or a second of a slow link. Once
#: most of it is gone, those who waited share so much room.
BEHIND = 4 << 20
#: Of which each gets this much at least.
LEAST_SHARE = 16 << 10
#: A peer that has less room than this left gets more without its peer asking, where there is any.
LOW = 128 << 10

#: A packet with so much data is sent by itself.
LARGE = 16 << 10

_INT = struct.Struct(">I")


class Switch:
    """``first`` and ``second`` as one channel, until either is closed or lost."""

    def __init__(self, first: ChannelStream, second: ChannelStream, ended: Callable[[], None]) -> None:
        """``ended`` is called once, in a reader thread or that of :meth:`start` or :meth:`abort`, and must
        not block. Each channel must have been opened with a window, and packets, of at most the other
        peer's."""
        self.first, self.second = first, second
        self._ended = ended
        self._lock = threading.Lock()
        self._over = False
        self._up = _Way(self, first, second)
        self._down = _Way(self, second, first)
        self._up.back, self._down.back = self._down, self._up

    def start(self) -> None:
        """Pass on what came already, then all that comes."""
        with self.first._order, self.second._order:
            for way in (self._up, self._down):
                way.begin()
            self.first._hand_over(self._up)
            self.second._hand_over(self._down)
        for way in (self._up, self._down):
            way.flush()

    def abort(self) -> None:
        """Cut both channels from any thread, without waiting."""
        self.first.abort()
        self.second.abort()
        self.over()

    def over(self) -> None:
        with self._lock:
            first, self._over = not self._over, True
        if first:
            self._ended()

    @property
    def bytes_up(self) -> int:
        """Bytes of data from ``first`` to ``second``."""
        return self._up.carried

    @property
    def bytes_down(self) -> int:
        return self._down.carried

    @property
    def cut(self) -> bool:
        """Whether it ended without the ends of both sides."""
        return not (self.first.eof_received and self.second.eof_received)


class _Way:
    """One direction: the :class:`~pam_common.fast_ssh.channel.Sink` of ``source``."""

    back: _Way

    def __init__(self, switch: Switch, source: ChannelStream, target: ChannelStream) -> None:
        self._switch = switch
        self._source, self._target = source, target
        self._lock = threading.Lock()
        self._pending = 0  # room that the target's peer gave and the source's was not told of
        self._asked = False
        self._emptied = self._share = 0  # what of the target's queue came this way since it was empty
        self.carried = 0

    def begin(self) -> None:
        """Within both channels' order: from here on, the room of the one is for the other to use."""
        source, target = self._source, self._target
        with target._lock:
            target._relayed = True
            room = target._window
        # Not more than the target's peer takes; what it takes beyond is given when there is need.
        self._pending = room - source._credit - source._pieces.size
        assert self._pending >= 0

    # -- Sink; in the source's reader thread -------------------------------------------------------------

    def data(self, data: memoryview) -> None:
        source, target = self._source, self._target
        reader = source.packets
        # What comes together goes on together, unless it is large.
        packet = reader.packet_of(data) if reader.drained or len(data) >= LARGE else None
        passed = False
        if packet is not None:
            with target._lock:
                passed = target.pass_on(packet)
        if passed:
            target.flush()  # what others queued meanwhile; no lock is held, as those who wait are told then
        elif not self._queue(data):
            return
        self.carried += len(data)
        if self._pending and source._credit < LOW:
            self._pass_on()

    def _queue(self, data: memoryview) -> bool:
        """Queue what could not be passed on at once; False when that was too much."""
        target = self._target
        if target.packets.emptied != self._emptied:
            self._emptied, self._share = target.packets.emptied, 0
        self._share += len(data) + PACKET_COST
        if target.packets.crowded(self._share):
            # Windows that were used all at once, or packets of next to no size. It is the sender's doing: cut
            # off, the target's connection would take everybody's sessions with it.
            self._switch.abort()
            return False
        with target._lock:
            target.put_data(data)
        self.flush()
        return True

    def adjusted(self, size: int) -> None:
        self.back.give(size)

    def ended(self) -> None:
        with self._target._lock:
            self._target._put_eof()
        self.flush()

    def closed(self) -> None:
        self._target.abort()  # after an EOF it is no cut
        self._switch.over()

    def flush(self) -> None:
        self._source.packets.flush_before_wait(self._target.packets)

    # -- room ------------------------------------------------------------------------------------------

    def give(self, size: int) -> None:
        """The target's peer takes ``size`` bytes more. In its reader thread."""
        with self._lock:
            self._pending += size
            if self._pending > MAX_WINDOW:
                raise paramiko.SSHException("a window beyond 4 GiB")
        self._pass_on()

    def _pass_on(self) -> None:
        packets = self._target.packets
        # While others wait nobody passes them: a queue that is filled again and again never gets low.
        if packets.queued > BEHIND or packets.awaited:
            with self._lock:
                ask, self._asked = not self._asked, True
            if ask:
                packets.when_low(BEHIND // 4, self._low)
        else:
            self._grant(WINDOW)

    def _grant(self, most: int) -> None:
        source = self._source
        with self._lock, source._lock:
            size = min(self._pending, WINDOW - source._credit, most)
            if size <= 0:
                return
            self._pending -= size
            source._credit += size
            source.put(MSG_CHANNEL_WINDOW_ADJUST, _INT.pack(size))
        source.flush()

    def _low(self, waited: int) -> None:
        with self._lock:
            self._asked = False
        self._grant(max(LEAST_SHARE, BEHIND // waited))
