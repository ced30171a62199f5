"""The recording endpoints: who may write, who may look, and that every look is on record."""

import json

import pytest
from django.test import Client as Browser
from nacl.bindings import crypto_scalarmult_base

from pam_common import tokens
from pam_common.keys import SigningKey, b64encode, key_id
from pam_common.recording import PartWriter, Recipient
from pam_platform.accounts.models import Group, User
from pam_platform.recordings import receipts, uploads

IDENTITY = SigningKey(b"i" * 32)
OTHER = SigningKey(b"o" * 32)
PASSWORD = "correct horse battery"


@pytest.fixture
def agents(db):
    """Two enrolled agents, dc1-a and dc1-b, of the gateway dc1."""
    from django.utils import timezone

    from pam_platform.fleet.models import Agent, Gateway

    gateway = Gateway.objects.create(name="dc1")
    for name, identity in (("dc1-a", IDENTITY), ("dc1-b", OTHER)):
        Agent.objects.create(
            name=name,
            gateway=gateway,
            gateway_name="dc1",
            identity_key=b64encode(identity.public),
            identity_kid=identity.kid,
            noise_key="n" * 43,
            sealing_key="s" * 43,
            enrolled=timezone.now(),
            last_seen=timezone.now(),
        )


@pytest.fixture
def part(agents, new_session):
    return uploads.begin_part(new_session().pk, "dc1-a", b64encode(IDENTITY.public))


@pytest.fixture
def recorded(part, recording_key):
    """The bytes and the final head of a small recording."""
    public = crypto_scalarmult_base(recording_key)
    writer = PartWriter(
        session=part.session_id,
        part=part.number,
        agent="dc1-a",
        identity_kid=IDENTITY.kid,
        created=1_700_000_000,
        recipients=[Recipient.from_json({"kid": key_id(public), "key": b64encode(public)})],
        statement="statement",
    )
    data = writer.opening + writer.append(0.5, 1, [{"kind": "query", "sql": "select '\x1b[2J<script>'"}])
    data += writer.finish()
    head = writer.head(1_700_000_009, "client closed").sign(IDENTITY)
    return data + head.to_trailer(IDENTITY.kid), head


@pytest.fixture
def as_agent(settings):
    """Requests of an agent, signed as an agent signs them."""
    from django.conf import settings as django_settings

    def request(
        method, path, data=b"", *, name="dc1-a", identity=IDENTITY, content_type="application/octet-stream"
    ):
        claims = {"iss": name, "sub": name, "aud": django_settings.PAM_ISSUER, "jti": "j" * 22}
        token = tokens.sign(identity, tokens.AGENT_REQUEST, claims, lifetime=60)
        return Browser().generic(
            method, f"/api/v1{path}", data, content_type, headers={"Authorization": f"Bearer {token}"}
        )

    return request


def upload(as_agent, part, recorded):
    data, head = recorded
    path = f"/agent/recordings/{part.session_id}/{part.number}"
    assert as_agent("PUT", f"{path}?offset=0", data[:200]).json() == {"received": 200}
    assert as_agent("PUT", f"{path}?offset=200", data[200:]).json() == {"received": len(data)}
    return as_agent("POST", f"{path}/head", json.dumps(head.to_json()), content_type="application/json")


def test_an_agent_uploads_a_recording(as_agent, part, recorded):
    path = f"/agent/recordings/{part.session_id}/1"
    assert as_agent("GET", path).json() == {"received": 0, "complete": False}
    answer = upload(as_agent, part, recorded)
    assert (answer.status_code, answer.json()) == (200, {"complete": True})
    assert as_agent("GET", path).json() == {"received": len(recorded[0]), "complete": True}


def test_a_wrong_offset_is_a_conflict_that_tells_how_far(as_agent, part):
    path = f"/agent/recordings/{part.session_id}/1"
    as_agent("PUT", f"{path}?offset=0", b"abc")
    answer = as_agent("PUT", f"{path}?offset=7", b"x")
    assert (answer.status_code, answer.json()["received"]) == (409, 3)


def test_another_agent_of_the_gateway_is_refused(as_agent, part):
    path = f"/agent/recordings/{part.session_id}/1"
    for method, target in (("PUT", f"{path}?offset=0"), ("GET", path)):
        assert as_agent(method, target, b"x", name="dc1-b", identity=OTHER).status_code == 403
    assert as_agent("GET", path, name="dc1-a", identity=OTHER).status_code == 401
    assert Browser().get(f"/api/v1{path}").status_code == 401


@pytest.mark.parametrize("size", [0, 4 * 1024 * 1024 + 1])
def test_a_request_carries_a_bounded_piece(as_agent, part, size):
    answer = as_agent("PUT", f"/agent/recordings/{part.session_id}/1?offset=0", b"x" * size)
    assert answer.status_code == 403
    assert uploads.received(part) == 0


def test_the_largest_piece_is_taken(as_agent, part):
    answer = as_agent("PUT", f"/agent/recordings/{part.session_id}/1?offset=0", b"x" * 4 * 1024 * 1024)
    assert answer.json() == {"received": 4 * 1024 * 1024}


@pytest.mark.parametrize("session", ["s-" + "A" * 26, "..%2f..%2fetc", "s-short", "s-" + "a" * 27])
def test_odd_ids_are_no_parts(as_agent, agents, session):
    answer = as_agent("PUT", f"/agent/recordings/{session}/1?offset=0", b"x")
    assert answer.status_code in (400, 404, 422)


def test_a_head_with_a_wrong_signature_is_refused(as_agent, part, recorded):
    _, head = recorded
    body = {**head.to_json(), "signature": b64encode(bytes(64)), "final": False, "end": None}
    path = f"/agent/recordings/{part.session_id}/1/head"
    assert as_agent("POST", path, json.dumps(body), content_type="application/json").status_code == 403


@pytest.fixture
def browser(db):
    """A browser logged in as the user of that name, made with these fields when missing."""

    def log_in(name, groups=(), **fields):
        user = User.objects.filter(username=name).first() or User.objects.create_user(
            name, PASSWORD, **fields
        )
        user.set_password(PASSWORD)
        user.save()
        user.groups.set([Group.objects.get_or_create(name=group)[0] for group in groups])
        session = Browser()
        session.post("/accounts/login/", {"login": name, "password": PASSWORD})
        return session

    return log_in


@pytest.fixture
def complete(as_agent, part, recorded):
    assert upload(as_agent, part, recorded).json() == {"complete": True}
    return part


def test_the_owner_sees_events_verdict_and_file(browser, complete, recorded):
    alice = browser("alice")
    base = f"/api/v1/sessions/{complete.session_id}"
    events = b"".join(alice.get(f"{base}/events").streaming_content)
    assert json.loads(events)["sql"] == "select '\x1b[2J<script>'"
    assert b"\x1b" not in events
    verdict = alice.get(f"{base}/verify").json()
    assert verdict["ok"]
    assert verdict["parts"][0] == {
        "part": 1,
        "ok": True,
        "problems": [],
        "end": "client closed",
        "chunks": 2,
        "bytes": len(recorded[0]),
    }
    assert b"".join(alice.get(f"{base}/parts/1/raw").streaming_content) == recorded[0]


@pytest.mark.parametrize(
    ("name", "groups", "roles", "status"),
    [
        ("bob", [], {}, 404),
        ("bob", ["dba"], {}, 404),
        ("root", [], {"is_admin": True}, 403),
        ("audrey", [], {"is_auditor": True}, 404),
        ("audrey", ["audit"], {"is_auditor": True}, 200),
        ("mallory", ["audit"], {}, 404),
        ("boss", ["audit"], {"is_admin": True, "is_auditor": True}, 200),
    ],
)
def test_policy_decides_who_else_sees_it(browser, complete, name, groups, roles, status):
    complete.session.review_groups = ["audit"]
    complete.session.save()
    session = browser(name, groups, **roles)
    for what in ("events", "verify", "parts/1/raw"):
        assert session.get(f"/api/v1/sessions/{complete.session_id}/{what}").status_code == status


def test_nobody_else_sees_anything(complete):
    for what in ("events", "verify", "parts/1/raw"):
        assert Browser().get(f"/api/v1/sessions/{complete.session_id}/{what}").status_code == 401


def test_every_look_is_on_record(browser, complete, audit_trail):
    alice, root = browser("alice"), browser("root", is_admin=True)
    base = f"/api/v1/sessions/{complete.session_id}"
    alice.get(f"{base}/events")
    alice.get(f"{base}/parts/1/raw")
    root.get(f"{base}/verify")
    looks = [entry for entry in audit_trail() if entry[1] == "recording.view"]
    assert looks == [
        ("alice", "recording.view", complete.session_id, "ok", {"what": "events"}),
        ("alice", "recording.view", complete.session_id, "ok", {"what": "raw", "part": 1}),
        ("root", "recording.view", complete.session_id, "refused", {"what": "verify"}),
    ]


def test_a_session_in_which_nothing_was_recorded_is_no_alarm(browser, new_session):
    session = new_session()
    verdict = browser("alice").get(f"/api/v1/sessions/{session.pk}/verify").json()
    assert verdict == {"ok": True, "parts": []}


LOST = {"ok": False, "problems": ["the recording is lost"], "end": None, "chunks": 0, "bytes": 0}


def test_a_part_that_an_agent_began_and_nobody_has_any_more_is_an_alarm(browser, complete, new_session):
    """Abuse case 18: what was recorded and is gone is not what was never recorded."""
    alice = browser("alice")
    gone = new_session(part=1)
    verdict = alice.get(f"/api/v1/sessions/{gone.pk}/verify").json()
    assert verdict == {"ok": False, "parts": [{"part": 1, **LOST}]}
    complete.session.part = 2
    complete.session.save()
    verdict = alice.get(f"/api/v1/sessions/{complete.session_id}/verify").json()
    assert not verdict["ok"]
    assert [part["ok"] for part in verdict["parts"]] == [True, False]
    assert verdict["parts"][1] == {"part": 2, **LOST}


def test_a_recording_that_a_restored_platform_never_knew_is_an_alarm(browser, agents, new_session):
    """Its session is as in the backup: not opened yet. The agent that recorded it has told of the loss."""
    restored, other = new_session(), new_session()
    told = [receipts.Receipt(restored.pk, number, "h" * 43) for number in (1, 2)]
    assert receipts.find_lost("dc1-a", told) == told
    alice = browser("alice")
    verdict = alice.get(f"/api/v1/sessions/{restored.pk}/verify").json()
    assert verdict == {"ok": False, "parts": [{"part": 1, **LOST}, {"part": 2, **LOST}]}
    assert alice.get(f"/api/v1/sessions/{other.pk}/verify").json()["ok"]


def test_a_damaged_recording_gives_what_can_be_read_and_says_so(browser, complete):
    from pathlib import Path

    from pam_platform.recordings.store import PartStore

    store = PartStore()
    path = Path(store.path(store.name_of(complete.session_id, 1)))
    path.write_bytes(path.read_bytes()[:-50])
    alice = browser("alice")
    lines = b"".join(
        alice.get(f"/api/v1/sessions/{complete.session_id}/events").streaming_content
    ).splitlines()
    assert json.loads(lines[0])["kind"] == "query"
    assert json.loads(lines[-1])["kind"] == "problem"
    assert not alice.get(f"/api/v1/sessions/{complete.session_id}/verify").json()["ok"]


def test_an_auditor_lists_sessions_without_a_query_for_each(browser, new_session):
    from django.db import connection
    from django.test.utils import CaptureQueriesContext

    for groups in (["audit"], ["other"], []):
        for _ in range(10):
            new_session(review_groups=groups)
    audrey = browser("audrey", ["audit"], is_auditor=True)
    with CaptureQueriesContext(
        connection,
    ) as queries:
        listed = audrey.get("/api/v1/sessions").json()["sessions"]
    assert len(listed) == 20
    assert len(queries) < 12


def test_a_body_that_does_not_arrive_is_worth_another_try(as_agent, part, monkeypatch):
    from django.core.handlers.wsgi import WSGIRequest

    def broken(self, *args):
        raise OSError(11, "timed out")

    monkeypatch.setattr(WSGIRequest, "read", broken)
    path = f"/agent/recordings/{part.session_id}/1?offset=0"
    assert as_agent("PUT", path, b"abc").status_code == 503
    assert uploads.received(part) == 0
