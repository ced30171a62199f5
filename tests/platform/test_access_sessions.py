"""From connect to the end of a session, through the API with real keys."""

import json
from datetime import timedelta

import pytest
from django.conf import settings
from django.utils import timezone
from nacl.public import PrivateKey, SealedBox

from pam_common.errors import AuthenticationError
from pam_common.keys import VerifyKeys, b64decode
from pam_common.secure_channel import x25519_public
from pam_common.ssh_certs import verify_user_certificate
from pam_common.tokens import Grant
from pam_platform.access import ending
from pam_platform.access.models import Policy, Session
from pam_platform.accounts.models import User
from pam_platform.audit.models import AuditEvent
from pam_platform.fleet.models import Agent, Gateway
from pam_platform.vault.models import PlatformKey


@pytest.fixture
def alice(fleet, person):
    return person("alice")


@pytest.fixture
def granted(alice):
    """What alice's connect to prod-db/readonly gave."""
    response = alice.connect()
    assert response.status_code == 200, response.content
    return response.json()


def open_(peer, session):
    return peer.call("POST", f"/agent/sessions/{session}/open")


def age(model, pk, **fields):
    model.objects.filter(pk=pk).update(**fields)


# --- connect -------------------------------------------------------------------------------------------


def test_connect_gives_a_grant_for_this_key_account_and_gateway(alice, granted):
    now = timezone.now().timestamp()
    keys = VerifyKeys.from_json(granted["grant_keys"])
    grant = Grant.parse(
        granted["grant"], keys, issuer=settings.PAM_ISSUER, gateway="dc1", now=now, first_opening=True
    )
    grant.require_key(x25519_public(alice.noise))
    assert (grant.session, grant.user, grant.account) == (granted["session"], "alice", "prod-db/readonly")
    assert grant.idle_limit == 1800
    assert 100 < grant.expires - now <= 120
    assert 8 * 3600 - 60 < grant.session_end - now <= 8 * 3600
    assert granted["expires"] == grant.expires
    assert granted["session_end"] == grant.session_end


def test_a_grant_for_one_gateway_is_none_for_another(granted):
    keys = VerifyKeys.from_json(granted["grant_keys"])
    with pytest.raises(AuthenticationError):
        Grant.parse(
            granted["grant"],
            keys,
            issuer=settings.PAM_ISSUER,
            gateway="dc2",
            now=timezone.now().timestamp(),
            first_opening=True,
        )


def test_connect_gives_a_certificate_of_minutes_for_one_gateway(alice, granted):
    from pam_platform.vault import keys

    certificate = verify_user_certificate(
        granted["certificate"],
        keys.verify_keys(keys.RELAY_USER_CA),
        now=timezone.now().timestamp(),
        principal="connect:dc1",
    )
    assert certificate.key_id == granted["session"]
    assert certificate.principals == ("connect:dc1",)
    assert certificate.public_key == alice.ssh.public
    assert certificate.valid_before - timezone.now().timestamp() <= 600


def test_connect_lists_relays_and_the_agents_of_the_gateway(granted, fleet):
    assert granted["relays"] == [{"name": "r1", "host": "relay.example.com", "port": 2222}]
    assert [agent["id"] for agent in granted["agents"]] == ["dc1-a", "dc1-b"]
    assert granted["agents"][0]["noise_key"] == fleet["dc1-a"].public()["noise_key"]
    assert granted["hints"] == {"port": 5432, "database": "app", "user": "app_ro"}
    assert "password" not in json.dumps(granted)


def test_connect_without_account_takes_the_only_one_and_asks_among_several(alice, apply):
    refused = alice.connect(account=None)
    assert refused.status_code == 403
    assert "prod-db/owner, prod-db/readonly" in refused.json()["detail"]
    apply(lambda document: document["policies"][0].update(accounts=["prod-db/readonly"]))
    assert alice.connect(account=None).json()["account"] == "prod-db/readonly"


@pytest.mark.parametrize(
    ("resource", "account"),
    [("other-db", "readonly"), ("no-such-db", "readonly"), ("prod-db", "no-such"), ("no-such-db", None)],
)
def test_what_policy_does_not_open_and_what_does_not_exist_look_alike(alice, audit_trail, resource, account):
    response = alice.connect(resource, account)
    assert response.status_code == 403
    name = resource if account is None else f"{resource}/{account}"
    assert response.json()["detail"] == f"no policy lets alice use {name}"
    actor, action, wanted, outcome, details = audit_trail()[-1]
    assert (actor, action, wanted, outcome) == ("alice", "connect", f"{resource}/{account or '*'}", "refused")
    assert "no policy" in details["reason"]


def test_nobody_without_a_policy_gets_in(fleet, person):
    assert person("bob").connect().status_code == 403
    assert Session.objects.count() == 0


@pytest.mark.parametrize(
    "resource", ["Prod-db", "prod-db/", "prod-db/readonly", "prod‑db", "prod-db\n", "*", "../x", "p" * 64, ""]
)
def test_a_name_that_is_no_label_is_not_looked_up(alice, resource):
    assert alice.connect(resource).status_code == 422


@pytest.mark.parametrize("key", ["", "A" * 42, "A" * 44, "A" * 42 + "=", "A" * 42 + "B", 7, None])
def test_connect_refuses_what_is_no_key_and_does_not_repeat_it(alice, key):
    response = alice.connect(noise_key=key)
    assert response.status_code == 422
    assert "AAAA" not in response.json()["detail"]


def test_connect_says_when_no_agent_runs(alice):
    Agent.objects.filter(gateway_name="dc1").update(last_seen=timezone.now() - timedelta(minutes=5))
    response = alice.connect()
    assert response.status_code == 409
    assert "no agent of gateway dc1 is running (last seen" in response.json()["detail"]
    assert response.json()["hint"]


def test_a_revoked_agent_is_not_offered(alice, fleet):
    ending.revoke_agent(Agent.objects.get(name="dc1-a"), "test")
    assert [agent["id"] for agent in alice.connect().json()["agents"]] == ["dc1-b"]


def test_open_sessions_are_limited(alice, new_session, monkeypatch):
    monkeypatch.setattr("pam_platform.access.granting.MAX_OPEN_SESSIONS", 2)
    old = timezone.now() - timedelta(hours=1)
    new_session(alice.user, granted=old, grant_expires=old)  # expired: does not count
    assert alice.connect().status_code == 200
    assert alice.connect().status_code == 200
    response = alice.connect()
    assert response.status_code == 403
    assert "2 sessions open" in response.json()["detail"]


def test_resources_are_those_that_policy_opens(alice, person):
    answer = alice.call("GET", "/resources").json()
    assert [entry["key"] for entry in answer["interceptor_host_ca"]] == [
        PlatformKey.objects.get(purpose="interceptor-host-ca").public
    ]
    assert answer["resources"] == (
        [
            {
                "name": "prod-db",
                "protocol": "postgres",
                "gateway": "dc1",
                "database": "app",
                "accounts": [
                    {"name": "owner", "max_duration": 28800, "idle_limit": 1800, "policy": "dba-prod"},
                    {"name": "readonly", "max_duration": 28800, "idle_limit": 1800, "policy": "dba-prod"},
                ],
            }
        ]
    )
    assert person("bob").call("GET", "/resources").json()["resources"] == []


# --- open ----------------------------------------------------------------------------------------------


def test_open_gives_the_target_and_a_credential_for_this_agent_only(granted, fleet):
    response = open_(fleet["dc1-a"], granted["session"])
    assert response.status_code == 200, response.content
    body = response.json()
    assert body["target"] == {
        "host": "10.0.0.5",
        "port": 5432,
        "tls": {"mode": "require"},
        "database": ["app", "stats"],
        "options": {},
    }
    assert (body["session"], body["part"], body["account"]) == (granted["session"], 1, "prod-db/readonly")
    assert (body["user"], body["protocol"], body["idle_limit"]) == ("alice", "postgres", 1800)
    assert body["session_end"] == granted["session_end"]
    assert (body["allow_replication"], body["budgets"]) == (False, {"rows_bytes": 16384})
    assert "password-of-ro" not in response.content.decode()
    box = b64decode(body["credential"])
    secret = json.loads(SealedBox(PrivateKey(fleet["dc1-a"].sealing)).decrypt(box))
    assert secret == {
        "session": granted["session"],
        "account": "prod-db/readonly",
        "agent": "dc1-a",
        "user": "app_ro",
        "password": "password-of-ro",
    }
    with pytest.raises(Exception, match="decrypt"):
        SealedBox(PrivateKey(fleet["dc1-b"].sealing)).decrypt(box)


def test_opening_is_audited_and_shown(alice, granted, fleet, audit_trail):
    open_(fleet["dc1-a"], granted["session"])
    actor, action, session, outcome, details = audit_trail()[-1]
    assert (actor, action, session, outcome) == ("agent dc1-a", "session.open", granted["session"], "ok")
    assert details["user"] == "alice"
    shown = alice.call("GET", f"/sessions/{granted['session']}").json()
    assert (shown["state"], shown["agent"], shown["recording"]) == ("active", "dc1-a", "partial")


def test_another_gateways_agent_cannot_open(granted, fleet, audit_trail):
    response = open_(fleet["dc2-a"], granted["session"])
    assert response.status_code == 403
    assert response.json()["detail"] == "there is no such session at this gateway"
    assert audit_trail()[-1][3] == "refused"
    assert Session.objects.get().agent is None


def test_a_grant_must_be_used_in_time(granted, fleet):
    age(Session, granted["session"], grant_expires=timezone.now())
    assert "not used in time" in open_(fleet["dc1-a"], granted["session"]).json()["detail"]


def test_an_open_session_may_be_opened_again_after_the_grants_expiry(granted, fleet):
    """The agent restarted: the same session goes on in a new part, until its end."""
    assert open_(fleet["dc1-a"], granted["session"]).json()["part"] == 1
    age(Session, granted["session"], grant_expires=timezone.now())
    assert open_(fleet["dc1-a"], granted["session"]).json()["part"] == 2
    age(Session, granted["session"], session_end=timezone.now())
    assert open_(fleet["dc1-a"], granted["session"]).status_code == 403


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda: ending.disable_user(User.objects.get(username="alice"), "test"), "over"),
        (lambda: User.objects.update(is_active=False), "disabled"),
        (lambda: Policy.objects.all().delete(), "policy does not allow"),
        (lambda: User.objects.get(username="alice").groups.clear(), "policy does not allow"),
        (lambda: Policy.objects.update(accounts=["prod-db/owner"]), "policy does not allow"),
        (lambda: ending.delete_gateway(Gateway.objects.get(name="dc1"), "test"), ""),
        (lambda: ending.revoke_agent(Agent.objects.get(name="dc1-a"), "test"), ""),
        (lambda: User.objects.get(username="alice").delete(), "disabled"),
    ],
    ids=[
        "disabled",
        "inactive",
        "policy gone",
        "left group",
        "narrowed",
        "gateway gone",
        "revoked",
        "deleted",
    ],
)
def test_open_decides_again(granted, fleet, change, reason):
    change()
    response = open_(fleet["dc1-a"], granted["session"])
    assert response.status_code in (401, 403)
    assert reason in response.json()["detail"]


def test_stricter_policy_shortens_a_session_and_looser_does_not_lengthen_it(granted, fleet):
    Policy.objects.update(max_duration=60, idle_limit=10)
    body = open_(fleet["dc1-a"], granted["session"]).json()
    assert body["session_end"] == granted["session_end"] - 8 * 3600 + 60
    assert body["idle_limit"] == 10
    Policy.objects.update(max_duration=7 * 24 * 3600, idle_limit=0)
    again = open_(fleet["dc1-a"], granted["session"]).json()
    assert (again["session_end"], again["idle_limit"]) == (body["session_end"], 10)


def test_a_session_belongs_to_one_living_agent(granted, fleet):
    assert open_(fleet["dc1-a"], granted["session"]).status_code == 200
    refused = open_(fleet["dc1-b"], granted["session"])
    assert refused.status_code == 409
    age(Agent, Agent.objects.get(name="dc1-a").pk, last_seen=timezone.now() - timedelta(seconds=61))
    taken = open_(fleet["dc1-b"], granted["session"])
    assert taken.status_code == 200
    assert taken.json()["part"] == 2
    late = fleet["dc1-a"].call(
        "POST", f"/agent/sessions/{granted['session']}/closed", {"part": 1, "reason": "x"}
    )
    assert late.status_code == 403
    assert Session.objects.get().state == "active"


def test_the_agent_reports_the_end(alice, granted, fleet):
    session = granted["session"]
    open_(fleet["dc1-a"], session)
    report = {"part": 1, "reason": "client closed", "connections": 2, "bytes_up": 10, "bytes_down": 20}
    for _ in range(2):  # repeated when the answer was lost
        assert fleet["dc1-a"].call("POST", f"/agent/sessions/{session}/closed", report).status_code == 200
    shown = alice.call("GET", f"/sessions/{session}").json()
    assert (shown["state"], shown["end_reason"], shown["connections"]) == ("ended", "client closed", 2)
    assert open_(fleet["dc1-a"], session).status_code == 403


def test_an_alarm_is_an_audit_event(granted, fleet):
    open_(fleet["dc1-a"], granted["session"])
    path = f"/agent/sessions/{granted['session']}/alarm"
    assert fleet["dc1-b"].call("POST", path, {"reason": "x"}).status_code == 403
    assert fleet["dc1-a"].call("POST", path, {"reason": "line\nfeed"}).status_code == 422
    assert fleet["dc1-a"].call("POST", path, {"reason": "another host key"}).status_code == 200
    event = AuditEvent.objects.filter(action="session.alarm", outcome="wrong target").get()
    assert (event.actor, event.object) == ("agent dc1-a", granted["session"])
    assert event.details["user"] == "alice"
    assert event.details["account"] == Session.objects.get().account_name
    assert event.details["reason"] == "another host key"


def test_nobody_elses_agent_reports_the_end(granted, fleet):
    open_(fleet["dc1-a"], granted["session"])
    report = {"part": 1, "reason": "x"}
    path = f"/agent/sessions/{granted['session']}/closed"
    assert fleet["dc1-b"].call("POST", path, report).status_code == 403
    assert Session.objects.get().state == "active"


# --- the end -------------------------------------------------------------------------------------------


def inbox_of(peer, after=-1):
    return peer.call("GET", "/agent/inbox", after=after).json()


def test_kill_reaches_agent_and_relay(alice, granted, fleet):
    session = granted["session"]
    open_(fleet["dc1-a"], session)
    cursor = inbox_of(fleet["dc1-a"])["cursor"]
    assert alice.call("POST", f"/sessions/{session}/kill", {"reason": "lunch"}).status_code == 200
    answer = inbox_of(fleet["dc1-a"], cursor)
    assert answer["messages"] == [
        {"id": cursor + 1, "kind": "kill", "session": session, "reason": "killed by alice: lunch"}
    ]
    assert inbox_of(fleet["dc1-a"], answer["cursor"])["messages"] == []
    # An agent that has lost its place hears of it again until it has closed the session.
    assert inbox_of(fleet["dc1-a"])["messages"] == answer["messages"]
    fleet["dc1-a"].call("POST", f"/agent/sessions/{session}/closed", {"part": 1, "reason": "killed"})
    assert inbox_of(fleet["dc1-a"])["messages"] == []
    bundle = fleet["r1"].call("GET", "/relay/bundle").json()["bundle"]
    assert session in claims(bundle)["revoked_sessions"]
    assert open_(fleet["dc1-a"], session).status_code == 403
    assert "killed by alice: lunch" in alice.call("GET", f"/sessions/{session}").json()["end_reason"]


def test_a_session_can_be_killed_before_its_first_opening(alice, granted, fleet):
    assert alice.call("POST", f"/sessions/{granted['session']}/kill").status_code == 200
    assert open_(fleet["dc1-a"], granted["session"]).status_code == 403
    assert alice.call("POST", f"/sessions/{granted['session']}/kill").status_code == 403


def test_who_may_kill(granted, fleet, person):
    path = f"/sessions/{granted['session']}/kill"
    assert person("bob").call("POST", path).status_code == 404
    assert person("eve", groups=["audit"], is_auditor=True).call("POST", path).status_code == 403
    assert person("mallory", is_auditor=True).call("POST", path).status_code == 404
    assert person("root", is_admin=True).call("POST", path).status_code == 200


def test_who_may_know_of_a_session(granted, fleet, person):
    path = f"/sessions/{granted['session']}"
    expected = {
        person("alice"): 200,
        person("bob"): 404,
        person("root", is_admin=True): 200,
        person("eve", groups=["audit"], is_auditor=True): 200,
        person("mallory", is_auditor=True): 404,
    }
    for somebody, status in expected.items():
        assert somebody.call("GET", path).status_code == status
        listed = somebody.call("GET", "/sessions").json()["sessions"]
        assert [row["id"] for row in listed] == ([granted["session"]] if status == 200 else [])
    answer = person("bob").call("GET", path).json()
    assert answer == {"detail": "no such session", "hint": "pam-client sessions ls lists yours"}


def test_the_client_ends_its_session(alice, granted, fleet, person):
    session = granted["session"]
    open_(fleet["dc1-a"], session)
    assert person("root", is_admin=True).call("POST", f"/sessions/{session}/end").status_code == 403
    for _ in range(2):
        assert alice.call("POST", f"/sessions/{session}/end").status_code == 200
    assert inbox_of(fleet["dc1-a"])["messages"][0]["kind"] == "end"
    assert Session.objects.get().killed is False


@pytest.mark.parametrize(
    "change",
    [
        lambda root, apply: root.call("POST", "/users/alice/disable"),
        lambda root, apply: root.call("DELETE", "/gateways/dc1"),
        lambda root, apply: root.call("POST", "/agents/dc1-a/revoke"),
        lambda root, apply: apply(
            lambda document: document["policies"][0].update(accounts=["prod-db/owner"])
        ),
        lambda root, apply: apply(lambda document: document["users"][0].update(groups=[])),
        lambda root, apply: apply(lambda document: document["resources"][0]["accounts"].pop(0), prune=True),
        lambda root, apply: apply(lambda document: document["policies"].pop(), prune=True),
        lambda root, apply: apply(lambda document: document["resources"][0].update(gateway="dc2")),
    ],
    ids=[
        "user disabled",
        "gateway deleted",
        "agent revoked",
        "narrowed",
        "left group",
        "account",
        "policy",
        "moved",
    ],
)
def test_a_session_does_not_outlive_its_right(alice, granted, fleet, person, apply, change):
    session = granted["session"]
    open_(fleet["dc1-a"], session)
    change(person("root", is_admin=True), apply)
    row = Session.objects.get(pk=session)
    assert (row.state, row.killed) == ("ended", True)
    kinds = list(row.agent.messages.values_list("kind", "session")) if row.agent else []
    assert ("kill", session) in kinds
    assert session in claims(fleet["r1"].call("GET", "/relay/bundle").json()["bundle"])["revoked_sessions"]


def test_disabling_a_user_ends_their_logins(alice, person):
    assert alice.call("GET", "/me").status_code == 200
    person("root", is_admin=True).call("POST", "/users/alice/disable")
    assert alice.call("GET", "/me").status_code == 401
    person("root").call("POST", "/users/alice/enable")
    assert alice.call("GET", "/me").status_code == 401  # enabled again: has to log in again
    assert person("alice").call("GET", "/me").status_code == 200


def test_an_admin_cannot_lock_themselves_out(fleet, person):
    assert person("root", is_admin=True).call("POST", "/users/root/disable").status_code == 403


def test_sessions_are_listed_by_state_and_page(alice, new_session):
    now, hour = timezone.now(), timedelta(hours=1)
    ids = {
        "granted": new_session(alice.user).pk,
        "expired": new_session(alice.user, granted=now - hour, grant_expires=now - hour).pk,
        "active": new_session(alice.user, granted=now - 2 * hour, state="active").pk,
        "ended": new_session(alice.user, granted=now - 3 * hour, state="ended", ended=now).pk,
    }
    overdue = new_session(alice.user, granted=now - 9 * hour, session_end=now - hour, state="active").pk

    def listed(**query):
        return [row["id"] for row in alice.call("GET", "/sessions", **query).json()["sessions"]]

    for state in ("granted", "expired", "active"):
        assert listed(state=state) == [ids[state]]
    assert listed(state="ended") == [ids["ended"], overdue]
    everything = [*ids.values(), overdue]
    assert listed(mine=1) == everything
    assert listed(limit=2) == everything[:2]
    assert listed(limit=10, before=everything[1]) == everything[2:]
    assert listed(before="s-nothing") == []


def test_sessions_of_one_second_are_listed_in_the_order_of_connecting(alice, granted):
    order = [granted["session"], *(alice.connect().json()["session"] for _ in range(5))]
    listed = alice.call("GET", "/sessions").json()["sessions"]
    assert [row["id"] for row in listed] == order[::-1]


def claims(token):
    import jwt

    return jwt.decode(token, options={"verify_signature": False})
