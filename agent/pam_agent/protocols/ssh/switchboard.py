"""Joins the two legs of one connection: every message of the one is looked at, recorded, and goes on.

    reader of the user's leg    ── look, record ──▶ queue of the target's leg ──▶ sealed, sent
    reader of the target's leg  ── look, record ──▶ queue of the user's leg   ──▶ sealed, sent

No thread and no buffer of its own: each message is handled in the thread that read it, under one lock, and
nothing in there waits for a peer. What may be under way is bounded by the windows (see ``channel``), and by
the leg it goes to: one that is behind makes its senders wait.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from pam_agent.protocols.base import Conversation, Event
from pam_agent.protocols.ssh import codec
from pam_agent.protocols.ssh.channel import FAULTS, MIN_PACKET, PACKET, TARGET, USER, Channel, End
from pam_agent.protocols.ssh.codec import ChannelOpen, Endpoints, Reader, Request
from pam_agent.protocols.ssh.forwards import Binds, ForwardWatch
from pam_agent.protocols.ssh.policy import Policy
from pam_agent.protocols.ssh.requests import GlobalRequests
from pam_agent.protocols.ssh.session_channel import SessionWatch
from pam_agent.protocols.ssh.watch import Verdict, Watch
from pam_common.errors import PamError
from pam_common.fast_ssh.leg import Leg
from pam_common.stream import Data

#: Channels at once on one connection: sshd's MaxSessions is 10, a browser over -D opens a few dozen.
MAX_CHANNELS: Final = 64
#: What a channel's sender may have under way, with few channels and with many: a round trip of 10 ms at
#: 100 MB/s, and what keeps an idle one going.
WINDOW: Final = 1 << 20
MIN_WINDOW: Final = 64 << 10
#: Shared by the channels of a connection, each direction.
POOL: Final = 8 << 20
#: A leg that has more than this to send is behind: nobody may send more to it until it is not.
BEHIND: Final = 2 << 20
#: A leg's whole queue: the windows that were given away before it fell behind, each packet with what it
#: costs to keep. A peer that fills them byte by byte ends its connection.
MAX_QUEUE: Final = 40 << 20
#: Characters of a target's reason that are worth showing.
MAX_REASON: Final = 200

_INT = struct.Struct(">I")
_STDERR = 1


class Switchboard:
    """The channels of one connection. ``ended`` is called once, with the failure or None, from any thread."""

    def __init__(
        self,
        conversation: Conversation,
        policy: Policy,
        budget: int,
        ended: Callable[[int, PamError | None], None],
    ) -> None:
        self._conversation = conversation
        self._policy = policy
        self._budget = budget
        self._on_end = ended
        self._lock = threading.RLock()
        self._legs: dict[int, Leg] = {}
        self._channels: tuple[dict[int, Channel], dict[int, Channel]] = ({}, {})
        self._numbers = 0  # of channels ever; events carry it
        self._binds = Binds(policy)
        fail = partial(self.end, TARGET)
        self._requests = GlobalRequests(self._binds, self._record, fail, self._legs, self._lock)
        self._over = False
        self.finished = False  #: it ended when the target had closed all of its channels
        self._behind = [False, False]
        self.bytes_up = 0
        self.bytes_down = 0

    def attach(self, side: int, leg: Leg) -> None:
        """Take over the connection layer of ``leg``, before its login."""
        leg.packets.max_queued = MAX_QUEUE
        self._legs[side] = leg
        leg.on_message = partial(self._take, side)

    def follow(self, side: int) -> None:
        """From now on the end of this leg is the end of both. During its login it has a better reason."""
        leg = self._legs[side]
        leg.on_end = partial(self.end, side, None)
        if leg.ended:
            self.end(side, None)

    def end(self, side: int, failure: PamError | None) -> None:
        """Nothing goes on any more: ``side`` ended, or failed."""
        with self._lock:
            if self._over:
                return
            self._over = True
            channels = {id(channel): channel for table in self._channels for channel in table.values()}
            # What the target has closed is over for it; the user's answer to that may still be under way.
            closed = all(channel.ends[TARGET].closed for channel in channels.values())
            self.finished = closed and self._numbers > 0
            events = [event for channel in channels.values() for event in channel.watch.closed()]
            try:
                self._record(events)
            except PamError as error:
                failure = failure or error
        self._on_end(side, failure)

    # -- messages --------------------------------------------------------------------------------------

    def _take(self, side: int, kind: int, payload: memoryview) -> None:
        try:
            with self._lock:
                if not self._over:
                    self._dispatch(side, kind, payload)
        except PamError as error:
            self.end(side, error)
        reader = self._legs[side].packets
        for leg in self._legs.values():
            reader.flush_before_wait(leg.packets)

    def _dispatch(self, side: int, kind: int, payload: memoryview) -> None:
        if kind == codec.DATA:
            self._data(side, payload)
        elif kind == codec.WINDOW_ADJUST:
            self._adjust(side, payload)
        elif kind == codec.EXTENDED_DATA:
            self._extended_data(side, payload)
        elif kind == codec.GLOBAL_REQUEST:
            self._requests.take(side, payload)
        elif kind == codec.OPEN:
            self._open(side, payload)
        elif kind in (codec.OPEN_CONFIRMATION, codec.OPEN_FAILURE):
            self._answered(side, kind, payload)
        elif kind == codec.CHANNEL_REQUEST:
            self._request(side, payload)
        elif kind in (codec.CHANNEL_SUCCESS, codec.CHANNEL_FAILURE):
            self._replied(side, kind == codec.CHANNEL_SUCCESS, payload)
        elif kind == codec.EOF:
            self._eof(side, payload)
        elif kind == codec.CLOSE:
            self._close(side, payload)
        else:
            raise FAULTS[side](f"an ssh message {kind} that is not known")

    def _find(self, side: int, payload: memoryview) -> Channel:
        """The open channel that a message from ``side`` is for."""
        channel = self._channels[side].get(codec.number_at(payload, FAULTS[side]))
        if channel is None or not channel.open or channel.ends[side].closed:
            raise FAULTS[side]("a message for an ssh channel that is not open")
        return channel

    def _send(self, side: int, head: bytes, body: Data = b"") -> None:
        self._legs[side].queue(head, body)

    def _record(self, events: Sequence[Event]) -> None:
        if events:
            self._conversation.record(events)

    # -- data ------------------------------------------------------------------------------------------

    def _data(self, side: int, payload: memoryview) -> None:
        channel = self._find(side, payload)
        if len(payload) < 9 or _INT.unpack_from(payload, 5)[0] != len(payload) - 9:
            raise FAULTS[side]("malformed ssh channel data")
        head = codec.message(codec.DATA, channel.ends[1 - side].remote)
        self._pass_data(side, channel, "stdin" if side == USER else "stdout", head, payload[9:])

    def _extended_data(self, side: int, payload: memoryview) -> None:
        channel = self._find(side, payload)
        reader = Reader(payload, FAULTS[side], 5)
        stream = reader.uint32()
        if len(payload) < 13 or reader.uint32() != len(payload) - 13:
            raise FAULTS[side]("malformed ssh channel data")
        if side == USER or stream != _STDERR:
            raise FAULTS[side]("ssh data of a kind that has no use")
        head = codec.message(codec.EXTENDED_DATA, channel.ends[1 - side].remote, _INT.pack(stream))
        self._pass_data(side, channel, "stderr", head, payload[13:])

    def _pass_data(self, side: int, channel: Channel, stream: str, head: bytes, data: memoryview) -> None:
        channel.received(side, len(data))
        self._record(channel.watch.data(side, stream, data))
        largest = channel.ends[1 - side].packet
        while data:
            piece, data = data[:largest], data[largest:]
            self._send(1 - side, head + _INT.pack(len(piece)), piece)
            self._count(side, len(piece))
        self._conversation.touch()
        self._grant(side, channel)

    def _count(self, side: int, size: int) -> None:
        if side == USER:
            self.bytes_up += size
        else:
            self.bytes_down += size

    def _adjust(self, side: int, payload: memoryview) -> None:
        channel = self._find(side, payload)
        channel.adjusted(side, Reader(payload, FAULTS[side], 5).uint32())
        self._grant(1 - side, channel)

    def _grant(self, side: int, channel: Channel) -> None:
        """Let ``side`` send what the other side takes, unless that one is behind."""
        if channel.ends[side].closed:
            return
        ahead = self._legs[1 - side].packets
        if ahead.queued > BEHIND:
            if not self._behind[side]:
                self._behind[side] = True
                ahead.when_drained(partial(self._drained, side))
            return
        size = channel.grant(side, self._share())
        if size:
            self._send(side, codec.window_adjust(channel.ends[side].remote, size))

    def _drained(self, side: int) -> None:
        """The other side is no longer behind. In any thread."""
        with self._lock:
            self._behind[side] = False
            if self._over:
                return
            for channel in list(self._channels[side].values()):
                if channel.open:
                    self._grant(side, channel)
        leg = self._legs.get(side)
        if leg is not None:
            leg.packets.flush_soon()

    def _share(self) -> int:
        return max(MIN_WINDOW, min(WINDOW, POOL // max(1, len(self._channels[USER]))))

    # -- opening ---------------------------------------------------------------------------------------

    def _open(self, side: int, payload: memoryview) -> None:
        wish = ChannelOpen.parse(payload, FAULTS[side])
        if wish.packet < MIN_PACKET:
            self._send(side, codec.open_failure(wish.number, codec.SHORTAGE, "packets are too small"))
            return
        refusal: tuple[int, str] | None
        if len(self._channels[side]) >= MAX_CHANNELS:
            self._record([{"kind": "refused", "what": wish.kind, "reason": "too many channels"}])
            refusal, watch = (codec.SHORTAGE, f"the connection has {MAX_CHANNELS} channels"), None
        else:
            refusal, watch = self._admit(side, wish)
        if watch is None:
            assert refusal is not None
            self._send(side, codec.open_failure(wish.number, *refusal))
            return
        near = End(self._free(side), wish.number, wish.window, min(wish.packet, PACKET))
        far = End(self._free(1 - side))
        # What the far side may send at once; the near one's window is told when the far one's is known.
        far.credit = min(near.room, self._share())
        ends = (near, far) if side == USER else (far, near)
        channel = Channel(ends, watch, side)
        self._channels[side][near.number] = channel
        self._channels[1 - side][far.number] = channel
        self._send(1 - side, codec.open_channel(wish.kind, far.number, far.credit, PACKET, wish.body))

    def _admit(self, side: int, wish: ChannelOpen) -> tuple[tuple[int, str] | None, Watch | None]:
        """The refusal, or the watch over a channel that may be opened; either is recorded."""
        self._numbers += 1
        number = self._numbers
        if side == USER and wish.kind == "session":
            return None, SessionWatch(number, self._policy, self._budget)
        if (side, wish.kind) in ((USER, "direct-tcpip"), (TARGET, "forwarded-tcpip")):
            where = Endpoints.parse(wish.body, FAULTS[side])
            direction = "local" if side == USER else "remote"
            watch = ForwardWatch(number, direction, where)
            allowed = (
                self._policy.may_forward(where.host, where.port)
                if side == USER
                else self._binds.expects(where)
            )
            if allowed:
                self._record([watch.event()])
                return None, watch
            self._record(watch.opened(False, "not allowed"))
            return (codec.PROHIBITED, f"forwarding to {where.host}:{where.port} is not allowed"), None
        self._record([{"kind": "refused", "what": wish.kind, "reason": "not allowed"}])
        return (codec.PROHIBITED, "this kind of channel is not allowed"), None

    def _free(self, side: int) -> int:
        """The lowest number that no channel of ``side`` has."""
        taken = self._channels[side]
        return next(number for number in range(len(taken) + 1) if number not in taken)

    def _answered(self, side: int, kind: int, payload: memoryview) -> None:
        """The far side opened a channel, or would not."""
        channel = self._channels[side].get(codec.number_at(payload, FAULTS[side]))
        if channel is None or channel.open or channel.opener == side:
            raise FAULTS[side]("an answer to no wish for an ssh channel")
        far, near = channel.ends[side], channel.ends[1 - side]
        reader = Reader(payload, FAULTS[side], 5)
        if kind == codec.OPEN_FAILURE:
            reason, text = reader.uint32(), reader.text(4096)[:MAX_REASON]
            self._record(channel.watch.opened(False, text))
            self._forget(channel)
            self._send(1 - side, codec.open_failure(near.remote, reason, text))
            return
        far.remote, far.room, packet = reader.uint32(), reader.uint32(), reader.uint32()
        if packet < MIN_PACKET:
            raise FAULTS[side]("an ssh channel that takes packets of hardly any size")
        far.packet = min(packet, PACKET)
        channel.open = True
        near.credit = min(far.room, self._share())
        self._record(channel.watch.opened(True, ""))
        self._send(1 - side, codec.opened(near.remote, near.number, near.credit, PACKET) + reader.rest())

    def _forget(self, channel: Channel) -> None:
        for side, end in enumerate(channel.ends):
            del self._channels[side][end.number]

    # -- requests and ends -----------------------------------------------------------------------------

    def _request(self, side: int, payload: memoryview) -> None:
        channel = self._find(side, payload)
        request = Request.parse(payload, FAULTS[side])
        verdict, events = channel.watch.request(side, request)
        self._record(events)
        if verdict is Verdict.PASS:
            if request.wants_reply:
                channel.expect_reply(side, None)
            head = codec.message(codec.CHANNEL_REQUEST, channel.ends[1 - side].remote)
            self._send(1 - side, head, payload[5:])
            if side == USER:
                self._conversation.touch()
        elif request.wants_reply:
            channel.expect_reply(side, verdict is Verdict.DROP)
            self._reply(side, channel)

    def _replied(self, side: int, ok: bool, payload: memoryview) -> None:
        channel = self._find(side, payload)
        channel.replied(side, ok)
        self._record(channel.watch.replied(side, ok))
        self._reply(1 - side, channel)

    def _reply(self, side: int, channel: Channel) -> None:
        for ok in channel.due_replies(side):
            kind = codec.CHANNEL_SUCCESS if ok else codec.CHANNEL_FAILURE
            self._send(side, codec.message(kind, channel.ends[side].remote))

    def _eof(self, side: int, payload: memoryview) -> None:
        channel = self._find(side, payload)
        if channel.ends[side].eof:
            return
        channel.ends[side].eof = True
        self._record(channel.watch.ended(side))
        self._send(1 - side, codec.message(codec.EOF, channel.ends[1 - side].remote))

    def _close(self, side: int, payload: memoryview) -> None:
        channel = self._find(side, payload)
        channel.ends[side].closed = True
        if channel.over:
            self._record(channel.watch.closed())
        self._send(1 - side, codec.message(codec.CLOSE, channel.ends[1 - side].remote))
        if channel.over:
            self._forget(channel)
