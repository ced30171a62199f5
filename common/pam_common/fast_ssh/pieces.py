"""What a channel received and nobody has read yet."""

from __future__ import annotations

from collections import deque

#: Pieces that are smaller are put together: what is kept takes little more memory than its bytes.
SMALL = 4 << 10


class Pieces:
    """Bytes in the order they came. Not for two threads at once."""

    __slots__ = ("_pieces",)

    def __init__(self) -> None:
        self._pieces: deque[bytes | memoryview] = deque()

    def __bool__(self) -> bool:
        return bool(self._pieces)

    @property
    def size(self) -> int:
        """Bytes that are kept."""
        return sum(map(len, self._pieces))

    @property
    def count(self) -> int:
        """Pieces that they are kept in."""
        return len(self._pieces)

    def keep(self, data: memoryview) -> None:
        """Keep a copy of ``data``, whose memory is read into again."""
        last = self._pieces[-1] if self._pieces else None
        if isinstance(last, bytes) and len(last) + len(data) <= SMALL:
            self._pieces[-1] = last + data
        else:
            self._pieces.append(bytes(data))

    def take(self, size: int) -> bytes:
        """Up to ``size`` bytes, without a copy where that is one piece; ``b""`` when there are none."""
        pieces, taken, left = self._pieces, [], size
        while pieces and left:
            piece = pieces.popleft()
            if len(piece) > left:
                piece = memoryview(piece)
                pieces.appendleft(piece[left:])
                piece = piece[:left]
            taken.append(piece)
            left -= len(piece)
        return bytes(taken[0]) if len(taken) == 1 else b"".join(taken)

    def next(self) -> memoryview | None:
        """The first piece, whole, or None."""
        return memoryview(self._pieces.popleft()) if self._pieces else None

    def clear(self) -> None:
        self._pieces.clear()
