"""Time as a test may count it on a machine that it shares."""

from __future__ import annotations

import threading
import time
from types import TracebackType


class Metronome:
    """Says how much of the time the machine kept from us, so that a bound need not be loosened for its load.

        with Metronome() as beat:
            began = time.monotonic()
            …
            assert time.monotonic() - began - beat.lost() < 1.0

    A thread sleeps for moments and notes by how much longer each took: while it did not run, nothing did that
    is like it. What the product itself waits for is not subtracted.
    """

    BEAT = 0.02

    def __init__(self) -> None:
        self._beat = (0.0, 0.0)  # when the last one was, and what was lost until then
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metronome", daemon=True)

    def lost(self) -> float:
        """Seconds that were lost since the block began."""
        # With a beat that is late now: who asks may run again before the thread does.
        return self._lost_until(time.monotonic()) if self._thread.is_alive() else self._beat[1]

    def __enter__(self) -> Metronome:
        self._beat = (time.monotonic(), 0.0)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(self.BEAT):
            now = time.monotonic()
            self._beat = (now, self._lost_until(now))

    def _lost_until(self, now: float) -> float:
        last, lost = self._beat
        return lost + max(0.0, now - last - 2 * self.BEAT)
