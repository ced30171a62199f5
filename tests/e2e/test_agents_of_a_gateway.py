"""Two agents of one gateway: sessions are spread, each stays with its agent, one takes over from the dead."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import psycopg
import pytest
from processes import wait_for
from stack import Stack


@pytest.fixture(scope="module")
def stack(tmp_path_factory, postgres) -> Iterator[Stack]:
    with Stack(tmp_path_factory.mktemp("stack"), agents=("dc1-a", "dc1-b")) as running:
        running.add_database(postgres)
        running.start()
        yield running


def test_sessions_are_spread_and_each_stays_with_its_agent(stack, alice, connect) -> None:
    with connect(alice) as one, one.open(), connect(alice) as other, other.open():
        agents = [row["agent"] for row in (one.session(), other.session())]  # the newest of each moment
        with one.open(), one.open(), other.open():
            routes = stack.status("pam-relay", "relay")["routes"]
            assert {route["agent"]: route["channels"] for route in routes}.keys() == {"dc1-a", "dc1-b"}
            assert sorted(route["channels"] for route in routes) == [2, 3]
        assert agents[0] in ("dc1-a", "dc1-b")


@pytest.mark.timeout(1200)
def test_another_agent_goes_on_with_the_sessions_of_a_dead_one(stack, alice, connect, replay) -> None:
    """Also when the grant's two minutes for a first opening have long passed."""
    with connect(alice) as connected:
        with connected.open() as connection:
            connection.execute("select 'on the first agent'")
            session = connected.session()
            dead = session["agent"]
            stack.processes[dead].kill()
            killed = time.monotonic()

        def refused() -> str:
            try:
                connected.open().close()
            except psycopg.OperationalError as error:
                return str(error)
            return ""

        wait_for(lambda: "which is alive" in refused(), "the other agent to be asked")
        wait_for(lambda: time.monotonic() - killed > 121, "the grant to be late", timeout=180)
        with contextlib.closing(connected.open()) as connection:
            connection.execute("select 'on the second agent'")
        assert connected.session()["id"] == session["id"], "the same session"
        assert connected.session()["agent"] not in (dead, None)
    stack.start_agent(dead)  # brings what it recorded
    sql = [(event["part"], event.get("sql", "")) for event in replay(alice, session["id"])]
    assert (1, "select 'on the first agent'") in sql
    assert (2, "select 'on the second agent'") in sql
