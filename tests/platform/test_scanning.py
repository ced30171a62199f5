"""Host keys by a scan: asked of one agent, answered once, pinned by an administrator only."""

import json
from datetime import timedelta

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from django.utils import timezone

from pam_common.errors import PamError, RefusedError
from pam_platform.access import scanning
from pam_platform.access.errors import ConflictError
from pam_platform.access.hostkeys import fingerprint, line_of
from pam_platform.access.models import HostKeyScan, Resource
from pam_platform.commands import resources as command
from pam_platform.fleet.models import Agent
from pam_platform.vault import keys as platform_keys

KEY, OTHER = (
    line_of(Ed25519PrivateKey.from_private_bytes(seed * 32).public_key().public_bytes_raw())
    for seed in (b"k", b"o")
)


def web(document, **ssh):
    document["resources"].append(
        {
            "name": "web-01",
            "protocol": "ssh",
            "gateway": "dc1",
            "host": "10.0.0.7",
            "port": 22,
            "ssh": ssh,
            "accounts": [{"name": "deploy", "password": {"file": "ro"}}],
        }
    )


@pytest.fixture
def server(fleet, apply):
    apply(web)
    return Resource.objects.select_related("gateway").get(name="web-01")


def report(peer, scan, keys=(KEY,), error=""):
    return peer.call("POST", f"/agent/scans/{scan}", {"keys": list(keys), "error": error})


def test_an_agent_is_asked_and_its_answer_accepted(server, fleet, audit_trail):
    cursor = fleet["dc1-a"].call("GET", "/agent/inbox").json()["cursor"]
    scan = scanning.begin(server, "operator", "dc1-a")
    answer = fleet["dc1-a"].call("GET", "/agent/inbox", after=cursor).json()
    message = {"kind": "scan", "scan": scan.pk, "host": "10.0.0.7", "port": 22}
    assert [{**one, "id": 0} for one in answer["messages"]] == [{**message, "id": 0}]
    assert report(fleet["dc1-a"], scan.pk, [KEY + " comment", OTHER]).status_code == 200
    scan.refresh_from_db()
    assert scan.keys == sorted([KEY, OTHER])
    server.refresh_from_db()
    assert server.scanned_keys == [], "an answer alone pins nothing"
    assert scanning.accept(scan, [fingerprint(KEY)], "operator") == [KEY]
    server.refresh_from_db()
    assert server.scanned_keys == [KEY]
    assert [row[1] for row in audit_trail()[-3:]] == ["resource.scan", "resource.scanned", "resource.pin"]
    assert audit_trail()[-1][4]["fingerprints"] == [fingerprint(KEY)]


def test_only_the_asked_agent_answers_and_only_once(server, fleet, audit_trail):
    scan = scanning.begin(server, "operator", "dc1-a")
    for peer in ("dc1-b", "dc2-a"):
        assert report(fleet[peer], scan.pk).status_code == 403
        assert audit_trail()[-1][3] == "refused"
    assert report(fleet["dc1-a"], scan.pk).status_code == 200
    assert report(fleet["dc1-a"], scan.pk, [OTHER]).status_code == 200
    scan.refresh_from_db()
    assert scan.keys == [KEY]


def test_a_scan_that_is_too_old_is_neither_answered_nor_accepted(server, fleet):
    scan = scanning.begin(server, "operator", "dc1-a")
    assert report(fleet["dc1-a"], scan.pk).status_code == 200
    old = timezone.now() - scanning.SCAN_LIFETIME - timedelta(seconds=1)
    HostKeyScan.objects.update(requested=old)
    scan.refresh_from_db()
    with pytest.raises(ConflictError, match="too old"):
        scanning.accept(scan, [fingerprint(KEY)], "operator")
    HostKeyScan.objects.update(answered=None)
    assert report(fleet["dc1-a"], scan.pk).status_code == 403


def test_keys_of_another_place_are_not_accepted(server, fleet):
    scan = scanning.begin(server, "operator", "dc1-a")
    report(fleet["dc1-a"], scan.pk)
    scan.refresh_from_db()
    Resource.objects.filter(pk=server.pk).update(host="10.0.0.8")
    with pytest.raises(ConflictError, match="another place"):
        scanning.accept(scan, [fingerprint(KEY)], "operator")


def test_a_key_that_was_not_shown_is_not_accepted(server, fleet):
    scan = scanning.begin(server, "operator", "dc1-a")
    report(fleet["dc1-a"], scan.pk)
    scan.refresh_from_db()
    for wanted in ([fingerprint(OTHER)], [fingerprint(KEY), fingerprint(OTHER)], []):
        with pytest.raises(PamError, match="does not show"):
            scanning.accept(scan, wanted, "operator")
    server.refresh_from_db()
    assert server.scanned_keys == []


@pytest.mark.parametrize(
    ("keys", "error", "status"),
    [
        ([KEY] * (scanning.MAX_SCANNED_KEYS + 1), "", 422),
        (["x" * 5000], "", 422),
        (["a\nb"], "", 422),
        ([], "x" * 301, 422),
        ([], "a\x1b[2Jb", 422),
        (["ssh-ed25519 AAAA"], "", 200),
    ],
)
def test_an_answer_is_checked(server, fleet, keys, error, status):
    scan = scanning.begin(server, "operator", "dc1-a")
    assert report(fleet["dc1-a"], scan.pk, keys, error).status_code == status
    scan.refresh_from_db()
    assert scan.keys == []
    if status == 200:
        assert "sent what is no key" in scan.error


def test_what_cannot_be_scanned(server, fleet, apply):
    with pytest.raises(RefusedError, match="not an SSH server"):
        scanning.begin(Resource.objects.get(name="prod-db"), "operator")
    with pytest.raises(ConflictError, match="agent dc2-a of gateway dc1 is not running"):
        scanning.begin(server, "operator", "dc2-a")
    Agent.objects.update(last_seen=timezone.now() - timedelta(hours=1))
    with pytest.raises(ConflictError, match="no agent of gateway dc1 is running"):
        scanning.begin(server, "operator")
    apply(lambda document: web(document, host_keys=[KEY]))
    with pytest.raises(RefusedError, match="says which keys"):
        scanning.begin(Resource.objects.get(name="web-01"), "operator")
    jump = {"host": "10.0.0.2", "user": "hop", "host_keys": [KEY], "password": {"file": "ro"}}
    apply(lambda document: web(document, jump=jump))
    with pytest.raises(RefusedError, match="behind a jump host"):
        scanning.begin(Resource.objects.get(name="web-01"), "operator")


# --- the command ---------------------------------------------------------------------------------------


@pytest.fixture
def run(server, fleet, monkeypatch):
    """``pam-platform resource …``; the agent answers when the command begins to wait, with ``keys``."""

    def do(*words, keys=(KEY, OTHER), error="", **options):
        def answered(scan, _seconds):
            assert report(fleet[scan.agent.name], scan.pk, keys, error).status_code == 200
            scan.refresh_from_db()

        monkeypatch.setattr(command, "start", lambda: None)
        monkeypatch.setattr(command, "_await", answered)
        return CliRunner().invoke(command.resource, words, **options)

    return do


def test_fingerprints_that_are_named_are_pinned(run, server):
    done = run("scan", "web-01", "--accept", fingerprint(KEY))
    assert done.exit_code == 0, done.output
    assert fingerprint(OTHER) in done.output
    assert "1 host key of web-01 pinned" in done.output
    server.refresh_from_db()
    assert server.scanned_keys == [KEY]
    done = run("scan", "web-01", keys=[OTHER])
    assert "pinned, but NOT SHOWN" in done.output
    assert "nothing is pinned" in done.output
    server.refresh_from_db()
    assert server.scanned_keys == [KEY]


@pytest.mark.parametrize(("said", "pinned"), [("y\n", sorted([KEY, OTHER])), ("n\n", []), ("\n", [])])
def test_a_person_is_asked(run, server, monkeypatch, said, pinned):
    monkeypatch.setattr(command.sys, "stdin", None, raising=False)

    class Terminal:
        def isatty(self):
            return True

    # click's runner replaces stdin; what is asked is whether it is a terminal.
    monkeypatch.setattr(command, "sys", type("sys", (), {"stdin": Terminal()}))
    done = run("scan", "web-01", input=said)
    assert "are these its keys?" in done.output
    server.refresh_from_db()
    assert server.scanned_keys == pinned


def test_json_pins_nothing_by_itself(run, server):
    shown = json.loads(run("scan", "web-01", "--json").output)
    assert {key["fingerprint"] for key in shown["keys"]} == {fingerprint(KEY), fingerprint(OTHER)}
    server.refresh_from_db()
    assert server.scanned_keys == []


def test_the_agents_reason_is_told(run):
    done = run("scan", "web-01", keys=[], error="10.0.0.7:22: connection refused")
    assert isinstance(done.exception, PamError)
    assert "10.0.0.7:22: connection refused" in str(done.exception)


def test_waiting_has_an_end(server, monkeypatch):
    scan = scanning.begin(server, "operator", "dc1-a")
    with pytest.raises(PamError, match="has not answered"):
        command._await(scan, 0)


def test_the_user_ca_is_printed_for_sshd(run):
    done = run("user-ca", "dc1")
    (entry,) = platform_keys.public_entries("target-user-ca:dc1")
    words = done.output.split()
    assert words[0] == "ssh-ed25519"
    assert words[2:] == ["pam", "dc1", entry["kid"]]
    assert isinstance(run("user-ca", "dc9").exception, PamError)
