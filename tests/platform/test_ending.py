"""Ending sessions while others open them, when it breaks off, and after another agent took them over."""

from datetime import timedelta
from threading import Thread

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from pam_platform.access import ending
from pam_platform.access.models import Session
from pam_platform.access.policy import decide
from pam_platform.access.rules import load_rules
from pam_platform.accounts.models import User
from pam_platform.fleet import inbox
from pam_platform.fleet.models import Agent, EnrolToken, Gateway, InboxMessage


def open_(peer, session):
    response = peer.call("POST", f"/agent/sessions/{session}/open")
    assert response.status_code == 200, response.content


@pytest.fixture
def opened(fleet, person):
    """A session of alice that dc1-a has opened."""
    session = person("alice").connect().json()["session"]
    open_(fleet["dc1-a"], session)
    return session


def elsewhere(look):
    """What another worker sees, on a connection of its own."""
    found = []

    def run():
        found.append(look())
        connection.close()

    thread = Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def may_open():
    """Whether another worker would let alice open a session now."""
    alice = User.objects.get(username="alice")
    return (
        alice.is_active and decide(load_rules(), "alice", alice.group_names(), "prod-db/readonly") is not None
    )


def without_right(document):
    document["policies"] = []


def without_alice(document):
    document["users"] = document["users"][1:]


@pytest.fixture
def disable(apply):
    """Each way in which alice loses her right to the session."""
    return {
        "disable": lambda: ending.disable_user(User.objects.get(username="alice"), "test"),
        "policy": lambda: apply(without_right, prune=True),
        "prune": lambda: apply(without_alice, prune=True),
    }


@pytest.mark.parametrize("way", ["disable", "policy", "prune"])
def test_whoever_opens_a_session_sees_the_change_before_sessions_are_looked_for(opened, disable, way):
    """Else what another worker opens meanwhile, as before the change, would be found by nobody."""
    seen = []

    def watch(execute, sql, params, many, context):
        if sql.startswith("SELECT") and 'FROM "access_session"' in sql:
            seen.append(elsewhere(may_open))
        return execute(sql, params, many, context)

    assert may_open()
    with connection.execute_wrapper(watch):
        disable[way]()
    assert seen[-1] is False
    assert Session.objects.get().state == "ended"


@pytest.mark.parametrize("way", ["disable", "policy", "prune"])
def test_what_broke_off_before_sessions_ended_is_mended_by_doing_it_again(opened, disable, way, monkeypatch):
    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ending, "_end", crash)
        with pytest.raises(KeyboardInterrupt):
            disable[way]()
    assert not may_open(), "the change itself is committed"
    assert Session.objects.get().state == "active"
    disable[way]()
    assert Session.objects.get().state == "ended"


def test_a_gateway_whose_deletion_broke_off_can_be_deleted_again(opened, monkeypatch):
    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ending, "_end", crash)
        with pytest.raises(KeyboardInterrupt):
            ending.delete_gateway(Gateway.objects.get(name="dc1"), "test")
    assert Agent.objects.get(name="dc1-a").state == "revoked"
    assert ending.delete_gateway(Gateway.objects.get(name="dc1"), "test") == 1
    assert Session.objects.get().state == "ended"
    assert not Agent.objects.filter(gateway_name="dc1", state="active").exists()


def test_nobody_enrols_at_a_gateway_while_it_is_deleted(opened, monkeypatch):
    """An agent that came after the others were revoked would stay, and open sessions of a later namesake."""
    from pam_platform.fleet.enrolment import create_token

    create_token("agent", "dc1-c", "dc1", actor="test")
    tokens = []
    real = ending.revoke_agent

    def revoke(*words):
        tokens.append(EnrolToken.objects.filter(used=None).count())
        return real(*words)

    monkeypatch.setattr(ending, "revoke_agent", revoke)
    assert ending.delete_gateway(Gateway.objects.get(name="dc1"), "test") == 1, "those of its agents count"
    assert tokens == [0, 0]


def test_an_opening_that_came_in_time_is_found_though_its_grant_has_run_out(opened, monkeypatch):
    """Another worker has decided in time and is about to commit; from here the grant looks unused."""
    Session.objects.update(state="granted", grant_expires=timezone.now() - timedelta(seconds=1))
    real = ending._end

    def commit_first(*words):
        Session.objects.update(state="active")
        return real(*words)

    monkeypatch.setattr(ending, "_end", commit_first)
    assert ending.disable_user(User.objects.get(username="alice"), "test") == 1


def test_a_dry_run_tells_of_the_sessions_that_would_end(opened, apply):
    (change,) = (
        change for change in apply(without_right, prune=True, dry_run=True) if change.action == "end"
    )
    assert change.name == f"{opened} of alice on prod-db/readonly"
    assert Session.objects.get().state == "active"
    assert not InboxMessage.objects.filter(kind="kill").exists()


# --- who is told ---------------------------------------------------------------------------------------


def heard(peer, after):
    return [
        (message["kind"], message["session"])
        for message in peer.call("GET", "/agent/inbox", after=after).json()["messages"]
    ]


def test_an_agent_that_lost_a_session_to_another_hears_of_its_end_too(opened, fleet):
    """It was silent towards the platform; its tunnels to relays may have been up all the time."""
    cursors = {name: fleet[name].call("GET", "/agent/inbox").json()["cursor"] for name in ("dc1-a", "dc1-b")}
    Agent.objects.filter(name="dc1-a").update(last_seen=timezone.now() - timedelta(seconds=61))
    open_(fleet["dc1-b"], opened)
    ending.kill(Session.objects.get(), "test")
    for name, cursor in cursors.items():
        assert heard(fleet[name], cursor) == [("kill", opened)]
        assert heard(fleet[name], -1) == [("kill", opened)], "also without a place in its inbox"
    fleet["dc1-b"].call("POST", f"/agent/sessions/{opened}/closed", {"part": 2, "reason": "killed"})
    assert heard(fleet["dc1-b"], -1) == []
    assert Agent.objects.get(name="dc2-a").messages.filter(kind="kill").count() == 0


def test_an_agent_that_opened_several_parts_is_told_once(opened, fleet):
    cursor = fleet["dc1-a"].call("GET", "/agent/inbox").json()["cursor"]
    open_(fleet["dc1-a"], opened)
    ending.kill(Session.objects.get(), "test")
    assert heard(fleet["dc1-a"], cursor) == [("kill", opened)]


# --- what it costs -------------------------------------------------------------------------------------


def queries(do):
    with CaptureQueriesContext(connection) as done:
        do()
    return [query["sql"] for query in done]


def test_looking_for_what_is_not_allowed_costs_the_same_for_any_number_of_sessions(fleet, person):
    alice = person("alice")
    alice.connect()
    one = len(queries(ending.end_disallowed))
    for _ in range(4):
        alice.connect()
    assert len(queries(ending.end_disallowed)) == one


def test_old_messages_are_looked_for_once_per_agent(fleet):
    agent = Agent.objects.get(name="dc1-a")
    inbox.post(agent, "kill", "s-old")
    InboxMessage.objects.update(created=timezone.now() - inbox.RETENTION - timedelta(seconds=1))
    done = queries(lambda: inbox.post(agent, "kill", *(f"s-{number}" for number in range(5)), reason="why"))
    assert sum("created" in sql and not sql.startswith("INSERT") for sql in done) <= 2
    rows = list(agent.messages.values_list("session", "reason"))
    assert rows == [(f"s-{number}", "why") for number in range(5)]


def test_relays_find_ended_sessions_by_an_index(db):
    from pam_platform.access import bundles

    (sql,) = queries(bundles._revoked_sessions)
    with connection.cursor() as cursor:
        cursor.execute(f"EXPLAIN QUERY PLAN {sql}")
        plan = " ".join(str(row) for row in cursor.fetchall())
    assert "USING INDEX session_running (state=?" in plan, plan
