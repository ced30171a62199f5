"""Memory to read into, which costs nothing while nothing is read."""

from __future__ import annotations

import contextlib
import mmap

#: Seconds of silence after which whoever reads gives its buffer's memory back. Long before that costs
#: anything noticeable in new pages, and soon enough for a thousand connections that wait for people.
IDLE = 5.0
#: What stays: small messages come and go in one page.
_KEPT = mmap.PAGESIZE
#: Many buffers lie side by side; a huge page for a few bytes in each of sixteen would be no gain.
_NO_HUGE_PAGES = getattr(mmap, "MADV_NOHUGEPAGE", None)  # Linux only


class ReadBuffer:
    """``size`` bytes of memory of their own, not of the allocator's: pages exist once something was read into
    them, and :meth:`release` gives them back to the system for sure. A thousand idle connections share a
    hundred MiB otherwise, of buffers that were full once.
    """

    def __init__(self, size: int) -> None:
        """Use ``memory`` where a bytearray would be, and ``view`` for slices without a copy."""
        self.memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if _NO_HUGE_PAGES is not None:
            with contextlib.suppress(OSError):  # a kernel without them
                self.memory.madvise(_NO_HUGE_PAGES)
        self.view = memoryview(self.memory)
        self._used = False

    def __len__(self) -> int:
        return len(self.memory)

    @property
    def used(self) -> bool:
        """Whether there is anything to release."""
        return self._used

    def note(self, end: int) -> None:
        """Something was read up to ``end``."""
        if end > _KEPT:
            self._used = True

    def release(self) -> None:
        """Give the memory back but for its first page. What it held beyond is lost."""
        if self._used:
            self.memory.madvise(mmap.MADV_DONTNEED, _KEPT)
            self._used = False
