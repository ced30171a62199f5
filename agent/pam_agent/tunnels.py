"""All tunnels of an agent: one per relay and slot, kept in step with the platform's list of relays."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from pam_agent.doorstep import Doorstep
from pam_agent.liveness import Liveness
from pam_agent.state import AgentState, Relay
from pam_agent.tunnel import Tunnel

#: One round of a tunnel's loop at the longest: connect, key exchange, login and forward at their limits.
BEAT_LIMIT = 180.0


class Tunnels:
    """Safe for use from several threads."""

    def __init__(
        self, state: AgentState, doorstep: Doorstep, liveness: Liveness, now: Callable[[], float]
    ) -> None:
        self._state = state
        self._doorstep = doorstep
        self._liveness = liveness
        self._now = now
        self._lock = threading.Lock()
        self._wanted: dict[tuple[Relay, int], Tunnel] = {}
        self._leaving: list[Tunnel] = []
        self._draining = False

    def set(self, relays: Sequence[Relay], slots: int) -> None:
        """Have ``slots`` tunnels to each of ``relays`` and to nothing else. Without relays every tunnel
        is cut at once; a relay that only left the list is drained."""
        wanted = {(relay, slot) for relay in relays for slot in range(1, slots + 1)}
        with self._lock:
            if self._draining:
                return
            for key in self._wanted.keys() - wanted:
                tunnel = self._wanted.pop(key)
                if relays:
                    tunnel.drain()
                else:
                    tunnel.stop()
                self._leaving.append(tunnel)
            if not relays:
                for tunnel in self._leaving:
                    tunnel.stop()
            for relay, slot in sorted(wanted - self._wanted.keys(), key=str):
                self._start(relay, slot)

    def _start(self, relay: Relay, slot: int) -> None:
        beat = self._liveness.beat(f"tunnel-{relay.name}-{slot}", BEAT_LIMIT)
        tunnel = Tunnel(relay, slot, self._state, self._doorstep, now=self._now, beat=beat)
        self._wanted[relay, slot] = tunnel
        tunnel.start()

    def sweep(self) -> None:
        """End the leaving tunnels that carry nothing any more."""
        with self._lock:
            for tunnel in list(self._leaving):
                if not tunnel.channels:
                    tunnel.stop()
                if not tunnel.running:
                    self._leaving.remove(tunnel)
                    if not any(other.name == tunnel.name for other in self._wanted.values()):
                        self._liveness.forget(tunnel.name)

    def wait_tried(self, timeout: float) -> None:
        """Wait until some tunnel has been tried once; at once when there is none."""
        give_up = time.monotonic() + timeout
        while time.monotonic() < give_up:
            tunnels = self._all()
            if not tunnels or any(tunnel.tried.wait(0.05) for tunnel in tunnels):
                return

    def drain(self, timeout: float) -> None:
        """Take no new channels anywhere; the open ones live on. Waits until every relay knows, but no longer
        than ``timeout`` seconds."""
        with self._lock:
            self._draining = True
        tunnels = self._all()
        for tunnel in tunnels:
            tunnel.drain()
        give_up = time.monotonic() + timeout
        for tunnel in tunnels:
            tunnel.drained.wait(max(0.0, give_up - time.monotonic()))

    def stop(self) -> None:
        """Cut every tunnel."""
        with self._lock:
            self._draining = True
        tunnels = self._all()
        for tunnel in tunnels:
            tunnel.stop()
        give_up = time.monotonic() + 5
        for tunnel in tunnels:
            tunnel.join(max(0.0, give_up - time.monotonic()))

    def counts(self) -> tuple[int, int]:
        """How many are up, of how many wanted."""
        with self._lock:
            tunnels = list(self._wanted.values())
        return sum(tunnel.up for tunnel in tunnels), len(tunnels)

    def status(self) -> list[dict[str, object]]:
        return [tunnel.status() for tunnel in self._all()]

    def _all(self) -> list[Tunnel]:
        with self._lock:
            return [*self._wanted.values(), *self._leaving]
