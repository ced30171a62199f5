"""SSH packets over one socket: plain until the first key exchange ends, then AES-GCM (RFC 4253, 5647).

Takes the place of paramiko's ``Packetizer`` (its public ``packetizer_class=`` argument) because that one

- believes any packet length and any line length before authentication, and so can be filled at will;
- blocks its reader thread in ``send``: two peers whose readers both wait to answer while both sockets are
  full wait forever, and a rekey under load ends the same way;
- polls every 0.1 s and copies each byte several times.

Two kinds of threads send. Any thread may block in ``send``: a slow peer slows it. The *reader* thread never
does: what it has to say is queued, and whoever may block sends it. That is the one rule that keeps a
connection from waiting for itself.
How that is done is in :mod:`pam_common.fast_ssh.outgoing`; reading is here.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

from cryptography.exceptions import InvalidTag
from paramiko import Message, SSHException
from paramiko.packet import NeedRekeyException

from pam_common.buffer import IDLE, ReadBuffer
from pam_common.fast_ssh import outgoing
from pam_common.fast_ssh.cipher import TAG, Key
from pam_common.fast_ssh.lending import Lending
from pam_common.fast_ssh.outgoing import Outgoing

#: RFC 4253, 6.1: what every implementation takes; enough for anything before there are keys.
MAX_PLAIN = 35000
#: Later on: what a channel's packets may hold, and their headers.
MAX_PACKET = 132000
#: RFC 4253, 4.2: the identification line, CR and LF included.
MAX_LINE = 255
#: Two large packets, so that none of them has to be moved: a recv per batch. An idle connection keeps a page.
READ_BUFFER = 264 << 10
#: A first key exchange has about five packets; a peer that sends more of them is playing for time.
MAX_PLAIN_PACKETS = 64
#: Seconds between looks at the clock while nothing arrives, during the handshake (see set_tick).
TICK = 1.0
#: Seconds in which a peer must take at least a byte of what is sent to it (SO_SNDTIMEO). Readers of ours
#: never wait for anything but the socket, so such a peer is dead, or wants to see how much we keep for it.
STALL = 60.0
#: Key exchanges in a row that nothing has called for. Each is earned by so many bytes or so many seconds: far
#: more often than anybody's settings ask for, far too rarely to keep us busy.
MAX_EXCHANGES = 10
EXCHANGE_TRAFFIC = 256 << 10
EXCHANGE_TIME = 10.0
_LENGTH = struct.Struct(">I")


def set_tick(sock: socket.socket, seconds: float) -> None:
    """Wake who reads ``sock`` every ``seconds``, in the kernel, instead of ten times a second in Python."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", int(seconds), 0))


class Packets(Outgoing):
    """Reads and writes SSH packets on ``sock``, a connected stream socket in blocking mode."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        #: Set by paramiko when the first key exchange has ended.
        self._initial_kex_done = False
        self._rekeyed = 0
        self._exchanges = self._exchanged = 0.0  # those not earned yet, and when the last one was
        self._counted = 0  # bytes sent that have earned theirs
        self._handshake_deadline: float | None = None
        # Reading; only the reader thread touches these.
        self._reader: int | None = None
        self._memory = ReadBuffer(READ_BUFFER)
        self._buffer, self._view = self._memory.memory, self._memory.view
        self._start = self._end = 0
        self._packet = memoryview(b"")
        self._key_in: Key | None = None
        #: Takes a packet's type and payload, in the reader thread, or leaves it to paramiko.
        self.divert: Callable[[int, memoryview], bool] = lambda _kind, _payload: False
        self._corked: set[Packets] = set()
        self._lending: Lending | None = None
        self._tick_seconds = TICK
        self._sequence_in = 0
        # Liveness, by the reader's clock.
        self._heard = time.monotonic()
        self._probed = 0.0
        self._interval = self._deadline = 0.0
        self._probe: Callable[[], object] = lambda: None

    # -- what paramiko's Transport calls, in its names ------------------------------------------------

    def set_log(self, log: object) -> None:
        """Packets are not logged."""

    def set_hexdump(self, hexdump: bool) -> None:
        """Packets are never dumped: they hold other people's sessions."""

    def get_hexdump(self) -> bool:
        return False

    def start_handshake(self, timeout: float) -> None:
        self._handshake_deadline = time.monotonic() + timeout

    def complete_handshake(self) -> None:
        self._handshake_deadline = None

    def need_rekey(self) -> bool:
        return self._need_rekey

    def reset_seqno_in(self) -> None:
        self._sequence_in = 0

    def reset_seqno_out(self) -> None:
        """Nothing of what is sent depends on the outgoing number: GCM counts by itself."""

    def set_keepalive(self, interval: float, callback: Callable[[], object]) -> None:
        self.watch(interval, interval, callback)

    def set_inbound_cipher(
        self, block_engine: Any, *, aead: bool, iv_in: bytes | None, **_other: Any
    ) -> None:
        self._count_exchange(self._key_in)
        self._key_in = Key.of(block_engine, aead, iv_in)
        self._note_new_key(1)

    def set_outbound_cipher(
        self, block_engine: Any, *, aead: bool, iv_out: bytes | None, **_other: Any
    ) -> None:
        # In the queue, behind the NEWKEYS that is still to go out under the old key.
        self._queue.append(Key.of(block_engine, aead, iv_out))
        self.flush_soon()
        self._note_new_key(2)

    def set_inbound_compressor(self, compressor: object) -> None:
        raise SSHException("compression is not used")

    def set_outbound_compressor(self, compressor: object) -> None:
        raise SSHException("compression is not used")

    def _count_exchange(self, old: Key | None) -> None:
        """A key exchange costs milliseconds: so many in a row must be earned, by traffic or by time."""
        now = time.monotonic()
        # The outgoing key may have been replaced already, or not yet.
        sent = self._sealed + (self._key_out.used_bytes if self._key_out is not None else 0)
        if old is not None:
            traffic = old.used_bytes + sent - self._counted
            earned = traffic / EXCHANGE_TRAFFIC + (now - self._exchanged) / EXCHANGE_TIME
            self._exchanges = max(0.0, self._exchanges - earned) + 1
            if self._exchanges > MAX_EXCHANGES:
                raise SSHException("the peer exchanges keys all the time")
        self._exchanged, self._counted = now, sent

    def _note_new_key(self, direction: int) -> None:
        self._rekeyed |= direction
        if self._rekeyed == 3:
            self._rekeyed = 0
            self._need_rekey = False

    @property
    def heard(self) -> float:
        """When the last bytes came, by the monotonic clock."""
        return self._heard

    # -- liveness --------------------------------------------------------------------------------------

    def watch(self, interval: float, deadline: float, probe: Callable[[], object]) -> None:
        """Call ``probe`` (in the reader thread; must not block) after ``interval`` silent seconds, and
        give the connection up when ``deadline`` more seconds stay silent."""
        self._heard = time.monotonic()
        self._interval, self._deadline, self._probe = interval, deadline, probe
        # From here on waking up is for this, and for idle buffers.
        self._tick_seconds = min(IDLE, max(TICK, interval / 3))
        with contextlib.suppress(OSError):  # closed just now, which its reader will tell
            set_tick(self._socket, self._tick_seconds)

    def _tick(self) -> None:
        """The socket was silent for a moment: is it time for anything?"""
        now = time.monotonic()
        self._check_handshake(now)
        if not self._interval:
            return
        silent = now - self._heard
        if silent > self._interval + self._deadline:
            raise SSHException("the peer no longer answers")
        if silent > self._interval and now - self._probed > self._interval:
            self._probed = now
            self._probe()

    def _check_handshake(self, now: float) -> None:
        if self._closed:
            raise EOFError
        if self._handshake_deadline is not None and now > self._handshake_deadline:
            raise SSHException("the handshake took too long")
        if self._exchanging and now - self._exchanging > outgoing.REKEY_TIMEOUT:
            raise SSHException("the key exchange takes too long")

    # -- reading ---------------------------------------------------------------------------------------

    def readline(self, timeout: float) -> str:
        """Read one line of the identification exchange, without its CR and LF."""
        self._reader = threading.get_ident()
        deadline = time.monotonic() + timeout
        while (at := self._buffer.find(b"\n", self._start, min(self._end, self._start + MAX_LINE))) < 0:
            if self._end - self._start >= MAX_LINE:
                raise SSHException("the identification line is too long")
            if time.monotonic() > deadline:
                raise SSHException("the identification took too long")
            self._receive()
        line = bytes(self._view[self._start : at])
        self._start = at + 1
        return line.removesuffix(b"\r").decode("utf-8", "replace")

    def read_message(self) -> tuple[int, Message]:
        """Return the next packet that is not diverted: its type and content. Only for the reader thread.

        Raises SSHException for a packet no peer of ours may send, EOFError at the end, and paramiko's
        NeedRekeyException when keys are due.
        """
        self._reader = threading.get_ident()
        while True:
            payload = self._next_payload()
            kind = payload[0]
            if not self.divert(kind, payload):
                message = Message(bytes(payload[1:]))
                message.seqno = (self._sequence_in - 1) & 0xFFFF_FFFF
                return kind, message
            if self._need_rekey:
                raise NeedRekeyException  # paramiko's loop looks after it, and comes back

    def _next_payload(self) -> memoryview:
        """The next packet, opened where it lies: what is returned is overwritten by what comes next."""
        key = self._key_in
        if self._end - self._start < 4:
            self._need(4, between=True)
        size = _LENGTH.unpack_from(self._buffer, self._start)[0]
        # Before the first byte is waited for: this number comes from anybody.
        most = MAX_PACKET if key else MAX_PLAIN
        if not 6 <= size <= most or (size if key else size + 4) % (16 if key else 8):
            raise SSHException(f"impossible packet length {size}")
        whole = 4 + size + (TAG if key else 0)
        if self._end - self._start < whole:
            self._need(whole)
        packet = self._view[self._start : self._start + whole]
        self._start += whole
        if key:
            self._open_in_place(key, packet)
        padding = packet[4]
        if padding < 4 or padding > size - 2:
            raise SSHException(f"impossible padding {padding}")
        self._count_in(key, whole)
        self._packet = packet
        return packet[5 : 4 + size - padding]

    @staticmethod
    def _open_in_place(key: Key, packet: memoryview) -> None:
        try:
            key.engine.decrypt_into(key.nonce(), packet[4:], packet[:4], packet[4:-TAG])
        except InvalidTag:
            raise SSHException("a packet was forged or damaged") from None

    def packet_of(self, data: memoryview) -> memoryview | None:
        """The packet that is being diverted, if ``data`` is a part of it: a whole packet of SSH, but that it
        is not encrypted and has no tag yet. For :meth:`pass_on` of another connection."""
        return self._packet if data.obj is self._buffer else None

    @property
    def drained(self) -> bool:
        """Whether next to nothing was received that was not looked at yet."""
        return self._end - self._start < 4

    def _count_in(self, key: Key | None, whole: int) -> None:
        self._sequence_in = (self._sequence_in + 1) & 0xFFFF_FFFF
        if key is None:
            if self._sequence_in > MAX_PLAIN_PACKETS:
                raise SSHException("too many packets before the key exchange")
            return
        key.count(whole)
        if key.beyond(self.rekey_bytes, self.rekey_packets):
            self._need_rekey = True
            if key.beyond(2 * self.rekey_bytes, 2 * self.rekey_packets):
                raise SSHException("the peer does not exchange keys when asked")

    def _need(self, size: int, *, between: bool = False) -> None:
        """Wait until ``size`` bytes are in the buffer; ``between`` packets, new keys may interrupt."""
        if self._start + size > READ_BUFFER:
            rest = self._end - self._start
            self._buffer.move(0, self._start, rest)
            self._start, self._end = 0, rest
        while self._end - self._start < size:
            silent = not self._receive()
            if silent and between and self._need_rekey and self._start == self._end:
                raise NeedRekeyException

    def _receive(self) -> bool:
        """Read what is there, or return False when nothing came for TICK seconds."""
        if self._corked and self._lending is None:  # which does it itself, before each wait
            self._uncork()
        if self._start == self._end:
            self._start = self._end = 0
        try:
            if self._lending is not None and not self._lending.wait(self._tick_seconds):
                return self._silent()
            count = self._socket.recv_into(self._view[self._end :])
        except (BlockingIOError, TimeoutError):
            return self._silent()
        except OSError:
            if self._closed:
                raise EOFError from None
            raise
        if not count:
            raise EOFError
        self._end += count
        self._memory.note(self._end)
        self._heard = time.monotonic()
        self._check_handshake(self._heard)
        return True

    def _silent(self) -> bool:
        if self._start == self._end:
            self._memory.release()
        self._tick()
        return False

    # -- the reader thread as a servant of others --------------------------------------------------------

    def begin_lending(self) -> None:
        """Have :meth:`lend` work; before the reader thread is started."""
        self._lending = Lending(self._socket, self._uncork)

    def lend(self, fd: int, ready: Callable[[], bool]) -> bool:
        """See :meth:`Lending.lend`; False where there is none."""
        return self._lending is not None and self._lending.lend(fd, ready)

    def end_lending(self) -> None:
        """The reader thread is at its end."""
        if self._lending is not None:
            self._lending.close()

    def send_message(self, message: Message) -> None:
        """Send one packet. Blocks while the peer is slow or keys are exchanged, but for the reader."""
        payload = message.asbytes()
        if threading.get_ident() == self._reader:
            self.send_soon(payload)
        else:
            self.send_payload(payload)

    def flush_before_wait(self, other: Packets) -> None:
        """Have ``other`` flushed before our reader waits for its peer again, so that what came together goes
        on together; at once, in any other thread."""
        self._corked.add(other)
        if threading.get_ident() != self._reader:
            self._uncork()

    def _uncork(self) -> None:
        while self._corked:
            # One that is gone: its own reader knows.
            with contextlib.suppress(EOFError, KeyError):
                self._corked.pop().flush_soon()
