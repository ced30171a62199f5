"""What the fuzz targets share: taking an input apart, cutting streams anywhere, streams without sockets."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator

from pam_common.keys import SigningKey, VerifyKeys

#: Fixed, so that an input that once failed stays the same input.
NOW = 1_900_000_000
SESSION = "s-" + "a" * 26
PLATFORM = SigningKey(b"\1" * 32)
AGENT = SigningKey(b"\2" * 32)
TRUSTED = VerifyKeys.of(PLATFORM.public)


class Input:
    """Takes fields off the front of a fuzzer's input; what is not there reads as zeros."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def take(self, size: int) -> bytes:
        """Return at most ``size`` bytes."""
        start, self._at = self._at, self._at + size
        return self._data[start : self._at]

    def byte(self) -> int:
        return int.from_bytes(self.take(1), "big")

    def short(self) -> int:
        return int.from_bytes(self.take(2), "big")

    def sized(self) -> bytes:
        """Return the bytes that two bytes of length announce."""
        return self.take(self.short())

    def rest(self) -> bytes:
        return self.take(len(self._data))


def sized(*parts: bytes) -> bytes:
    """What ``Input.sized`` takes apart again."""
    return b"".join(len(part).to_bytes(2, "big") + part for part in parts)


def pieces(data: bytes, salt: int = 0) -> Iterator[bytes]:
    """Cut ``data`` at places that are arbitrary, and always the same for the same data."""
    order = random.Random(zlib.crc32(data, salt))
    at = 0
    while at < len(data):
        size = order.choice((1, 2, 3, 5, 17, 100, 5000))
        yield data[at : at + size]
        at += size


class ScriptedStream:
    """A Stream that gives what it was told to and keeps what is sent; ``answer`` may reply to each send."""

    def __init__(
        self, chunks: Iterator[bytes] | list[bytes], answer: Callable[[bytes], bytes] | None = None
    ) -> None:
        self._chunks = iter(chunks)
        self._rest = b""
        self._answer = answer
        self.sent = bytearray()

    def recv(self, size: int) -> bytes:
        data = self._rest or next(self._chunks, b"")
        self._rest = data[size:]
        return data[:size]

    def recv_into(self, view: memoryview) -> int:
        data = self.recv(len(view))
        view[: len(data)] = data
        return len(data)

    def sendall(self, data: bytes | bytearray | memoryview) -> None:
        self.sent += data
        if self._answer is not None:
            self._rest += self._answer(bytes(data))

    def shutdown(self, how: int) -> None:
        pass

    def close(self) -> None:
        pass

    def abort(self) -> None:
        pass
