"""Routes: which agents serve which gateway, and which of them a session's next channel goes to.

No socket, thread or clock here; the server calls it under its lock.

A *route* is (gateway, agent, slot) at the link that asked for it. The newest link wins a slot, so an agent
that reconnects takes over from its own dead connection. A session's first channel goes to the agent with the
fewest channels, and its next ones to that same agent while it has a route: one session, one recording.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

#: RFC 4254 calls it a port; more than a few tunnels of one agent to one relay gain nothing.
MAX_SLOT = 16
#: Sessions whose agent is remembered. A pin lives on without channels (a pool may come back), so it needs an
#: end of its own; 65536 pins are some 15 MiB and more sessions than a relay carries in days.
MAX_PINS = 65536


@dataclass(frozen=True)
class Route:
    """A way to ``agent``: the reverse forward ``gateway:slot`` of ``link``."""

    gateway: str
    agent: str
    slot: int
    link: Hashable

    @property
    def key(self) -> tuple[str, str, int]:
        return (self.gateway, self.agent, self.slot)


class Routes:
    """The relay's routing table with its channel counts."""

    def __init__(self) -> None:
        self._routes: dict[tuple[str, str, int], Route] = {}
        self._pins: OrderedDict[str, str] = OrderedDict()
        self._by_route: Counter[Route] = Counter()
        self._by_agent: Counter[str] = Counter()
        self._by_session: Counter[str] = Counter()

    # -- routes ----------------------------------------------------------------------------------------

    def add(self, route: Route) -> Route | None:
        """Register ``route``; returns the other link's route that it replaces, if any."""
        old = self._routes.get(route.key)
        self._routes[route.key] = route
        return old if old is not None and old.link != route.link else None

    def cancel(self, route: Route) -> bool:
        """Take ``route`` out of service; its open channels live on. False when it is not this link's (any
        more): nobody cancels another's."""
        if self._routes.get(route.key) != route:
            return False
        del self._routes[route.key]
        return True

    def drop(self, link: Hashable) -> list[Route]:
        """Forget all routes of a link that has gone."""
        gone = [route for route in self._routes.values() if route.link == link]
        for route in gone:
            del self._routes[route.key]
        return gone

    def __iter__(self) -> Iterator[Route]:
        return iter(sorted(self._routes.values(), key=lambda route: route.key))

    def __len__(self) -> int:
        return len(self._routes)

    # -- choosing --------------------------------------------------------------------------------------

    def choose(self, gateway: str, session: str, *, without: Iterable[Route] = ()) -> Route | None:
        """The route for the next channel of ``session``, or None when no agent serves ``gateway``.

        Of the pinned agent while it has one, else of the agent with the fewest channels, which the session
        is pinned to from now on. ``without`` are routes that were just found not to work.
        """
        excluded = set(without)
        usable = [
            route for route in self._routes.values() if route.gateway == gateway and route not in excluded
        ]
        if not usable:
            return None
        pinned = self._pins.get(session)
        own = [route for route in usable if route.agent == pinned]
        # Least used agent first, then its least used tunnel; the key makes it the same every time.
        chosen = min(
            own or usable, key=lambda route: (self._by_agent[route.agent], self._by_route[route], route.key)
        )
        self._pin(session, chosen.agent)
        return chosen

    def _pin(self, session: str, agent: str) -> None:
        self._pins[session] = agent
        self._pins.move_to_end(session)
        if len(self._pins) > MAX_PINS:
            self._pins.popitem(last=False)

    # -- channels --------------------------------------------------------------------------------------

    def opened(self, route: Route, session: str) -> None:
        """Count a channel from the moment it is wanted, so that a burst spreads too."""
        self._by_route[route] += 1
        self._by_agent[route.agent] += 1
        self._by_session[session] += 1

    def closed(self, route: Route, session: str) -> None:
        """Count it off; called once for each ``opened``."""
        for counter, key in (
            (self._by_route, route),
            (self._by_agent, route.agent),
            (self._by_session, session),
        ):
            _decrement(counter, key)

    def channels_of_agent(self, agent: str) -> int:
        return self._by_agent[agent]

    def channels_of_session(self, session: str) -> int:
        return self._by_session[session]

    def channels_of_route(self, route: Route) -> int:
        return self._by_route[route]

    @property
    def sessions(self) -> int:
        """How many sessions have channels now."""
        return len(self._by_session)

    @property
    def channels(self) -> int:
        return self._by_session.total()


def _decrement(counter: Counter[Any], key: Hashable) -> None:
    """Count down, and forget at zero: counters of names that came once must not pile up."""
    counter[key] -= 1
    if counter[key] <= 0:
        del counter[key]
