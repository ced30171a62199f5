"""The routing table: newest wins, least used first, sessions stay where they are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pam_relay import routes as routes_module
from pam_relay.routes import Route, Routes


def route(agent: str = "a", slot: int = 1, link: str = "", gateway: str = "dc1") -> Route:
    return Route(gateway, agent, slot, link or f"link-{agent}-{slot}")


@pytest.fixture
def routes() -> Routes:
    return Routes()


def test_the_newest_link_wins_its_slot_and_no_other(routes: Routes) -> None:
    old, other, new = route(link="old"), route(slot=2, link="old"), route(link="new")
    assert routes.add(old) is None
    assert routes.add(other) is None
    assert routes.add(new) == old
    assert list(routes) == [new, other]


def test_asking_again_on_the_same_link_replaces_nobody(routes: Routes) -> None:
    routes.add(route())
    assert routes.add(route()) is None
    assert len(routes) == 1


def test_the_end_of_a_replaced_link_leaves_the_new_one(routes: Routes) -> None:
    routes.add(route(link="old"))
    routes.add(route(link="new"))
    assert routes.drop("old") == []
    assert routes.choose("dc1", "s1") == route(link="new")


def test_nobody_cancels_anothers_route(routes: Routes) -> None:
    routes.add(route(link="new"))
    assert not routes.cancel(route(link="old"))
    assert not routes.cancel(route(agent="b", link="new"))
    assert routes.cancel(route(link="new"))
    assert len(routes) == 0


def test_a_gateway_without_agents_has_no_route(routes: Routes) -> None:
    routes.add(route())
    assert routes.choose("dc2", "s1") is None
    assert routes.choose("dc", "s1") is None


def test_new_sessions_go_to_the_agent_with_the_fewest_channels(routes: Routes) -> None:
    for agent in "abc":
        routes.add(route(agent))
    for number in range(9):
        session = f"s{number}"
        chosen = routes.choose("dc1", session)
        assert chosen is not None
        routes.opened(chosen, session)
    assert [routes.channels_of_agent(agent) for agent in "abc"] == [3, 3, 3]


def test_a_session_stays_with_its_agent_however_busy_that_is(routes: Routes) -> None:
    routes.add(route("a"))
    first = routes.choose("dc1", "s1")
    assert first is not None
    routes.add(route("b"))
    for _ in range(10):
        routes.opened(first, "s1")
        assert routes.choose("dc1", "s1") == first
    assert routes.choose("dc1", "s2") == route("b")


def test_a_session_uses_all_tunnels_of_its_agent(routes: Routes) -> None:
    routes.add(route("a", 1))
    routes.add(route("a", 2))
    for _ in range(4):
        chosen = routes.choose("dc1", "s1")
        assert chosen is not None
        routes.opened(chosen, "s1")
    assert routes.channels_of_route(route("a", 1)) == routes.channels_of_route(route("a", 2)) == 2


def test_when_its_agent_is_gone_a_session_moves_and_stays_there(routes: Routes) -> None:
    routes.add(route("a"))
    routes.choose("dc1", "s1")
    routes.drop(route("a").link)
    routes.add(route("b"))
    assert routes.choose("dc1", "s1") == route("b")
    routes.add(route("a"))
    assert routes.choose("dc1", "s1") == route("b")


def test_a_route_that_failed_is_left_out(routes: Routes) -> None:
    routes.add(route("a"))
    routes.add(route("b"))
    assert routes.choose("dc1", "s1", without=[route("a")]) == route("b")
    assert routes.choose("dc1", "s1", without=[route("a"), route("b")]) is None


def test_pins_are_bounded(routes: Routes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes_module, "MAX_PINS", 3)
    routes.add(route("a"))
    for number in range(10):
        routes.choose("dc1", f"s{number}")
    assert list(routes._pins) == ["s7", "s8", "s9"]


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 2), st.sampled_from(["s1", "s2"])), max_size=30)
)
def test_counts_return_to_nothing(steps: list[tuple[str, int, str]]) -> None:
    routes = Routes()
    for agent, slot, session in steps:
        routes.opened(route(agent, slot), session)
    assert routes.channels == len(steps)
    for agent, slot, session in steps:
        routes.closed(route(agent, slot), session)
    assert (routes.channels, routes.sessions) == (0, 0)
    assert not routes._by_route
    assert not routes._by_agent
