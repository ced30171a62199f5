"""The writing half of :class:`pam_common.fast_ssh.packets.Packets`: a queue, sealing, and who waits.

threads that may block ──▶ lock ─┬▶ queue ─▶ seal ─▶ socket
reader threads ──▶ queue ────────┘  (lock free: they send themselves, without waiting)
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TypeAlias

from paramiko import SSHException

from pam_common.fast_ssh.cipher import TAG, Key
from pam_common.stream import Data

#: Bytes that wait in the queue while the peer does not read, each packet counted with what it costs to
#: keep. What honest peers are answered is a few small packets per channel.
MAX_QUEUE = 4 << 20
PACKET_COST = 256
#: One send takes so much of the queue at once: beyond it, a system call more costs nothing.
BATCH = 128 << 10
#: Counters and a birthday bound in one: OpenSSH rekeys a 128-bit block cipher after 2^32 blocks as well,
#: where the advantage of an attacker against AES-GCM is below 2^-60. Far from paramiko's 512 MiB, since
#: each rekey stops both directions for a round trip.
REKEY_BYTES = 1 << 36
REKEY_PACKETS = 1 << 31
#: Padding is taken from so much randomness at a time: it needs no more than to differ (RFC 4253, 6).
RANDOM = 512
#: How long a key exchange may take, and so how long senders wait for it.
REKEY_TIMEOUT = 60.0


_KEXINIT = 20
_HEADER = struct.Struct(">IB")
#: What is around a packet's payload: its length and that of the padding; 4 to 19 bytes of padding, the tag.
PACKET_HEAD = 5
PACKET_TAIL = 19 + TAG

_NOTHING = memoryview(b"")

#: Two parts of one payload, the first with its type: what is large need not be copied to be sent.
Packet: TypeAlias = tuple[bytes, Data]


class Outgoing:
    """Sends SSH packets on ``sock``, a connected stream socket in blocking mode."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self.rekey_bytes = REKEY_BYTES
        self.rekey_packets = REKEY_PACKETS
        self._closed = False
        #: Why this side ended the connection, if the peer gave it a reason to.
        self.fault = ""
        self._need_rekey = False
        # Writing; under the lock but for the queue's append.
        self._lock = threading.Lock()
        self._key_out: Key | None = None
        self._sealed = 0  # bytes under the keys before this one
        self._queue: deque[Packet | Key] = deque()
        self._held: list[Packet] = []
        self._queue_lock = threading.Lock()
        #: What the queue holds, and may hold.
        self.queued = 0
        self.max_queued = MAX_QUEUE
        #: How often all of it was sent.
        self.emptied = 0
        self._drained: list[Callable[[], None]] = []
        self._low: list[Callable[[int], None]] = []
        self._low_at = 0
        self._unsent = memoryview(b"")
        self._random = b""
        self._flusher = False
        #: Clear from KEXINIT to NEWKEYS: until then only key exchange may be sent (RFC 4253, 7.1).
        self._open = threading.Event()
        self._open.set()
        self._exchanging = 0.0  # when that began, by the monotonic clock; 0 while it is set

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """End both directions at once and wake every thread; the Transport's thread closes the socket."""
        self._closed = True
        self._open.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def write_all(self, data: Data) -> None:
        """Send the identification line, before any packet."""
        with self._lock:
            self._write(memoryview(data))

    def send_payload(self, head: bytes, body: Data = b"") -> None:
        """Send one packet from a thread that may block. Raises EOFError when the connection is gone."""
        self._acquire(head[0])
        try:
            self._write(self._seal(head, body))
        finally:
            self._release()

    def send_in_place(self, memory: memoryview, start: int, end: int) -> None:
        """The same for the payload ``memory[start:end]``, sealed where it lies, PACKET_HEAD bytes before and
        PACKET_TAIL bytes behind it included. Only after the first key exchange."""
        self._acquire(memory[start])
        try:
            self._write(self._seal_in_place(memory, start, end))
        finally:
            self._release()

    def _acquire(self, kind: int) -> None:
        """Wait until a packet may be sent, and nothing comes before it; holds the lock then."""
        gated = _waits_for_keys(kind)
        while True:
            if gated and not self._open.is_set() and not self._open.wait(REKEY_TIMEOUT):
                raise SSHException("the key exchange takes too long")
            self._lock.acquire()
            ready = False
            try:
                if self._queue or self._unsent:
                    self._flush(wait=True)
                ready = not gated or self._open.is_set()
                if ready:
                    return
            finally:
                if not ready:
                    self._release()

    @property
    def at_leisure(self) -> bool:
        """Whether what is queued now will go out at once, as far as one can tell."""
        return not self._unsent and self.queued < BATCH and self._open.is_set()

    def crowded(self, share: int) -> bool:
        """Whether one who has queued ``share`` bytes since it was ``emptied`` last is to queue no more data.

        The last sixteenth is for who has queued little, half of that for the ends of channels and the like.
        """
        left = self.max_queued - self.queued
        if left > self.max_queued // 16:
            return False
        return share > self.max_queued // 4096 or left < self.max_queued // 32

    def send_soon(self, payload: bytes) -> None:
        """Send one packet without ever blocking: what the socket does not take is sent by others.

        Raises SSHException when too much waits already: the peer does not read.
        """
        self.queue(payload)
        self.flush_soon()

    def queue(self, head: bytes, body: Data = b"") -> None:
        """The first half of :meth:`send_soon`; ``body`` must not change any more."""
        with self._queue_lock:
            self.queued += len(head) + len(body) + PACKET_COST
            if self.queued > self.max_queued:
                raise SSHException("the peer sends and does not read")
            if head[0] == _KEXINIT:
                self._begin_exchange()
            self._queue.append((head, body))

    def flush_soon(self) -> None:
        """The second half: send what is queued, as far as it goes without waiting."""
        # When the lock is taken, its owner looks at the queue once more after releasing it.
        while self._queue and self._lock.acquire(blocking=False):
            try:
                sent = self._flush(wait=False, pause=True)
                if not sent:
                    self._start_flusher()
            finally:
                self._lock.release()
            if not sent:
                return
            self._tell_drained()
        self._tell_drained()

    def _start_flusher(self) -> None:
        """Have a thread wait for the socket, which waits for the lock that is held here first."""
        if not self._flusher:
            self._flusher = True
            threading.Thread(target=self._flush_later, name="ssh-flush", daemon=True).start()

    def pass_on(self, packet: memoryview) -> bool:
        """Seal ``packet`` where it lies (see ``packet_of``) and send it, without waiting and without a copy.
        False when others come first and it must be queued. :meth:`flush_soon` comes after, for what others
        queued meanwhile. Raises EOFError when the connection is gone."""
        if self._queue or not self._lock.acquire(blocking=False):
            return False
        try:
            key = self._key_out
            if self._queue or self._unsent or key is None or not self._open.is_set():
                return False
            self._encrypt(key, packet)
            if not self._write(packet, wait=False):
                self._unsent = memoryview(bytes(self._unsent))  # it lies in a buffer that is read into again
                self._start_flusher()
        finally:
            self._lock.release()
        return True

    def when_drained(self, call: Callable[[], None]) -> None:
        """Call it once, from any thread, when all that is queued now was sent. It must not block."""
        with self._queue_lock:
            self._drained.append(call)
        self._tell_drained()

    def when_low(self, size: int, call: Callable[[int], None]) -> None:
        """The same when at most ``size`` bytes are queued (the same number for all who wait), with how many
        waited."""
        with self._queue_lock:
            self._low.append(call)
            self._low_at = size
        self._tell_drained()

    @property
    def awaited(self) -> bool:
        """Whether anybody waits for the queue to be low."""
        return bool(self._low)

    def _tell_drained(self) -> None:
        if not self._drained and not self._low:
            return
        low: list[Callable[[int], None]] = []
        drained: list[Callable[[], None]] = []
        with self._queue_lock:
            # Not whether the queue is empty: what was taken from it to be sealed is counted still.
            if self.queued <= self._low_at:
                low, self._low = self._low, low
            if not self.queued:
                drained, self._drained = self._drained, drained
        for tell in low:
            tell(len(low))
        for call in drained:
            call()

    def _release(self) -> None:
        """Release the lock, then serve what was queued by those who found it taken."""
        self._lock.release()
        self._tell_drained()
        while self._queue and self._lock.acquire(blocking=False):
            try:
                self._flush(wait=True, pause=True)
            finally:
                self._lock.release()
            self._tell_drained()

    def _flush_later(self) -> None:
        """Wait for the socket in the reader's stead; the only thread of its kind per connection."""
        self._lock.acquire()
        try:
            self._flusher = False
            self._flush(wait=True, pause=True)
        except EOFError:
            self.close()
        finally:
            # A queue that cannot be sent any more dies with the connection.
            with contextlib.suppress(EOFError):
                self._release()

    def _flush(self, *, wait: bool, pause: bool = False) -> bool:
        """Send the queue, holding the lock. Returns False when the socket would block; with ``pause`` also
        returns when those who wait for a low queue are to be told."""
        if self._unsent and not self._write(self._unsent, wait=wait):
            return False
        while self._queue and not (pause and self._low and self.queued <= self._low_at):
            batch = self._next_batch()
            if batch and not self._write(batch, wait=wait):
                return False
        return True

    def _next_batch(self) -> memoryview:
        """Seal what is queued, up to a batch; what a key exchange forbids is held back."""
        sealed: list[memoryview] = []
        size = taken = 0
        while self._queue and size < BATCH:
            item = self._queue.popleft()
            if isinstance(item, Key):
                self._use_key(item)
            elif not self._open.is_set() and _waits_for_keys(item[0][0]):
                self._held.append(item)
            else:
                sealed.append(self._seal(*item))
                size += len(sealed[-1])
                taken += len(item[0]) + len(item[1]) + PACKET_COST
        with self._queue_lock:
            self.queued -= taken
            self.emptied += not self.queued
        return sealed[0] if len(sealed) == 1 else memoryview(b"".join(sealed))

    def _use_key(self, key: Key) -> None:
        old, self._key_out = self._key_out, key
        if old is not None:
            self._sealed += old.used_bytes
        self._queue.extendleft(reversed(self._held))
        self._held.clear()
        self._exchanging = 0.0
        self._open.set()

    def _begin_exchange(self) -> None:
        self._open.clear()
        self._exchanging = self._exchanging or time.monotonic()

    def _write(self, data: memoryview, *, wait: bool = True) -> bool:
        """Send ``data``, holding the lock; what does not fit without waiting stays in ``_unsent``."""
        try:
            while data:
                data = data[self._socket.send(data, 0 if wait else socket.MSG_DONTWAIT) :]
        except BlockingIOError:
            if wait:  # SO_SNDTIMEO: not one byte in all that time
                self.fault = self.fault or "the peer takes nothing of what is sent to it"
                self.close()
                raise EOFError from None
            self._unsent = data
            return False
        except OSError:
            raise EOFError from None
        self._unsent = _NOTHING  # not an empty view of somebody's buffer
        return True

    def _seal(self, head: bytes, body: Data = b"") -> memoryview:
        """Make the packet of a payload, holding the lock."""
        if head[0] == _KEXINIT:
            self._begin_exchange()
        key = self._key_out
        block = 16 if key else 8
        payload = len(head) + len(body)
        # At least 4 bytes; the length counts towards the blocks only where it is encrypted (RFC 5647).
        padding = 3 + block - (payload + (4 if key else 8)) % block
        size = 1 + payload + padding
        if key is None:
            return memoryview(b"".join((_HEADER.pack(size, padding), head, body, bytes(padding))))
        packet = memoryview(bytearray(4 + size + TAG))
        at = PACKET_HEAD + len(head)
        packet[PACKET_HEAD:at] = head
        packet[at : PACKET_HEAD + payload] = body
        return self._seal_in_place(packet, PACKET_HEAD, PACKET_HEAD + payload)

    def _seal_in_place(self, memory: memoryview, start: int, end: int) -> memoryview:
        """The packet of the payload ``memory[start:end]``, around it in the same memory."""
        key = self._key_out
        assert key is not None
        padding = 19 - (end - start + 4) % 16
        begin, sealed = start - PACKET_HEAD, end + padding
        _HEADER.pack_into(memory, begin, sealed - begin - 4, padding)
        if len(self._random) < padding:
            self._random = os.urandom(RANDOM)
        memory[end:sealed], self._random = self._random[:padding], self._random[padding:]
        packet = memory[begin : sealed + TAG]
        self._encrypt(key, packet)
        return packet

    def _encrypt(self, key: Key, packet: memoryview) -> None:
        """Encrypt a whole packet but for its length, with room for the tag behind it."""
        key.engine.encrypt_into(key.nonce(), packet[4:-TAG], packet[:4], packet[4:])
        key.count(len(packet))
        if key.beyond(self.rekey_bytes, self.rekey_packets):
            self._need_rekey = True


def _waits_for_keys(kind: int) -> bool:
    """RFC 4253, 7.1: during a key exchange only 1-4, 7-19 and 20-49 may be sent."""
    return kind >= 50 or kind in (5, 6)
