"""One ssh channel as a :class:`pam_common.stream.Stream` (RFC 4254, section 5).

Not paramiko's ``Channel``: that one copies each byte through a pipe guarded by a Condition, believes any
window, and can only be read by a thread of its own. Here the transport's reader thread hands each packet to
:meth:`ChannelStream.take`, which keeps it for ``recv``, or passes it on at once to a :class:`Sink`.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import paramiko
from paramiko.common import (
    MSG_CHANNEL_CLOSE,
    MSG_CHANNEL_DATA,
    MSG_CHANNEL_EOF,
    MSG_CHANNEL_FAILURE,
    MSG_CHANNEL_OPEN_FAILURE,
    MSG_CHANNEL_OPEN_SUCCESS,
    MSG_CHANNEL_REQUEST,
    MSG_CHANNEL_WINDOW_ADJUST,
)

from pam_common.errors import RefusedError, UnavailableError
from pam_common.fast_ssh.outgoing import PACKET_HEAD, PACKET_TAIL
from pam_common.fast_ssh.pieces import Pieces
from pam_common.fast_ssh.sink import Sink
from pam_common.stream import ROOM, Data

if TYPE_CHECKING:
    from pam_common.fast_ssh.transport import Transport

#: As OpenSSH has it. Measured: bulk gains a sixth over half of it, and other sessions wait no longer.
WINDOW = 2 << 20
#: Two full messages of the secure channel (decision 8); a peer that takes less gets less.
PACKET = 2 * 65537
#: Who takes less than this in a packet wants to see work: each byte would cost a packet.
MIN_PACKET = 512
#: The peer is told of room again after so many bytes, or half of a smaller window: rarely, and long before it
#: has to wait.
ADJUST_AT = WINDOW // 2
#: RFC 4254, 5.2: a window beyond it is an error.
MAX_WINDOW = (1 << 32) - 1
#: Characters of a peer's reason that are worth showing.
MAX_REASON = 200

#: What every channel that is open shares: an Event is large, and each has waited for its own.
_OPEN = threading.Event()
_OPEN.set()

#: What a channel keeps that has a sink.
_NO_PIECES = Pieces()

_HEADER = struct.Struct(">BI")
_DATA = struct.Struct(">BII")
_INT = struct.Struct(">I")
#: Where a packet has its channel's number: behind its length, that of its padding, and its type.
_NUMBER_AT = 6
_OPENED = struct.Struct(">III")
assert max(PACKET_HEAD + _DATA.size, PACKET_TAIL) <= ROOM


class ChannelStream:
    """A channel of ``transport``. One thread may read while others write; any may abort."""

    def __init__(self, transport: Transport, number: int, *, window: int = WINDOW, packet: int = PACKET):
        self.transport = transport
        self.number = number
        self.remote = 0
        self.packets = transport.packets
        self._lock = threading.Lock()
        self._order = threading.Lock()  # held while a packet is passed on, so that attach() can come between
        self._sink: Sink | None = None
        self._relayed = False  # by a Switch: the peer's room is for the other channel's peer to use
        # Receiving.
        self._packet_in = packet
        self._credit = window  # what the peer may still send
        self._adjust_at = min(ADJUST_AT, -(-window // 2))
        self._taken = 0  # what was consumed and the peer was not told yet
        self._pieces = Pieces()  # one window at most
        self.eof_received = False
        self._waiting = self._nudged = False
        self._gate = threading.Lock()  # a binary semaphore: cheaper than a Condition, for one reader
        self._gate.acquire()
        self._step: Callable[[memoryview], bool] | None = None
        self._stepping = threading.Lock()  # held by the reader thread while recv's thread must stay asleep
        # Sending.
        self._packet_out = 0
        self._window = 0
        self._room: threading.Condition | None = None  # made when somebody waits: most never do
        self.eof_sent = False
        # Life.
        self._open = threading.Event()
        self._refusal: RefusedError | None = None
        self._close_sent = self._close_received = False
        self._lost = False

    # -- opening ---------------------------------------------------------------------------------------

    @property
    def window(self) -> int:
        """Bytes that the peer takes now."""
        return self._window

    @property
    def packet(self) -> int:
        """Bytes that the peer takes in one packet."""
        return self._packet_out

    @property
    def buffered(self) -> int:
        """Bytes that were received and not read yet."""
        with self._lock:
            return self._pieces.size

    def opened_by(self, remote: int, window: int, packet: int) -> None:
        """The peer's number and limits are known: the channel is open."""
        if packet < MIN_PACKET:
            raise paramiko.SSHException("the peer takes packets of next to no size")
        with self._lock:
            self.remote, self._window = remote, window
            self._packet_out = min(packet, PACKET)
            self._open.set()
            self._open = _OPEN

    def wait_open(self, timeout: float) -> None:
        """Wait for the peer's answer. Raises RefusedError with its words, UnavailableError without any."""
        answered = self._open.wait(timeout)
        if self._refusal is not None:
            raise self._refusal
        if not answered:
            # Should it be opened later on after all, then only to be closed.
            self.abort()
            raise UnavailableError("no channel could be opened: no answer in time")
        if self._lost:
            raise UnavailableError("no channel could be opened: the ssh connection is gone")

    # -- Stream ----------------------------------------------------------------------------------------

    def recv(self, size: int, /) -> bytes:
        """Raises ConnectionError when the channel ended without its EOF, InterruptedError when a step (see
        :meth:`step_with`) left something to do."""
        while True:
            with self._lock:
                if self._nudged:
                    self._nudged = False
                    raise InterruptedError
                if self._pieces:
                    data = self._pieces.take(size)
                    break
                if self.eof_received:
                    return b""
                if self._lost:
                    raise ConnectionError("the ssh connection is gone")
                if self._close_received or self._close_sent:
                    raise ConnectionResetError("the ssh channel was cut")
                self._waiting = True
            self._gate.acquire()
            with self._stepping:  # a step that is under way comes to its end first
                pass
        self.consumed(len(data))
        return data

    def step_with(self, step: Callable[[memoryview], bool]) -> None:
        """While ``recv`` waits, give what comes to ``step``, in the reader thread: that saves waking another.

        It must not block, and takes all that it is given. False wakes ``recv``, which raises
        InterruptedError then: the rest is for its thread.
        """
        self._step = step

    def _make_step(self, step: Callable[[memoryview], bool], data: memoryview) -> None:
        """In the reader thread, which holds ``_stepping``."""
        try:
            if not step(data):
                with self._lock:
                    self._nudged = True
                    self._wake_reader()
            if self._taken + len(data) < self._adjust_at:
                self._taken += len(data)  # without the lock: nobody else receives now
                return
        finally:
            self._stepping.release()
        self.consumed(len(data))

    def consumed(self, size: int) -> None:
        """Give the peer room for ``size`` bytes that it sent. Never blocks."""
        with self._lock:
            self._taken += size
            if self._taken < self._adjust_at or self._close_sent or self.eof_received:
                return
            grant, self._taken = self._taken, 0
            self._credit += grant
            self.put(MSG_CHANNEL_WINDOW_ADJUST, _INT.pack(grant))
        self.flush()

    def sendall(self, data: Data, /) -> None:
        """Send ``data``; blocks while the peer is slow. Raises ConnectionError when it cannot."""
        view = memoryview(data)
        while view:
            size = self._reserve(len(view))
            header = _DATA.pack(MSG_CHANNEL_DATA, self.remote, size)
            try:
                self.packets.send_payload(header, view[:size])
            except (EOFError, paramiko.SSHException) as error:
                raise ConnectionError(f"the ssh connection is gone: {error}") from None
            view = view[size:]

    def sendall_in_place(self, memory: memoryview, start: int, end: int, /) -> None:
        """The same for ``memory[start:end]``, without a copy: it is overwritten, and ROOM bytes around it."""
        while start < end:
            upto = start + self._reserve(end - start)
            kept = bytes(memory[upto : min(end, upto + PACKET_TAIL)])  # goes next
            _DATA.pack_into(memory, start - _DATA.size, MSG_CHANNEL_DATA, self.remote, upto - start)
            try:
                self.packets.send_in_place(memory, start - _DATA.size, upto)
            except (EOFError, paramiko.SSHException) as error:
                raise ConnectionError(f"the ssh connection is gone: {error}") from None
            memory[upto : upto + len(kept)] = kept
            start = upto

    def _reserve(self, wanted: int) -> int:
        """Wait for room, and take up to a packet's worth of ``wanted`` bytes."""
        with self._lock:
            while not self._window and not self._unsendable():
                self._room = self._room or threading.Condition(self._lock)
                self._room.wait()
            if self._unsendable():
                raise BrokenPipeError("the ssh channel is closed")
            size = min(wanted, self._window, self._packet_out)
            self._window -= size
            return size

    def _unsendable(self) -> bool:
        return self._close_sent or self._close_received or self.eof_sent or self._lost

    def lend(self, fd: int, ready: Callable[[], bool], /) -> bool:
        """See :class:`~pam_common.stream.LendingStream`."""
        return self.packets.lend(fd, ready)

    def reserve_soon(self, size: int, /) -> bool:
        """Take room for ``size`` bytes that go into one packet; False when one would have to wait for it."""
        if not self.packets.at_leisure:
            return False
        with self._lock:
            if size > min(self._window, self._packet_out) or self._unsendable():
                return False
            self._window -= size
            return True

    def send_reserved(self, data: memoryview, /) -> None:
        """Send what room was taken for, before the reader thread waits again."""
        with self._lock:
            self.put_data(data)
        self.packets.flush_before_wait(self.packets)

    def shutdown(self, how: int, /) -> None:
        if how != socket.SHUT_WR:
            raise ValueError("only the sending side can be shut down")
        with self._lock:
            self._put_eof()
        self.flush()

    def close(self) -> None:
        """Close the channel after what was sent; the peer reads a clean end."""
        self._close(clean=True)
        with self._lock:
            self._pieces.clear()  # a peer that never closes its side must not keep them here

    def abort(self) -> None:
        """Close the channel at once and without EOF: the peer reads a cut. Never blocks.

        A sendall that waits for the window fails; one that is inside the connection's socket goes on until
        that moves or its keepalive gives up, since half a packet cannot be taken back.
        """
        self._close(clean=False)

    def _close(self, *, clean: bool) -> None:
        with self._lock:
            if clean:
                self._put_eof()
            self._put_close()
            self._wake_all()
        self.flush()

    # -- sending without waiting, in order; each under the lock ------------------------------------------

    def put(self, kind: int, body: Data = b"") -> None:
        """Queue a packet. Holding the lock keeps it from following a CLOSE; :meth:`flush` comes after."""
        if not self._close_sent and not self._lost:
            self.transport.queue(_HEADER.pack(kind, self.remote), body)

    def put_data(self, data: memoryview) -> None:
        """Queue data beyond what ``sendall`` counts: the window is the caller's to keep."""
        if not self._close_sent and not self._lost:
            self.transport.queue(_DATA.pack(MSG_CHANNEL_DATA, self.remote, len(data)), bytes(data))

    def pass_on(self, packet: memoryview) -> bool:
        """Send another connection's packet of data at once, with our peer's number, where nothing waits to be
        sent. The window is the caller's to keep."""
        if self._close_sent or self._lost:
            return False
        _INT.pack_into(packet, _NUMBER_AT, self.remote)
        try:
            return self.packets.pass_on(packet)
        except EOFError:
            return True  # the connection is gone, which its reader will tell

    def flush(self) -> None:
        with contextlib.suppress(EOFError):  # the connection is gone, which its reader will tell
            self.packets.flush_soon()

    def _put_eof(self) -> None:
        if not self.eof_sent and self._open.is_set():
            self.put(MSG_CHANNEL_EOF)
            self.eof_sent = True

    def _put_close(self) -> None:
        if self._open.is_set():
            self.put(MSG_CHANNEL_CLOSE)
            if self._close_received:
                self.transport.forget(self.number)
        self._close_sent = True

    # -- what the peer says; in the reader thread --------------------------------------------------------

    def take(self, kind: int, payload: memoryview) -> None:
        """Act on a packet for this channel. Raises SSHException for what no honest peer sends."""
        if kind == MSG_CHANNEL_DATA:
            self._take_data(payload)
        elif kind == MSG_CHANNEL_WINDOW_ADJUST:
            self._take_adjust(payload)
        elif kind == MSG_CHANNEL_EOF:
            self._take_eof()
        elif kind == MSG_CHANNEL_CLOSE:
            self._take_close()
        elif kind == MSG_CHANNEL_OPEN_SUCCESS:
            self._take_success(payload)
        elif kind == MSG_CHANNEL_OPEN_FAILURE:
            self._take_failure(payload)
        elif kind == MSG_CHANNEL_REQUEST:
            self._take_request(payload)
        else:
            raise paramiko.SSHException(f"a message {kind}, which a forwarded channel has no use for")

    def _take_data(self, payload: memoryview) -> None:
        data = payload[9:]
        if len(payload) < 9 or _INT.unpack_from(payload, 5)[0] != len(data):
            raise paramiko.SSHException("malformed channel data")
        if len(data) > self._packet_in:
            raise paramiko.SSHException("the peer sends larger packets than it was allowed")
        with self._order:
            with self._lock:
                self._require_open()
                if self.eof_received:
                    raise paramiko.SSHException("the peer sends data after its EOF")
                self._credit -= len(data)
                if self._credit < 0:
                    raise paramiko.SSHException("the peer sends more than its window allows")
                if self._close_sent or not data:
                    return  # was under way when the channel was closed here
                step = self._step
                if self._sink is None:
                    if step is None or not self._waiting or self._pieces:
                        self._keep(data)
                        return
                    # recv wakes by itself only for an end, and waits for us then.
                    self._stepping.acquire()
            if self._sink is not None:
                self._sink.data(data)
            elif step is not None:
                self._make_step(step, data)

    def _keep(self, data: memoryview) -> None:
        self._pieces.keep(data)
        self._wake_reader()

    def _take_adjust(self, payload: memoryview) -> None:
        size = _INT.unpack(payload[5:9])[0]
        with self._order:
            with self._lock:
                self._require_open()
                if self._sink is None or not self._relayed:
                    self._window += size
                    if self._window > MAX_WINDOW:
                        raise paramiko.SSHException("a window beyond 4 GiB")
                    self._wake_writers()
                    return
            self._sink.adjusted(size)

    def _take_eof(self) -> None:
        with self._order:
            with self._lock:
                self._require_open()
                if self.eof_received or self._close_sent:
                    return
                self.eof_received = True
                self._wake_reader()
            if self._sink is not None:
                self._sink.ended()

    def _take_close(self) -> None:
        with self._order:
            with self._lock:
                self._require_open()
                known, self._close_received = self._close_sent, True
                if known:
                    self.transport.forget(self.number)
                else:
                    self._put_close()
                self._wake_all()
            if self._sink is not None and not known:
                self._sink.closed()
        self.flush()

    def _take_success(self, payload: memoryview) -> None:
        if self._open.is_set():
            raise paramiko.SSHException("an open channel was opened again")
        self.opened_by(*_OPENED.unpack(payload[5:17]))
        with self._lock:
            if self._close_sent:  # nobody waits for it any more
                self._close_sent = False
                self._put_close()
        self.flush()

    def _take_failure(self, payload: memoryview) -> None:
        if self._open.is_set():
            raise paramiko.SSHException("an open channel was refused")
        message = paramiko.Message(bytes(payload[5:]))
        message.get_int()
        text = message.get_text()[:MAX_REASON]
        words = "".join(char if char.isprintable() else "?" for char in text)
        self._refusal = RefusedError(f"the channel was refused: {words or 'no reason given'}")
        self.transport.forget(self.number)
        self._open.set()

    def _take_request(self, payload: memoryview) -> None:
        """Requests are for shells; a forwarded channel has none to grant."""
        message = paramiko.Message(bytes(payload[5:]))
        message.get_text()
        with self._lock:
            self._require_open()
            if message.get_boolean():
                self.put(MSG_CHANNEL_FAILURE)
        self.flush()

    def lost(self) -> None:
        """The connection is gone. From its reader thread or the one that closes it; may be called again."""
        with self._order:
            with self._lock:
                if self._lost:
                    return
                over = self._close_sent or self._close_received
                self._lost = True
                self._open.set()
                self._wake_all()
            if self._sink is not None and not over:
                self._sink.closed()

    def _require_open(self) -> None:
        if not self._open.is_set() or self._close_received:
            raise paramiko.SSHException("a message for a channel that is not open")

    def _wake_reader(self) -> None:
        if self._waiting:
            self._waiting = False
            self._gate.release()

    def _wake_all(self) -> None:
        self._wake_reader()
        self._wake_writers()

    def _wake_writers(self) -> None:
        if self._room is not None:
            self._room.notify_all()

    # -- passing on ------------------------------------------------------------------------------------

    def attach(self, sink: Sink) -> None:
        """Give ``sink`` what came and was not read yet, in this thread, then all that comes. Nobody may be
        in ``recv``, or call it later."""
        with self._order:
            self._hand_over(sink)

    def _hand_over(self, sink: Sink) -> None:
        """Within ``_order``, so that nothing new comes between."""
        self._sink = sink
        while (piece := self._pieces.next()) is not None:
            sink.data(piece)
        self._pieces = _NO_PIECES  # none is kept from now on
        if self.eof_received:
            sink.ended()
        if self._lost or self._close_received:
            sink.closed()
