"""The allocator's free memory, given back to the system."""

from __future__ import annotations

import ctypes

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own


def give_back() -> None:
    """Release the pages in which nothing is allocated any more, wherever they are.

    glibc by itself does so at the very end of its heaps only, so what a burst of sessions needed would stay.
    Milliseconds in a large process, and without the interpreter's lock: for now and then.
    """
    if _trim is not None:
        _trim(ctypes.c_size_t(0))
