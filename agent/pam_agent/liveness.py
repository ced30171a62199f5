"""Whether the agent's loops go round: what systemd's watchdog is fed by."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Liveness:
    """Each loop says that it lives within its own limit; one that does not is stuck."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._due: dict[str, float] = {}

    def beat(self, name: str, limit: float) -> Callable[[], None]:
        """Expect a beat of ``name`` every ``limit`` seconds from now on; returns what gives one."""

        def beat() -> None:
            with self._lock:
                self._due[name] = self._clock() + limit

        beat()
        return beat

    def forget(self, name: str) -> None:
        """The loop has ended as it should."""
        with self._lock:
            self._due.pop(name, None)

    def stuck(self) -> list[str]:
        """The loops that are overdue."""
        now = self._clock()
        with self._lock:
            return sorted(name for name, due in self._due.items() if due < now)
