"""Scan: one pass over a recording file along its chain, without any key.

Reader, verifier and crash recovery share it. Memory stays at one chunk whatever the file's size.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from pam_common.recording.format import (
    CHUNK_OVERHEAD,
    MAGIC,
    MAX_CHUNK,
    MAX_HEADER,
    MAX_TRAILER,
    U32,
    Head,
    Header,
    RecordingError,
    chain_next,
    chain_start,
)


class Chunk(NamedTuple):
    """One encrypted message and the chain head before it, which is its additional data."""

    previous: bytes
    ciphertext: bytes


class Scan:
    """Reads the header at once (RecordingError if it is none), then the chunks as they are asked for.

    ``count``, ``length`` and ``hash`` are the chain's state after the last whole chunk. When the chunks
    are through, ``trailer`` is the final head, or ``problem`` says why there is none or why it does not
    fit the chain; its signature is not checked here.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        if file.read(len(MAGIC)) != MAGIC:
            raise RecordingError("not a recording: it does not begin with the magic bytes")
        size = file.read(4)
        length = U32.unpack(size)[0] if len(size) == 4 else 0
        if not 1 <= length <= MAX_HEADER:
            raise RecordingError("the header's length is missing or impossible")
        body = file.read(length)
        if len(body) != length:
            raise RecordingError("the file ends inside its header")
        self.header = Header.parse(body)
        opening = MAGIC + size + body
        self.count = 0
        self.length = len(opening)
        self.hash = chain_start(opening)
        self.trailer: Head | None = None
        self.problem = ""

    def chunks(self) -> Iterator[Chunk]:
        """The chunks in order, each when the state above already covers it."""
        while True:
            size = self._file.read(4)
            if len(size) < 4:
                self.problem = (
                    "the file ends inside a chunk's length"
                    if size
                    else "the recording has no signed end: it was cut, or is still being written"
                )
                return
            length = U32.unpack(size)[0]
            if length == 0:
                self._end()
                return
            if not CHUNK_OVERHEAD <= length <= MAX_CHUNK:
                self.problem = f"chunk {self.count + 1} has an impossible length"
                return
            ciphertext = self._file.read(length)
            if len(ciphertext) != length:
                self.problem = f"the file ends inside chunk {self.count + 1}"
                return
            chunk = Chunk(self.hash, ciphertext)
            self.hash = chain_next(self.hash, size, ciphertext)
            self.count += 1
            self.length += 4 + length
            yield chunk

    def _end(self) -> None:
        size = self._file.read(4)
        length = U32.unpack(size)[0] if len(size) == 4 else 0
        if not 1 <= length <= MAX_TRAILER:
            self.problem = "the trailer's length is missing or impossible"
            return
        body = self._file.read(length)
        if len(body) != length:
            self.problem = "the file ends inside its trailer"
            return
        try:
            trailer = Head.parse_trailer(self.header, body)
        except RecordingError as error:
            self.problem = str(error)
            return
        if self._file.read(1):
            self.problem = "there are bytes after the trailer"
        elif (trailer.count, trailer.length, trailer.hash) != (self.count, self.length, self.hash):
            self.problem = "the trailer does not fit the chain: chunks were altered, removed, added or moved"
        else:
            self.trailer = trailer


def final_head(file: BinaryIO) -> Head:
    """The trailer of a finished part, found from the file's end without walking the chain.

    For who trusts the file (the agent that wrote it). Raises RecordingError when there is none.
    """
    header = Scan(file).header
    start = max(0, file.seek(0, io.SEEK_END) - MAX_TRAILER - 8)
    file.seek(start)
    tail = file.read(MAX_TRAILER + 8)
    # The JSON holds no zero byte, so its length field is found right behind the last four zeros or, as
    # a length below 2^24 begins with zeros itself, at most three bytes before them.
    at = tail.rfind(U32.pack(0))
    for begin in range(at, max(at - 4, -1), -1):
        size = tail[begin + 4 : begin + 8]
        body = tail[begin + 8 :]
        if tail[begin : begin + 4] == U32.pack(0) and size == U32.pack(len(body)):
            head = Head.parse_trailer(header, body)
            if head.length == start + begin:
                return head
    raise RecordingError("the recording has no signed end: it was cut, or is still being written")
