"""Every way in which a session ends before the user ends it: at once, told in words, recorded."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable

import psycopg
import pytest
from patience import Metronome
from processes import wait_for
from stack import form_fields


@pytest.fixture
def cut_within(postgres) -> Callable[..., str]:
    """Run ``act`` while a query sleeps; returns what the client was told and checks that it was soon."""

    def cut(connection, act: Callable[[], object], seconds: float = 1.0) -> str:
        errors: list[Exception] = []
        ended: list[float] = []
        mark = secrets.token_hex(4)
        query = f"select pg_sleep(600), '{mark}'"

        def sleep() -> None:
            try:
                connection.execute(query)
            except psycopg.Error as error:
                errors.append(error)
                ended.append(time.monotonic() - beat.lost())

        with Metronome() as beat:
            sleeper = threading.Thread(target=sleep, daemon=True)
            sleeper.start()
            under_way = f"select count(*) from pg_stat_activity where query ~ '^select pg_sleep.*{mark}'"
            wait_for(lambda: postgres.sql(under_way) == "1", "the query to be under way")
            act()
            acted = time.monotonic() - beat.lost()
            sleeper.join(120)
            assert errors, "the session was not cut"
            assert ended[0] - acted < seconds
        return str(errors[0])

    return cut


def test_the_owner_kills_a_session(alice, connect, cut_within, replay) -> None:
    with connect(alice) as connected, connected.open() as connection:
        session = connected.session()["id"]
        said = cut_within(connection, lambda: alice.run("sessions", "kill", session))
        assert "killed" in said
        with pytest.raises(psycopg.OperationalError):
            connected.open()
    events = replay(alice, session)
    assert any("pg_sleep" in event.get("sql", "") for event in events)
    listed = next(row for row in sessions(alice) if row["id"] == session)
    assert "kill" in listed["end_reason"]


def test_an_admin_kills_it_on_the_web_page(stack, alice, connect, cut_within) -> None:
    with connect(alice) as connected, connected.open() as connection:
        session = connected.session()["id"]
        root = stack.person("root").web()

        def kill() -> None:
            page = f"{stack.url}/sessions/{session}"
            answer = root.get(page, timeout=90)
            fields = form_fields(answer.text, prefer="action=kill")
            answer = root.post(f"{page}/kill", data=fields, headers={"Referer": page}, timeout=90)
            assert answer.status_code == 200, answer.text[:300]

        assert "killed" in cut_within(connection, kill)


def test_a_session_that_nobody_used_is_no_alarm(alice, connect, tmp_path) -> None:
    with connect(alice) as connected:
        session = connected.session()["id"]
        running = alice.run("replay", session)
    assert next(row for row in sessions(alice) if row["id"] == session)["recording"] == "none"
    for done in (running, alice.run("replay", session)):
        assert done.stdout == "nothing was recorded in this session so far\n"
    file = tmp_path / "exported"
    done = alice.run("replay", session, "--export", "ndjson", "-o", str(file), check=False)
    assert done.returncode == 1
    assert "error: there is nothing to write" in done.stderr
    assert not file.exists()


def test_a_stranger_cannot_kill_it(stack, alice, connect) -> None:
    bob = stack.person("bob")
    bob.login()
    with connect(alice) as connected, connected.open() as connection:
        session = connected.session()["id"]
        done = bob.run("sessions", "kill", session, check=False)
        assert done.returncode != 0
        assert connection.execute("select 1").fetchone() == (1,)


def test_disabling_a_user_ends_what_they_have_open(stack, connect, cut_within) -> None:
    bob = stack.person("bob")
    bob.login()
    with connect(bob) as connected, connected.open() as connection:
        cut_within(connection, lambda: stack.platform("user", "disable", "bob"))
        done = bob.run("ls", check=False)
        assert done.returncode != 0
    stack.platform("user", "enable", "bob")


def test_an_idle_session_ends(stack, alice, connect) -> None:
    stack.policy = {"idle_limit": "20s"}
    stack.apply()
    try:
        with connect(alice) as connected, connected.open() as connection:
            connection.execute("select 1")
            wait_for(lambda: sessions(alice)[0]["state"] == "ended", "the idle session to end", timeout=90)
            with pytest.raises(psycopg.OperationalError, match="idle"):
                connection.execute("select 1")
    finally:
        stack.policy = {}
        stack.apply()


def test_a_session_ends_when_its_time_is_over(stack, alice, connect, cut_within) -> None:
    stack.policy = {"max_duration": "30s"}  # of which opening takes some on a machine under load
    stack.apply()
    try:
        with connect(alice) as connected, connected.open() as connection:
            said = cut_within(connection, lambda: None, seconds=31)
            assert "the session has expired: its time is over" in said
    finally:
        stack.policy = {}
        stack.apply()


def test_without_a_policy_there_is_no_way_in(stack, alice) -> None:
    stack.policy = {"accounts": ["other/*"]}
    stack.apply()
    try:
        done = alice.run("connect", "demo-db/readonly", "--", "true", check=False)
        assert done.returncode != 0
        assert "error:" in done.stderr
    finally:
        stack.policy = {}
        stack.apply()


def test_revoking_an_agent_ends_its_sessions(stack, alice, connect, cut_within) -> None:
    stack.agents = (*stack.agents, "dc1-b")
    with connect(alice) as connected, connected.open() as connection:
        agent = connected.session()["agent"]
        cut_within(connection, lambda: admin(stack, "POST", f"agents/{agent}/revoke"))
    done = alice.run("connect", "demo-db/readonly", "--", "true", check=False)
    assert done.returncode != 0
    stack.start_agent("dc1-b")

    def routed() -> set[str]:
        return {route["agent"] for route in stack.status("pam-relay", "relay")["routes"]}

    wait_for(lambda: routed() == {"dc1-b"}, "the other agent's route alone")
    alice.run("connect", "demo-db/readonly", "--", "true")


def test_deleting_the_gateway_ends_its_sessions_and_its_agent(stack, alice, connect, cut_within) -> None:
    with connect(alice) as connected, connected.open() as connection:
        cut_within(connection, lambda: admin(stack, "DELETE", "gateways/dc1"))
    done = alice.run("connect", "demo-db/readonly", "--", "true", check=False)
    assert done.returncode != 0


def admin(stack, method: str, path: str) -> None:
    """Call the API with an admin's web session, as a page's script would."""
    browser = stack.person("root").web()
    headers = {"X-CSRFToken": browser.cookies["csrftoken"], "Referer": stack.url}
    answer = browser.request(method, f"{stack.url}/api/v1/{path}", headers=headers, timeout=90)
    assert answer.status_code == 200, answer.text


def sessions(person):
    return json.loads(person.run("sessions", "ls", "--json").stdout)
