"""PartWriter: events to the bytes of a recording file. No I/O: the caller writes what it returns.

Whoever uses it must write every piece it returns, in order and whole, or stop: compressor and cipher
have moved on, so a piece that was lost cannot be made again.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from nacl import bindings as sodium
from nacl.exceptions import CryptoError
from nacl.exceptions import RuntimeError as SodiumError

from pam_common.recording.format import (
    ABRUPT_ENDS,
    MAX_EVENT,
    MAX_PLAIN,
    MAX_RECIPIENTS,
    U32,
    Head,
    Header,
    Recipient,
    RecordingError,
    chain_next,
    chain_start,
    check_end,
)

# Measured: 32 KiB per session instead of 256 with the defaults, for 2.5 µs per small event either way
# and 0.6 instead of 0.45 ms per 64 KiB of rows. Level 1: higher ones gain 1 % on such short windows.
_LEVEL, _WINDOW_BITS, _MEMORY_LEVEL = 1, 12, 5

# There are some twenty kinds; only a fault makes more.
_is_kind = lru_cache(maxsize=64)(re.compile(r"[a-z][a-z0-9_]{0,31}").fullmatch)


def _make_encode() -> Callable[[object], str]:
    """The JSON encoder: ASCII only, so that a terminal that shows raw NDJSON gets no control character to act
    on (C1 included).

    ``JSONEncoder.encode`` makes the C encoder, which does all the work, anew for each call. Making it once
    halves the time of a small event that comes after a pause, when nothing is in the processor's caches.
    """
    plain = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    make = getattr(json.encoder, "c_make_encoder", None)  # CPython's; what it takes is held by a test
    if make is None:
        return plain.encode
    c_encode = make(
        None, plain.default, json.encoder.encode_basestring_ascii, None, ":", ",", False, False, False
    )

    def encode(value: object) -> str:
        return "".join(c_encode(value, 0))

    return encode


_encode = _make_encode()


def encode_event(seconds: float, number: int, event: Mapping[str, Any]) -> bytes:
    """One NDJSON line. Raises RecordingError for what the format cannot hold."""
    kind = event.get("kind")
    if not isinstance(kind, str) or not _is_kind(kind) or "t" in event or "c" in event:
        raise RecordingError("an event has a kind, and neither t nor c of its own")
    try:
        line = _encode({"t": round(seconds, 6), "c": number, **event}).encode("ascii") + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        # The error's text may quote the content; its type is enough.
        raise RecordingError(f'an event of kind "{kind}" is not JSON ({type(error).__name__})') from None
    if len(line) > MAX_EVENT:
        raise RecordingError(
            f'an event of kind "{kind}" has {len(line)} bytes, more than {MAX_EVENT}',
            hint="it must be split over several events, or counted and hashed.",
        )
    return line


class PartWriter:
    """Compresses, encrypts, frames and chains the events of one part. For one thread at a time.

    ``opening`` is what the file begins with. ``count``, ``length`` and ``hash`` are the chain's state
    after everything returned so far was written.
    """

    def __init__(
        self,
        *,
        session: str,
        part: int,
        agent: str,
        identity_kid: str,
        created: int,
        recipients: Sequence[Recipient],
        statement: str,
    ) -> None:
        if not 1 <= len(recipients) <= MAX_RECIPIENTS:
            raise RecordingError(f"a recording has 1 to {MAX_RECIPIENTS} recipients, not {len(recipients)}")
        self._state = sodium.crypto_secretstream_xchacha20poly1305_state()
        key = sodium.crypto_secretstream_xchacha20poly1305_keygen()
        self.header = Header(
            session=session,
            part=part,
            agent=agent,
            identity_kid=identity_kid,
            created=created,
            recipients={recipient.kid: _sealed(key, recipient) for recipient in recipients},
            statement=statement,
            stream=sodium.crypto_secretstream_xchacha20poly1305_init_push(self._state, key),
        )
        self._zlib = _ZlibStream()
        self._finished = False
        self.opening = self.header.to_bytes()
        self.count = 0
        self.length = len(self.opening)
        self.hash = chain_start(self.opening)

    def __repr__(self) -> str:
        return f"<PartWriter {self.header.session}.{self.header.part} chunks={self.count}>"

    @property
    def state(self) -> tuple[int, int, bytes]:
        """``count``, ``length`` and ``hash``."""
        return self.count, self.length, self.hash

    def append(self, seconds: float, number: int, events: Iterable[Mapping[str, Any]]) -> bytes:
        """The framed chunks of one batch: ``seconds`` since ``created``, connection ``number``.

        Raises RecordingError before anything of the batch is taken when one event cannot be held.
        """
        if self._finished:
            raise RecordingError("the part is finished")
        lines = b"".join([encode_event(seconds, number, event) for event in events])
        plain = self._zlib.batch(lines)
        return self._frame(plain, sodium.crypto_secretstream_xchacha20poly1305_TAG_MESSAGE)

    def finish(self) -> bytes:
        """The FINAL chunk; nothing can be appended after it."""
        if self._finished:
            raise RecordingError("the part is finished")
        self._finished = True
        plain = self._zlib.end()
        return self._frame(plain, sodium.crypto_secretstream_xchacha20poly1305_TAG_FINAL)

    @property
    def busy(self) -> bool:
        """Whether the compressor exists."""
        return self._zlib.running

    def rest(self) -> None:
        """Nothing is appended for now: free the compressor's memory, 38 KiB."""
        self._zlib.rest()

    def head(self, time: int, end: str | None = None) -> Head:
        """The chain head as it is now, not yet signed; with ``end`` the final one."""
        if end is not None and (end in ABRUPT_ENDS) == self._finished:
            raise RecordingError(f'"{check_end(end)}" does not fit how the part ended')
        return Head(self.header.session, self.header.part, *self.state, time, end)

    def _frame(self, plain: bytes, last_tag: int) -> bytes:
        if len(plain) <= MAX_PLAIN:
            return self._chunk(plain, last_tag)
        pieces = [plain[at : at + MAX_PLAIN] for at in range(0, len(plain), MAX_PLAIN)]
        message = sodium.crypto_secretstream_xchacha20poly1305_TAG_MESSAGE
        return b"".join([*(self._chunk(p, message) for p in pieces[:-1]), self._chunk(pieces[-1], last_tag)])

    def _chunk(self, plain: bytes, tag: int) -> bytes:
        ciphertext = sodium.crypto_secretstream_xchacha20poly1305_push(self._state, plain, self.hash, tag)
        size = U32.pack(len(ciphertext))
        self.hash = chain_next(self.hash, size, ciphertext)
        self.count += 1
        self.length += len(size) + len(ciphertext)
        return size + ciphertext


class _ZlibStream:
    """One zlib stream (RFC 1950) whose compressor need not exist while nothing is compressed.

    After a sync flush the deflate blocks end at a byte, so a new compressor can go on from there: it only
    does not know what came before, and so cannot refer to it.
    """

    def __init__(self) -> None:
        self._deflate: zlib._Compress | None = None
        self._sum = zlib.adler32(b"")
        self._head = _zlib_header()

    def batch(self, data: bytes) -> bytes:
        """``data`` compressed, all of it."""
        self._sum = zlib.adler32(data, self._sum)
        deflate = self._running()
        return self._begin() + deflate.compress(data) + deflate.flush(zlib.Z_SYNC_FLUSH)

    def end(self) -> bytes:
        """The end of the stream; nothing can follow."""
        last = self._running().flush(zlib.Z_FINISH)
        self._deflate = None
        return self._begin() + last + U32.pack(self._sum)

    @property
    def running(self) -> bool:
        return self._deflate is not None

    def rest(self) -> None:
        self._deflate = None

    def _running(self) -> zlib._Compress:
        if self._deflate is None:
            self._deflate = zlib.compressobj(_LEVEL, zlib.DEFLATED, -_WINDOW_BITS, _MEMORY_LEVEL)
        return self._deflate

    def _begin(self) -> bytes:
        head, self._head = self._head, b""
        return head


def _zlib_header() -> bytes:
    """RFC 1950, 2.2: deflate with our window, fastest level, no dictionary; a multiple of 31."""
    method = (_WINDOW_BITS - 8) << 12 | zlib.DEFLATED << 8
    return (method + 31 - method % 31).to_bytes(2, "big")


def _sealed(key: bytes, recipient: Recipient) -> bytes:
    try:
        return bytes(sodium.crypto_box_seal(key, recipient.key))
    except (CryptoError, SodiumError):
        # A point of low order: whoever sees the file could open it.
        raise RecordingError(f"the key of recipient {recipient.kid} is not usable") from None
