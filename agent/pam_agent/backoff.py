"""Waiting longer after each failure, with jitter so that many agents do not come back at once."""

from __future__ import annotations

import random


def scatter(seconds: float) -> float:
    """Some wait of at most ``seconds``, for what happens to everybody at the same moment."""
    return random.uniform(0.0, seconds)  # noqa: S311  spreads load, guards nothing


class Backoff:
    """Seconds to wait: doubles from ``first`` up to ``cap``, each drawn from the upper half."""

    def __init__(self, first: float, cap: float) -> None:
        self._first = first
        self._cap = cap
        self._failures = 0

    def next(self) -> float:
        """The wait after one more failure."""
        wait = min(self._cap, self._first * 2 ** min(self._failures, 16))
        self._failures += 1
        return float(wait * random.uniform(0.5, 1.0))  # noqa: S311  spreads load, guards nothing

    def reset(self) -> None:
        """After a success."""
        self._failures = 0
