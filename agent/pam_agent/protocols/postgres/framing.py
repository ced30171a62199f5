"""Walks the messages of one direction inside the buffers that carry them.

The pump forwards whole buffers; the Framer only says what is in them. Rows and copy data, which make up
the bytes of a bulk transfer, are counted in one tight loop and handed on as *runs* (slices of the
buffer); every other message is handed on as its body, cut at what its kind's :class:`~.codec.Limit`
captures. A message that spans buffers is followed piece by piece, so memory stays flat for one of 1 GB.
Nothing is held back except a header that is not complete yet: the two sides therefore always see a
message boundary wherever the Framer does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Protocol

from pam_agent.protocols.postgres.codec import HEADER, HEADER_SIZE, Limit, describe_kind
from pam_common.errors import PamError
from pam_common.stream import Data

DATA_ROW = ord("D")
COPY_DATA = ord("d")


#: Fits no message: for kinds that are not known.
_NONE = Limit(1, 0, 0)


class Sink(Protocol):
    """What is told of the messages, in their order."""

    def control(self, kind: int, body: bytes, length: int, digest: str | None) -> None:
        """A message that is not bulk. ``body`` is its captured part, ``length`` that of the whole body;
        ``digest`` is the SHA-256 of the whole body if it was cut."""

    def run(self, kind: int, view: memoryview, count: int) -> None:
        """``count`` whole bulk messages, headers included. ``view`` is valid during the call only."""

    def piece(self, kind: int, view: memoryview, first: bool, last: bool) -> None:
        """Part of a bulk message that spans buffers; the first piece starts with its header."""


class Framer:
    """Follows one direction. ``bulk`` names the kinds given as runs; all others are control messages."""

    def __init__(
        self, kinds: Mapping[int, Limit], bulk: frozenset[int], sink: Sink, error: type[PamError]
    ) -> None:
        self._kinds = kinds
        self._bulk = bulk
        self._sink = sink
        self._error = error
        self._left = 0  # bytes still to come of the message that the last buffer began
        self._kind = 0
        self._length = 0
        self._body = bytearray()
        self._digest: hashlib._Hash | None = None
        self._common = COPY_DATA

    @property
    def at_boundary(self) -> bool:
        """Whether all that was fed and forwarded are whole messages."""
        return not self._left

    def feed(self, buffer: Data, end: int) -> int:
        """Look at ``buffer[:end]``; return how much of it may be forwarded.

        The rest, below five bytes, is an incomplete header: put it in front of the next buffer.
        Raises the direction's protocol error; nothing of the buffer may be forwarded then.
        """
        with memoryview(buffer) as view:
            return self._walk(buffer, view, end)

    def _walk(self, buffer: Data, view: memoryview, end: int) -> int:
        position = self._resume(view, end) if self._left else 0
        limit = end - HEADER_SIZE
        header = HEADER.unpack_from
        kinds = self._kinds.get
        common = self._common
        start = position
        count = 0
        # The hot loop: 0.13 µs a row, a fifth of what the server and psql need for one. No calls in it.
        while position <= limit:
            kind, length = header(buffer, position)
            after = position + 1 + length
            if kind == common and length >= 4 and after <= end:
                count += 1
                position = after
                continue
            if count:
                self._sink.run(common, view[start:position], count)
                count = 0
            if kind in self._bulk and length >= 4 and after <= end:
                common = self._common = kind
                start = position
                continue
            least, most, capture = kinds(kind, _NONE)
            if least <= length <= most and after <= end and capture and length - 4 <= capture:
                self._sink.control(kind, bytes(view[position + HEADER_SIZE : after]), length - 4, None)
                position = start = after
                continue
            position = start = self._single(view, kind, length, position, end)
        if count:
            self._sink.run(common, view[start:position], count)
        return position

    def _single(self, view: memoryview, kind: int, length: int, position: int, end: int) -> int:
        """Take the message at ``position`` that is no whole bulk message; return where the next starts."""
        limit = self._kinds.get(kind)
        if limit is None:
            raise self._error(f"unexpected message {describe_kind(kind)} after login")
        if not limit.least <= length <= limit.most:
            raise self._error(f"message {describe_kind(kind)} has an impossible length: {length}")
        after = position + 1 + length
        body = position + HEADER_SIZE
        if after > end:
            self._begin(view, kind, length, position, end)
            return end
        size = length - 4
        if size <= limit.capture or not limit.capture:
            content = bytes(view[body:after]) if limit.capture else b""
            self._sink.control(kind, content, size, None)
        else:
            digest = hashlib.sha256(view[body:after]).hexdigest()
            self._sink.control(kind, bytes(view[body : body + limit.capture]), size, digest)
        return after

    def _begin(self, view: memoryview, kind: int, length: int, position: int, end: int) -> None:
        if kind in self._bulk:
            # What the sink refuses does not begin: nothing of this buffer goes on.
            self._sink.piece(kind, view[position:end], first=True, last=False)
        self._kind = kind
        self._length = length - 4
        self._left = position + 1 + length - end
        if kind in self._bulk:
            return
        self._body.clear()
        capture = self._kinds[kind].capture
        self._digest = hashlib.sha256() if 0 < capture < self._length else None
        self._gather(view[position + HEADER_SIZE : end])

    def _gather(self, piece: memoryview) -> None:
        room = self._kinds[self._kind].capture - len(self._body)
        if room > 0:
            self._body += piece[:room]
        if self._digest is not None:
            self._digest.update(piece)

    def _resume(self, view: memoryview, end: int) -> int:
        """Take what the buffer holds of the message that the last one began; return where it stops."""
        size = min(self._left, end)
        self._left -= size
        done = not self._left
        if self._kind in self._bulk:
            self._sink.piece(self._kind, view[:size], first=False, last=done)
            return size
        self._gather(view[:size])
        if done:
            digest = self._digest.hexdigest() if self._digest is not None else None
            self._sink.control(self._kind, bytes(self._body), self._length, digest)
            self._body = bytearray()
        return size
