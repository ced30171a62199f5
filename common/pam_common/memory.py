"""The allocator's free memory: what is kept for use, and what is given back to the system."""

from __future__ import annotations

import ctypes

_libc = ctypes.CDLL(None)
_trim = getattr(_libc, "malloc_trim", None)  # glibc's own, like the next
_option = getattr(_libc, "mallopt", None)
#: M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h.
_TRIM, _MMAP = -1, -3
#: Bytes that stay free in each of the allocator's heaps; blocks larger than LARGE have pages of their own.
KEPT = 2 << 20
LARGE = 1 << 20


def keep_some() -> None:
    """Keep what blocks of up to LARGE bytes were in for the next ones. For the beginning of a program.

    glibc gives back what is free beyond 128 KiB, which is about one packet of ours: each would be put into
    new pages, which the kernel has to clear first. That was a tenth of the time that bulk took.
    """
    if _option is not None:
        _option(_MMAP, LARGE)
        _option(_TRIM, KEPT)


def give_back() -> None:
    """Release the pages in which nothing is allocated any more, wherever they are.

    glibc by itself does so at the very end of its heaps only, so what a burst of sessions needed would stay.
    Milliseconds in a large process, and without the interpreter's lock: for now and then.
    """
    if _trim is not None:
        _trim(ctypes.c_size_t(0))
