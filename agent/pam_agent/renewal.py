"""Keeps certificate, statement, trust list and relays fresh, long before any of them expires."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

from pam_agent.api import AgentApi
from pam_agent.backoff import Backoff
from pam_agent.state import AgentState
from pam_common.errors import PamError
from pam_common.logging import get_logger, kv

log = get_logger("agent.renewal")

#: A new relay or a rotated key is known to every agent after this at the latest.
LONGEST = 3600.0
SHORTEST = 5.0


class Renewal:
    """Renews in a thread ``renewal``; ``renewed`` is called there when relays or certificate changed."""

    def __init__(
        self,
        api: AgentApi,
        state: AgentState,
        *,
        renewed: Callable[[], None],
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self._api = api
        self._state = state
        self._renewed = renewed
        self._beat = beat
        self._wake = threading.Event()
        self._stopping = False
        self._backoff = Backoff(1.0, 300.0)
        self._trouble = ""
        self._thread = threading.Thread(target=self._run, name="renewal", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def soon(self) -> None:
        """Renew now instead of later."""
        self._wake.set()

    def stop(self) -> None:
        self._stopping = True
        self._wake.set()

    @property
    def trouble(self) -> str:
        return self._trouble

    def _run(self) -> None:
        while not self._stopping:
            try:
                wait = self.renew()
            except Exception:  # a fault of ours must not let the certificate run out
                log.exception("renewal fault")
                self._trouble, wait = "a fault of the agent", self._backoff.next()
            # In pieces, so that the thread shows that it lives while it waits for an hour.
            while wait > 0 and not self._wake.is_set():
                self._beat()
                self._wake.wait(min(wait, 30.0))
                wait -= 30.0
            self._wake.clear()

    def renew(self) -> float:
        """Renew once; returns the seconds until the next time."""
        try:
            changed = self._state.renew(self._api.renew(), self._api.now())
        except (PamError, OSError) as error:
            if str(error) != self._trouble:
                log.warning("renewal failed", extra=kv(reason=error))
            self._trouble = str(error)
            return self._backoff.next()
        self._trouble = ""
        self._backoff.reset()
        if changed:
            self._renewed()
        return self._next()

    def _next(self) -> float:
        """A third of what is left, so that two failures in a row cost nothing; with jitter."""
        standing = self._state.standing
        left = min(standing.certificate_expires, standing.statement_expires) - self._api.now()
        wait = min(LONGEST, max(SHORTEST, left / 3))
        return float(wait * random.uniform(0.8, 1.0))  # noqa: S311  spreads load, guards nothing
