"""Single keys from the person's terminal, while something is shown on it."""

from __future__ import annotations

import os
import select
import sys
import termios
import time
import tty
from types import TracebackType
from typing import Any

#: What the keys that send sequences are called.
_NAMES = {
    b"\x1b[A": "up",
    b"\x1b[B": "down",
    b"\x1b[C": "right",
    b"\x1b[D": "left",
    b"\x1bOA": "up",
    b"\x1bOB": "down",
    b"\x1bOC": "right",
    b"\x1bOD": "left",
}
#: How many bytes are read at once: a few keys.
_SOME = 32


class Keys:
    """Within a ``with`` block keys arrive at once and are not shown; without a terminal there are none."""

    def __init__(self) -> None:
        self._fd = sys.stdin.fileno() if sys.stdin.isatty() else -1
        self._before: list[Any] = []

    def __enter__(self) -> Keys:
        if self._fd >= 0:
            self._before = termios.tcgetattr(self._fd)
            tty.setcbreak(self._fd)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._fd >= 0:
            termios.tcsetattr(self._fd, termios.TCSAFLUSH, self._before)

    def wait(self, seconds: float | None) -> str:
        """The next key within ``seconds`` (None: however long it takes), or an empty text."""
        if self._fd < 0:
            time.sleep(seconds or 0.0)
            return ""
        if not select.select([self._fd], [], [], seconds)[0]:
            return ""
        data = os.read(self._fd, _SOME)
        return _NAMES.get(data) or data[:1].decode("ascii", "replace") or "q"
