"""Enrolment, requests of agents and relays, what they are told."""

import threading
import time
from datetime import timedelta

import jwt
import pytest
from django.conf import settings
from django.db import DatabaseError, InterfaceError
from django.utils import timezone
from patience import Metronome

from pam_common import tokens
from pam_common.errors import RefusedError
from pam_common.keys import SigningKey, VerifyKeys, b64encode
from pam_common.ssh_certs import verify_host_certificate, verify_user_certificate
from pam_platform.access import ending
from pam_platform.fleet import inbox
from pam_platform.fleet.enrolment import create_token
from pam_platform.fleet.models import Agent, EnrolToken, Gateway, InboxMessage, Relay
from pam_platform.vault import keys


@pytest.fixture
def dc1(platform):
    return Gateway.objects.create(name="dc1")


@pytest.fixture
def agent(enrolled):
    return enrolled("agent", "dc1-a")


def claims(token):
    return jwt.decode(token, options={"verify_signature": False})


# --- enrolment -----------------------------------------------------------------------------------------


def test_an_agent_enrols_and_gets_all_it_needs(dc1, new_peer, audit_trail):
    token, _ = create_token("agent", "dc1-a", "dc1", actor="test")
    peer = new_peer("agent", "dc1-a")
    body = peer.enrol(token).json()
    now = time.time()
    assert (body["agent"], body["gateway"], body["issuer"]) == ("dc1-a", "dc1", settings.PAM_ISSUER)
    trust = claims(body["trust"])
    grant_keys = VerifyKeys.from_json(trust["grant_keys"])
    tokens.verify(body["trust"], grant_keys, tokens.TRUST, issuer=body["issuer"], audience="pam-trust")
    statement = tokens.AgentStatement.parse(
        body["statement"], grant_keys, issuer=body["issuer"], gateway="dc1", now=now
    )
    assert (statement.agent, statement.identity_key) == ("dc1-a", peer.identity.public)
    certificate = verify_user_certificate(
        body["certificate"], VerifyKeys.from_json(trust["relay_user_ca"]), now=now, principal="serve:dc1"
    )
    assert (certificate.key_id, certificate.public_key) == ("dc1-a", peer.identity.public)
    assert certificate.principals == ("serve:dc1",)
    assert body["recording_recipients"] == trust["recording_keys"]
    assert audit_trail()[-1][:4] == ("agent dc1-a", "enrol", "agent dc1-a", "ok")


def test_a_relay_enrols_and_gets_its_host_certificate(enrolled, new_peer, platform):
    relay = enrolled("relay", "r1")
    body = relay.call("GET", "/relay/bundle").json()
    trust, bundle = claims(body["trust"]), claims(body["bundle"])
    assert bundle["aud"] == "relay:r1"
    for hostname in ("relay.example.com", "r1"):
        certificate = verify_host_certificate(
            bundle["host_certificate"],
            VerifyKeys.from_json(trust["relay_host_ca"]),
            hostname=hostname,
            now=time.time(),
        )
        assert certificate.public_key == relay.host.public
    later = claims(relay.call("GET", "/relay/bundle").json()["bundle"])
    assert later["serial"] > bundle["serial"]


def test_a_lost_answer_can_be_asked_for_again_with_the_same_keys_only(dc1, new_peer):
    token, _ = create_token("agent", "dc1-a", "dc1", actor="test")
    peer, thief = new_peer("agent", "dc1-a"), new_peer("agent", "dc1-a")
    assert peer.enrol(token).status_code == 200
    assert peer.enrol(token).status_code == 200
    refused = thief.enrol(token)
    assert refused.status_code == 403
    assert "used already" in refused.json()["detail"]
    swapped = peer.enrol(token, sealing_key=thief.public()["sealing_key"])
    assert swapped.status_code == 403
    assert Agent.objects.get().sealing_key == peer.public()["sealing_key"]


def test_an_expired_token_enrols_nobody_not_even_again(dc1, new_peer):
    token, expires = create_token("agent", "dc1-a", "dc1", actor="test")
    assert timedelta(minutes=59) < expires - timezone.now() <= timedelta(hours=1)
    peer = new_peer("agent", "dc1-a")
    peer.enrol(token)
    EnrolToken.objects.update(expires=timezone.now())
    assert peer.enrol(token).status_code == 403


def test_a_token_is_for_one_kind_and_name(dc1, new_peer):
    Relay.objects.create(name="r1", host="relay", port=2222)
    token, _ = create_token("agent", "dc1-a", "dc1", actor="test")
    assert new_peer("agent", "dc1-b").enrol(token).status_code == 403
    assert new_peer("relay", "r1").enrol(token).status_code == 403
    assert new_peer("agent", "dc1-a").enrol("x" * 43).status_code == 403
    assert new_peer("agent", "dc1-a").enrol("").status_code == 422
    assert new_peer("agent", "dc1-a").enrol(token).status_code == 200


def test_only_the_hash_of_a_token_is_stored(dc1):
    token, _ = create_token("agent", "dc1-a", "dc1", actor="test")
    assert token not in str(EnrolToken.objects.values())


def test_who_enrols_must_hold_the_identity_key(dc1, new_peer):
    token, _ = create_token("agent", "dc1-a", "dc1", actor="test")
    peer = new_peer("agent", "dc1-a")
    stolen = b64encode(SigningKey.generate().public)
    assert peer.enrol(token, identity_key=stolen).status_code == 401
    body = {"token": token, "name": peer.name, **peer.public()}
    for proof in (
        peer.token(),  # for another audience
        peer.token(aud="pam-enrol", typ=tokens.RELAY_REQUEST),
        peer.token(aud="pam-enrol", iss="dc1-b"),
        peer.token(aud="pam-enrol", lifetime=3600),
        peer.token(aud="pam-enrol", now=time.time() - 100),
    ):
        assert peer.call("POST", "/agent/enrol", body, token=proof).status_code == 401
    assert not Agent.objects.exists()


def test_one_identity_is_one_agent(dc1, new_peer):
    peer = new_peer("agent", "dc1-a")
    peer.enrol(create_token("agent", "dc1-a", "dc1", actor="test")[0])
    token, _ = create_token("agent", "dc1-b", "dc1", actor="test")
    peer.name = "dc1-b"
    refused = peer.enrol(token)
    assert refused.status_code == 403
    assert "under another name" in refused.json()["detail"]


def test_a_name_in_use_or_just_revoked_gets_no_token(agent):
    with pytest.raises(RefusedError, match="enrolled already"):
        create_token("agent", "dc1-a", "dc1", actor="test")
    ending.revoke_agent(Agent.objects.get(), "test")
    # Its certificate is valid for a day, under that name.
    with pytest.raises(RefusedError, match="its certificates end by"):
        create_token("agent", "dc1-a", "dc1", actor="test")
    Agent.objects.update(revoked=timezone.now() - timedelta(hours=25))
    assert create_token("agent", "dc1-a", "dc1", actor="test")


@pytest.mark.parametrize(
    ("kind", "name", "gateway", "reason"),
    [
        ("agent", "dc1-a", None, "no gateway"),
        ("agent", "dc1-a", "dc9", "no gateway"),
        ("agent", "Dc1", "dc1", "not a name"),
        ("agent", "a; rm -rf /", "dc1", "not a name"),
        ("relay", "r9", None, "no relay"),
        ("relay", "r1", "dc1", "every gateway"),
    ],
)
def test_tokens_are_made_for_what_can_enrol(dc1, kind, name, gateway, reason):
    with pytest.raises(RefusedError, match=reason):
        create_token(kind, name, gateway, actor="test")


# --- requests ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spoil",
    [
        {"aud": "https://elsewhere.example.com"},
        {"typ": tokens.RELAY_REQUEST},
        {"typ": "JWT"},
        {"lifetime": 61},
        {"now": -61},
        {"iss": "dc1-b"},
        {"sub": "dc1-b"},
        {"key": SigningKey.generate()},
    ],
    ids=lambda spoil: next(iter(spoil)) + str(next(iter(spoil.values())))[:8],
)
def test_a_request_counts_only_as_signed(agent, spoil):
    if "now" in spoil:
        spoil = {"now": time.time() + spoil["now"]}
    assert agent.call("POST", "/agent/renew", token=agent.token(**spoil)).status_code == 401
    assert agent.call("POST", "/agent/renew").status_code == 200


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer x", "Basic eDp5", "Bearer a.b.c", "Bearer " + "a" * 9000]
)
def test_noise_is_no_agent(agent, client, header):
    response = client.post("/api/v1/agent/renew", headers={"Authorization": header} if header else {})
    assert response.status_code == 401
    assert response["WWW-Authenticate"] == "Bearer"


@pytest.fixture
def client():
    from django.test import Client

    return Client()


def test_agents_relays_and_people_do_not_pass_for_each_other(agent, enrolled, person):
    relay, root = enrolled("relay", "r1"), person("root", is_admin=True)
    paths = {agent: "/agent/inbox", relay: "/relay/bundle", root: "/me"}
    for caller in paths:
        for owner, path in paths.items():
            assert caller.call("GET", path).status_code == (200 if owner is caller else 401)


def test_a_revoked_agent_and_relay_are_refused_everywhere(agent, enrolled, person):
    relay, root = enrolled("relay", "r1"), person("root", is_admin=True)
    assert root.call("POST", "/agents/dc1-a/revoke").status_code == 200
    assert root.call("POST", "/relays/r1/revoke").status_code == 200
    assert agent.call("POST", "/agent/renew").status_code == 401
    assert agent.call("GET", "/agent/inbox").status_code == 401
    assert relay.call("GET", "/relay/bundle").status_code == 401
    other = enrolled("relay", "r2")
    bundle = claims(other.call("GET", "/relay/bundle").json()["bundle"])
    assert bundle["revoked_agents"] == ["dc1-a"]


def test_a_bundle_is_sent_once_until_something_changes(enrolled, agent, monkeypatch):
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)  # a new period, every six hours, is a change as well
    relay = enrolled("relay", "r1")
    first = relay.call("GET", "/relay/bundle")

    def again():
        return relay._client.get(
            "/api/v1/relay/bundle",
            headers={"Authorization": f"Bearer {relay.token()}", "If-None-Match": first["ETag"]},
        )

    assert again().status_code == 304
    ending.revoke_agent(Agent.objects.get(), "test")
    assert again().status_code == 200


def test_agents_hear_of_changes_to_relays(agent, enrolled, apply, person):
    def heard():
        cursor = heard.cursor
        answer = poll(agent, cursor)
        heard.cursor = answer["cursor"]
        return [message["kind"] for message in answer["messages"]]

    heard.cursor = 0
    enrolled("relay", "r1")
    assert heard() == ["reload"]
    apply(lambda file: file["relays"][0].update(port=2200))
    assert heard() == ["reload"]
    apply(lambda file: file["relays"][0].update(port=2200))
    assert heard() == []
    person("root", is_admin=True).call("POST", "/relays/r1/revoke")
    assert heard() == ["reload"]


# --- the inbox -----------------------------------------------------------------------------------------


def poll(agent, after, wait=0):
    response = agent.call("GET", "/agent/inbox", after=after, wait=wait)
    assert response.status_code == 200, response.content
    return response.json()


def test_messages_are_numbered_and_come_once(agent):
    row = Agent.objects.get()
    assert poll(agent, -1) == {"cursor": 0, "messages": [], "retry_ms": 0}
    inbox.post(row, "reload")
    inbox.post(row, "reload")
    assert [message["id"] for message in poll(agent, 0)["messages"]] == [1, 2]
    assert poll(agent, 1) == {"cursor": 2, "messages": [{"id": 2, "kind": "reload"}], "retry_ms": 0}


def test_a_cursor_from_another_life_starts_anew(agent):
    assert poll(agent, 99)["cursor"] == 0


@pytest.mark.parametrize(
    "query", [{"after": -2}, {"after": "x"}, {"wait": 26}, {"wait": -1}, {"wait": "nan"}]
)
def test_an_impossible_poll_is_refused(agent, query):
    assert agent.call("GET", "/agent/inbox", **query).status_code == 422


def test_many_messages_come_in_pages(agent, monkeypatch):
    monkeypatch.setattr(inbox, "MAX_MESSAGES", 3)
    for _ in range(5):
        inbox.post(Agent.objects.get(), "reload")
    first = poll(agent, 0)
    assert (len(first["messages"]), first["cursor"]) == (3, 3)
    assert poll(agent, 3)["cursor"] == 5


def test_messages_are_forgotten_when_nothing_they_concern_can_run(agent):
    inbox.post(Agent.objects.get(), "reload")
    InboxMessage.objects.update(created=timezone.now() - timedelta(days=31))
    inbox.post(Agent.objects.get(), "reload")
    assert InboxMessage.objects.count() == 1
    assert poll(agent, 0)["cursor"] == 2


class Poll(threading.Thread):
    """A long poll in a thread; ``answer`` is its response."""

    def __init__(self, agent, after, wait=20):
        super().__init__(daemon=True)
        self._ask = lambda: agent.call("GET", "/agent/inbox", after=after, wait=wait)
        self.start()

    def run(self):
        from django.db import connection

        self.answer = self._ask()
        self.seconds = time.monotonic()
        connection.close()

    def waits(self):
        deadline = time.monotonic() + 60
        while not inbox.waiting()._waiters:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return self


def hears_within_a_second(agent):
    asked = Poll(agent, 0).waits()
    with Metronome() as beat:
        sent = time.monotonic()
        inbox.post(Agent.objects.get(), "kill", "s-" + "a" * 26, reason="x")
        asked.join(60)
        lost = beat.lost()
    assert asked.answer.json()["messages"][0]["kind"] == "kill"
    assert asked.seconds - sent - lost < 1


def test_a_waiting_poll_hears_within_a_second(agent):
    hears_within_a_second(agent)


def test_a_waiting_poll_ends_when_its_agent_is_revoked(agent):
    asked = Poll(agent, 0).waits()
    ending.revoke_agent(Agent.objects.get(), "test")
    asked.join(60)
    assert asked.answer.status_code == 401


def test_a_poll_without_news_ends_in_time(agent):
    with Metronome() as beat:
        began = time.monotonic()
        assert poll(agent, 0, wait=0.5) == {"cursor": 0, "messages": [], "retry_ms": 0}
        seconds = time.monotonic() - began
        assert seconds > 0.4
        assert seconds - beat.lost() < 2


def test_waiting_is_bounded_and_who_may_not_wait_comes_back_soon(agent, enrolled, monkeypatch):
    monkeypatch.setattr(inbox, "_waiting", inbox.Waiting(1))
    asked = Poll(agent, 0).waits()
    second = enrolled("agent", "dc1-b")
    with Metronome() as beat:
        began = time.monotonic()
        assert poll(second, 0, wait=20)["retry_ms"] == 500
        assert time.monotonic() - began - beat.lost() < 1
    inbox.stop_waiting()
    asked.join(60)
    assert asked.answer.json()["messages"] == []


def test_a_stopping_worker_lets_everybody_go(agent):
    asked = Poll(agent, 0).waits()
    inbox.stop_waiting()
    asked.join(60)
    assert asked.answer.status_code == 200
    assert poll(agent, 0, wait=20)["retry_ms"] == 500


def test_a_workers_first_poll_does_not_wait_when_the_worker_ends_already(agent):
    inbox.stop_waiting()
    assert poll(agent, 0, wait=20)["retry_ms"] == 500


def test_the_watcher_ends_with_the_last_who_waits_and_starts_again(agent):
    for number in range(2):
        asked = Poll(agent, number).waits()
        inbox.post(Agent.objects.get(), "reload")
        asked.join(60)
        deadline = time.monotonic() + 60
        while any(thread.name == "inbox-watch" for thread in threading.enumerate()):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_without_a_watcher_nobody_waits_and_the_next_poll_has_one(agent, monkeypatch):
    start = threading.Thread.start

    def fails(thread):
        if thread.name == "inbox-watch":
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fails)
        assert poll(agent, 0, wait=20)["retry_ms"] == 500
    assert inbox.waiting()._waiters == []
    hears_within_a_second(agent)


@pytest.mark.parametrize("error", [DatabaseError, InterfaceError, MemoryError])
def test_the_watcher_outlives_a_look_that_fails(agent, monkeypatch, error):
    looks = []

    def fails_once():
        looks.append(1)
        if len(looks) == 1:
            raise error("gone")

    monkeypatch.setattr(inbox, "close_old_connections", fails_once)
    hears_within_a_second(agent)
    assert len(looks) > 1


# --- keys ----------------------------------------------------------------------------------------------


def test_a_rotated_grant_key_is_trusted_before_it_signs_and_after(agent):
    old = claims(agent.call("POST", "/agent/renew").json()["trust"])
    following = keys.rotate(keys.GRANT)
    renewed = agent.call("POST", "/agent/renew").json()
    trusted = VerifyKeys.from_json(claims(renewed["trust"])["grant_keys"])
    assert jwt.get_unverified_header(renewed["trust"])["kid"] == old["grant_keys"][0]["kid"]
    keys.rotate(keys.GRANT, at_once=True)
    newest = agent.call("POST", "/agent/renew").json()
    assert jwt.get_unverified_header(newest["trust"])["kid"] == following.kid
    tokens.verify(newest["trust"], trusted, tokens.TRUST, issuer=settings.PAM_ISSUER, audience="pam-trust")
    assert old["grant_keys"][0] in claims(newest["trust"])["grant_keys"]
