"""What travels inside a SecureChannel: length-prefixed Noise messages of one frame each. No I/O here.

    2 bytes   length of the message, big-endian, at most 65535
    message   AES-GCM ciphertext of  body ‖ type (1 byte),  and its 16 byte tag

The type stands last, as in TLS 1.3 (RFC 8446, section 5.2), so that the bodies of successive DATA frames
can be decrypted side by side into one buffer without moving them. ``docs/secure-channel.md`` says what
every frame means. Anything that is not exactly as written there is refused with ProtocolError.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from pam_common.errors import AuthenticationError, ProtocolError
from pam_common.noise import MAX_MESSAGE, TAGLEN, CipherState
from pam_common.stream import ROOM, Data

PREFIX = 2
#: The most bytes of data one frame can carry.
MAX_DATA = MAX_MESSAGE - TAGLEN - 1
#: Prefix, type and tag.
OVERHEAD = PREFIX + 1 + TAGLEN
#: Frames per batch: one send, or one return of recv. 256 KiB is where larger ones stopped to gain speed;
#: it is also what an idle channel that was once busy keeps in each direction.
BATCH_FRAMES = 4
BATCH_DATA = BATCH_FRAMES * MAX_DATA
#: Bytes of data that fill an ssh packet of ours (decision 8). Who carries bulk reads so many at a time, or a
#: batch: a rounder number leaves a few bytes over each time, which cost a frame and a packet of their own.
PACKET_DATA = 2 * MAX_DATA
#: A new key after so many messages in one direction, 64 GiB at most: AES-GCM stays far from its limits
#: (RFC 8446, section 5.5), and a key that leaks does not open what was sent long before.
REKEY_INTERVAL = 2**20
#: Buffers begin with this and grow to a batch when there is more: most channels only ever carry keystrokes.
SMALL_BUFFER = 2048
#: Control frames have at most this body: an ERROR's text.
MAX_CONTROL = 1024


class FrameType(IntEnum):
    """The last byte of a message's plaintext. All others are reserved."""

    DATA = 1
    EOF = 2
    ERROR = 3
    PING = 4
    PONG = 5
    ACK = 6


@dataclass(frozen=True)
class Frame:
    """A control frame (everything but DATA) as it was received."""

    type: FrameType
    body: bytes


class MessageReader:
    """Cuts a byte stream into length-prefixed messages, however it was chunked.

    Holds one chunk and at most one incomplete message, so memory is bounded by the caller's chunk size.
    """

    def __init__(self) -> None:
        self._chunk = memoryview(b"")
        self._partial = bytearray()

    def feed(self, chunk: Data) -> None:
        """Add what arrived. Only when ``next`` has returned None."""
        assert not self._chunk
        self._chunk = memoryview(chunk)

    @property
    def drained(self) -> bool:
        """Whether ``next`` would return None."""
        return not self._chunk

    def keep(self) -> None:
        """What was fed is about to be overwritten."""
        self._chunk = memoryview(bytes(self._chunk))

    def next(self) -> memoryview | None:
        """Return the next complete message without its prefix, or None when more must be fed."""
        if self._partial:
            return self._complete_partial()
        chunk = self._chunk
        if len(chunk) >= PREFIX:
            end = PREFIX + (chunk[0] << 8 | chunk[1])
            if end <= len(chunk):
                self._chunk = chunk[end:]
                return chunk[PREFIX:end]
        self._partial += chunk
        self._chunk = chunk[:0]
        return None

    def _complete_partial(self) -> memoryview | None:
        """Finish the message that straddles two chunks; only this one is copied."""
        self._move(PREFIX)
        if len(self._partial) < PREFIX:
            return None
        end = PREFIX + int.from_bytes(self._partial[:PREFIX], "big")
        self._move(end)
        if len(self._partial) < end:
            return None
        message = memoryview(bytes(self._partial))[PREFIX:]
        self._partial.clear()
        return message

    def _move(self, size: int) -> None:
        """Move bytes from the chunk until the partial message has ``size``, or there are no more."""
        missing = max(0, size - len(self._partial))
        self._partial += self._chunk[:missing]
        self._chunk = self._chunk[missing:]


class FrameWriter:
    """Encrypts frames into ``memory`` of its own, from ROOM on and with as much room behind them, so that who
    sends them may wrap them there. What it returns is valid until its next call."""

    def __init__(self, cipher: CipherState) -> None:
        self._cipher = cipher
        self.memory = memoryview(bytearray(SMALL_BUFFER))
        #: Bytes of data so far.
        self.sent = 0

    def data(self, data: memoryview) -> memoryview:
        """Return sealed DATA frames for ``data``, at most BATCH_DATA bytes."""
        frames = -(-len(data) // MAX_DATA)
        out = self._reserve(len(data) + frames * OVERHEAD)
        end = ROOM
        for start in range(0, len(data), MAX_DATA):
            end = self._seal(out, end, _DATA, data[start : start + MAX_DATA])
        self.sent += len(data)
        return out[ROOM:end]

    def control(self, frame_type: FrameType, body: bytes) -> memoryview:
        """Return one sealed frame."""
        out = self._reserve(len(body) + OVERHEAD)
        return out[ROOM : self._seal(out, ROOM, frame_type, memoryview(body))]

    def _seal(self, out: memoryview, at: int, frame_type: int, body: memoryview) -> int:
        start = at + PREFIX
        type_at = start + len(body)
        end = type_at + 1 + TAGLEN
        _LENGTH.pack_into(out, at, end - start)
        out[start:type_at] = body
        out[type_at] = frame_type
        self._cipher.encrypt_into(out[start : type_at + 1], out[start:end])
        if not self._cipher.nonce % REKEY_INTERVAL:
            self._cipher.rekey()
        return end

    def _reserve(self, size: int) -> memoryview:
        if size + 2 * ROOM > len(self.memory):
            # Straight to the full size: who sends 4 KiB at once sends more.
            self.memory = memoryview(bytearray(BATCH_FRAMES * (PREFIX + MAX_MESSAGE) + 2 * ROOM))
        return self.memory


class FrameReader:
    """Decrypts frames: ``take`` data first, then ``fill``, then ``feed``. Gives out verified bytes only."""

    def __init__(self, cipher: CipherState, messages: MessageReader) -> None:
        self._cipher = cipher
        self._messages = messages
        self._plain = bytearray(SMALL_BUFFER)
        self._start = self._end = 0
        #: A message that was cut out but did not fit behind the data waiting to be taken.
        self._next: memoryview | None = None
        #: Bytes of data so far, those waiting to be taken included.
        self.received = 0

    def take(self, size: int) -> bytes:
        """Return 1 to ``size`` bytes of verified data, or none."""
        data = bytes(self.waiting[:size])
        self.skip(len(data))
        return data

    @property
    def waiting(self) -> memoryview:
        """The verified data that was not taken yet; valid until the next ``fill``."""
        return memoryview(self._plain)[self._start : self._end]

    def skip(self, size: int) -> None:
        """Take ``size`` bytes of what is waiting."""
        self._start += size

    @property
    def drained(self) -> bool:
        """Whether ``fill`` would find no more: all that was fed is decrypted, or not complete."""
        return self._next is None and self._messages.drained

    @property
    def has_data(self) -> bool:
        """Whether ``take`` has something to return."""
        return self._start < self._end

    def feed(self, chunk: Data) -> None:
        """Add ciphertext. Only when all data was taken and ``fill`` found nothing."""
        self._messages.feed(chunk)

    def keep(self) -> None:
        """What was fed is about to be overwritten: keep what of it was not looked at yet."""
        self._messages.keep()
        if self._next is not None:
            self._next = memoryview(bytes(self._next))

    def fill(self) -> Frame | None:
        """Decrypt what was fed, up to a batch of data or to a control frame, which is returned.

        Raises ProtocolError at a message that is forged, altered, out of order or malformed; the data
        before it can still be taken, and nothing may be fed after.
        """
        if self._start == self._end:
            self._start = self._end = 0
        while (message := self._next or self._messages.next()) is not None:
            self._next = None
            size = len(message) - TAGLEN
            if size < 1:
                raise ProtocolError("a message too short for a frame")
            if not self._make_room(size):
                self._next = message
                return None
            frame = self._open(message, size)
            if frame is not None:
                return frame
        return None

    def _open(self, message: memoryview, size: int) -> Frame | None:
        start, type_at = self._end, self._end + size - 1
        try:
            self._cipher.decrypt_into(message, memoryview(self._plain)[start : type_at + 1])
        except AuthenticationError:
            raise ProtocolError("the stream was altered, or bytes of it were lost or repeated") from None
        if not self._cipher.nonce % REKEY_INTERVAL:
            self._cipher.rekey()
        frame_type = self._plain[type_at]
        if frame_type == _DATA:
            if start == type_at:
                raise ProtocolError("an empty data frame")
            self._end = type_at
            self.received += type_at - start
            return None
        if frame_type not in _CONTROL:
            raise ProtocolError(f"an unknown frame type {frame_type}")
        if size - 1 > MAX_CONTROL:
            raise ProtocolError("a control frame that is too long")
        return Frame(FrameType(frame_type), bytes(self._plain[start:type_at]))

    def _make_room(self, size: int) -> bool:
        """Whether ``size`` bytes fit behind the data; the buffer grows once, from small to a batch."""
        if self._end + size <= len(self._plain):
            return True
        if len(self._plain) == SMALL_BUFFER:
            grown = bytearray(BATCH_FRAMES * (MAX_DATA + 1))
            grown[: self._end] = memoryview(self._plain)[: self._end]
            self._plain = grown
        return self._end + size <= len(self._plain)


_LENGTH = struct.Struct(">H")
_CONTROL = frozenset(FrameType) - {FrameType.DATA}
#: An enum's member takes longer to find and to compare than the number it is.
_DATA = int(FrameType.DATA)
