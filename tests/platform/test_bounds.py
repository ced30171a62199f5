"""The platform's bounds that no other test goes past."""

import itertools
import socket
import sqlite3
import time
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from http.client import HTTPException
from types import SimpleNamespace

import psycopg
import pytest
from allauth.idp.oidc.models import Token
from django.conf import settings as django_settings
from django.contrib.sessions.models import Session as WebSession
from django.core.files.uploadedfile import SimpleUploadedFile
from django.db import OperationalError, connection, transaction
from django.test import Client as Browser
from django.utils import timezone
from nacl.bindings import crypto_scalarmult_base

from pam_common import tokens
from pam_common.errors import AuthenticationError, ConfigError, UnavailableError
from pam_common.keys import SigningKey, VerifyKeys, b64encode, key_id, new_session_id
from pam_common.recording import PartWriter, Recipient, RecordingError
from pam_platform import keyfiles
from pam_platform.access import bundles
from pam_platform.access.apply import document, source
from pam_platform.access.models import Session
from pam_platform.accounts import oauth
from pam_platform.accounts.models import User
from pam_platform.api import admin, errors, people
from pam_platform.commands import status as status_command
from pam_platform.config import Database, current
from pam_platform.fleet import inbox, statements
from pam_platform.fleet.models import Agent, Relay
from pam_platform.recordings import receipts, store, uploads, viewing
from pam_platform.vault import keys, master

pytestmark = pytest.mark.usefixtures("db")

PASSWORD = "correct horse battery"


def log_in(browser, name="alice", password=PASSWORD):
    return browser.post("/accounts/login/", {"login": name, "password": password})


def ask_device_code(browser):
    kind = "application/x-www-form-urlencoded"
    return browser.post("/identity/o/api/device/code", "client_id=pam-client", content_type=kind)


@pytest.fixture
def alice(db):
    return User.objects.create_user("alice", PASSWORD)


# --- requests ------------------------------------------------------------------------------------------


def test_more_form_fields_or_files_than_any_form_has_are_refused(alice):
    fields = {f"field{number}": "x" for number in range(51)}
    assert Browser().post("/accounts/login/", fields).status_code == 400
    files = {name: SimpleUploadedFile(name, b"x") for name in ("one", "two")}
    assert Browser().post("/accounts/login/", files).status_code == 400


def test_a_token_request_is_bounded(platform):
    form = {"grant_type": "client_credentials", "client_secret": "x" * (16 << 10)}
    assert Browser().post("/identity/o/api/token", form).status_code == 413


def test_pages_of_the_api_are_bounded(person):
    root = person("root", is_admin=True)
    assert root.call("GET", "/audit", limit=admin.MAX_PAGE).status_code == 200
    assert root.call("GET", "/audit", limit=admin.MAX_PAGE + 1).status_code == 422
    assert root.call("GET", "/sessions", limit=people.MAX_PAGE).status_code == 200
    assert root.call("GET", "/sessions", limit=people.MAX_PAGE + 1).status_code == 422


# --- recordings ----------------------------------------------------------------------------------------


@pytest.fixture
def written(new_session, recording_key):
    """A part, and a writer of it with its signed heads."""
    identity = SigningKey(b"i" * 32)
    part = uploads.begin_part(new_session().pk, "dc1-a", b64encode(identity.public))
    public = crypto_scalarmult_base(recording_key)
    writer = PartWriter(
        session=part.session_id,
        part=1,
        agent="dc1-a",
        identity_kid=identity.kid,
        created=1_700_000_000,
        recipients=[Recipient.from_json({"kid": key_id(public), "key": b64encode(public)})],
        statement="statement",
    )
    return part, writer, lambda end=None: writer.head(1_700_000_100, end).sign(identity), identity


def test_beyond_so_many_witnesses_the_newest_replaces_the_last(written, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_WITNESSES", 2)
    part, writer, head, _ = written
    for _ in range(4):
        writer.append(1.5, 1, [{"kind": "query", "sql": "select 1"}])
        uploads.add_head(part, head())
    assert [witness.count for witness in part.witnesses.all()] == [1, 4]


def test_uploads_stop_before_the_disk_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "MIN_FREE", 1 << 60)
    folder = store.PartStore(tmp_path / "recordings")
    name = folder.name_of(new_session_id(), 1)
    with folder.locked(name) as fd, pytest.raises(UnavailableError, match="nearly full"):
        store.append(fd, 0, b"abc")
    assert folder.received(name) == 0


def test_a_view_decompresses_a_bounded_amount(written, monkeypatch):
    monkeypatch.setattr(viewing, "MAX_VIEW", 1000)
    part, writer, head, identity = written
    data = writer.opening + writer.append(1.5, 1, [{"kind": "query", "sql": "x" * 5000}]) + writer.finish()
    uploads.add_bytes(part, 0, data + head("closed").to_trailer(identity.kid))
    with pytest.raises(RecordingError, match="told to take"):
        list(viewing.events_of(part))


def test_an_agent_asks_for_so_many_receipts_at_once(fleet):
    entry = {"session": new_session_id(), "part": 1, "hash": b64encode(bytes(32))}
    ask = fleet["dc1-a"].call
    parts = [entry] * receipts.MAX_ASKED
    assert ask("POST", "/agent/recordings/check", {"parts": parts}).status_code == 200
    assert ask("POST", "/agent/recordings/check", {"parts": [*parts, entry]}).status_code == 422


# --- access --------------------------------------------------------------------------------------------


def test_a_session_has_so_many_parts(fleet, person):
    session = person("alice").connect().json()["session"]
    Session.objects.update(part=1000)
    answer = fleet["dc1-a"].call("POST", f"/agent/sessions/{session}/open")
    assert answer.status_code == 403
    assert "too many recording parts" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("change", "needle"),
    [
        (lambda file: file["policies"][0].update(max_duration="8d"), "max_duration"),
        (lambda file: file["resources"][0].update(rows_budget="2MiB"), "rows_budget"),
        (lambda file: file["resources"][0].update(tls={"ca": {"file": "big.pem"}}), "not a PEM certificate"),
        (lambda file: file["users"][1].update(password={"file": "big"}), "larger than 32768"),
    ],
)
def test_what_access_yml_holds_is_bounded(access_file, change, needle):
    folder = access_file().parent
    (folder / "big.pem").write_text("-----BEGIN CERTIFICATE-----\n" + "A" * source.MAX_PEM)
    (folder / "big").touch(mode=0o600)
    (folder / "big").write_text("x" * (source.MAX_SECRET + 1))
    with pytest.raises(ConfigError) as caught:
        document.load(access_file(change))
    assert needle in "\n".join(caught.value.problems)


def test_a_kills_reason_is_bounded(new_session, person):
    session, root = new_session(state="active"), person("root", is_admin=True)
    kill = f"/sessions/{session.pk}/kill"
    assert root.call("POST", kill, {"reason": "x" * 201}).status_code == 422
    assert root.call("POST", kill, {"reason": "x" * 200}).status_code == 200
    session.refresh_from_db()
    assert len(session.end_reason) == 200  # with who it was


def test_a_kills_reason_is_cut_on_the_web_page(new_session, alice):
    session, browser = new_session(alice, state="active"), Browser()
    log_in(browser)
    browser.post(f"/sessions/{session.pk}/kill", {"reason": "y" * 500})
    session.refresh_from_db()
    assert session.state == "ended"
    assert len(session.end_reason) == 200


# --- agents and relays ---------------------------------------------------------------------------------


def test_being_seen_is_written_once_in_a_while(fleet, monkeypatch):
    now = timezone.now()
    monkeypatch.setattr(timezone, "now", lambda: now)  # stands still, however long this takes
    agent, relay = Agent.objects.get(name="dc1-a"), Relay.objects.get()
    marks = {Agent: lambda: inbox.mark_seen(agent), Relay: lambda: bundles.bundle_tag(relay)}
    for model, row in ((Agent, agent), (Relay, relay)):
        for seconds, written in ((5, False), (11, True)):
            row.last_seen = now - timedelta(seconds=seconds)
            row.save()
            before = row.last_seen
            marks[model]()
            assert (model.objects.get(pk=row.pk).last_seen > before) is written, (model, seconds)


def test_what_is_signed_ends(fleet):
    answer = fleet["dc1-a"].call("POST", "/agent/renew").json()
    bundle = fleet["r1"].call("GET", "/relay/bundle").json()["bundle"]
    trusted = VerifyKeys.from_json(keys.public_entries(keys.GRANT))
    for token, typ, audience, lifetime in (
        (answer["trust"], tokens.TRUST, "pam-trust", statements.TRUST_LIFETIME),
        (answer["statement"], tokens.AGENT_STATEMENT, "gateway:dc1", statements.DAY),
        (bundle, tokens.RELAY_BUNDLE, "relay:r1", statements.DAY),
    ):
        options = {"issuer": django_settings.PAM_ISSUER, "audience": audience, "max_size": 1 << 20}
        assert tokens.verify(token, trusted, typ, now=time.time() + lifetime - 60, **options)
        with pytest.raises(AuthenticationError, match="expired"):
            tokens.verify(token, trusted, typ, now=time.time() + lifetime + 1, **options)


def test_a_bundle_is_made_anew_though_nothing_changed(fleet, monkeypatch):
    relay, now = Relay.objects.get(), [1_800_000_000.0]
    monkeypatch.setattr(statements.time, "time", lambda: now[0])
    now[0] -= now[0] % statements.BUNDLE_PERIOD
    first = statements.bundle_tag(relay, [], [])
    now[0] += statements.BUNDLE_PERIOD - 1
    assert statements.bundle_tag(relay, [], []) == first
    now[0] += 1
    assert statements.bundle_tag(relay, [], []) != first


def test_a_bundle_names_the_newest_of_too_many_revoked_sessions(new_session, monkeypatch):
    monkeypatch.setattr(statements, "MAX_REVOKED_SESSIONS", 2)
    now = timezone.now()
    ended = [new_session(killed=True, state="ended", ended=now + timedelta(seconds=n)) for n in range(4)]
    assert bundles._revoked_sessions() == [ended[3].pk, ended[2].pk]


def test_a_bundle_names_sessions_of_one_moment_in_one_order(new_session):
    """Another order would be another bundle, sent to every relay for nothing."""
    now = timezone.now()
    ended = [new_session(killed=True, state="ended", ended=now).pk for _ in range(12)]
    assert bundles._revoked_sessions() == sorted(ended)


# --- keys and commands ---------------------------------------------------------------------------------


def test_old_secret_keys_are_forgotten(platform):
    keyfiles.ensure(current())
    first = current().secret_key_file.read_text().split()[0]
    for _ in range(keyfiles.MAX_SECRET_KEYS):
        keyfiles.rotate(current(), "secret-key")
    kept = current().secret_key_file.read_text().split()
    assert len(kept) == keyfiles.MAX_SECRET_KEYS
    assert first not in kept


def test_a_file_of_too_many_master_keys_is_refused(tmp_path):
    path = tmp_path / "key"
    source = master.Source(path, ours=True)
    path.touch(mode=0o600)
    master.write(source, [master.generate() for _ in range(master.MAX_MASTER_KEYS)])
    assert len(master.read(source)) == master.MAX_MASTER_KEYS
    path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n")
    with pytest.raises(ConfigError, match="expected 1 to 8 lines"):
        master.read(source)


def test_status_does_not_wait_for_ever(monkeypatch):
    monkeypatch.setattr(status_command, "TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        settings = replace(current(), listen_host="127.0.0.1", listen_port=silent.getsockname()[1])
        with pytest.raises((OSError, HTTPException)):
            status_command._ask(settings)


# --- logins --------------------------------------------------------------------------------------------


def test_an_access_token_that_is_too_long_is_not_looked_up(alice):
    oauth.ensure_clients()
    for size, found in ((oauth._MAX_TOKEN_LENGTH, alice), (oauth._MAX_TOKEN_LENGTH + 1, None)):
        expires = timezone.now() + timedelta(minutes=1)
        kind = Token.Type.ACCESS_TOKEN
        token = Token(type=kind, user=alice, client_id=oauth.PAM_CLIENT_ID, expires_at=expires)
        token.set_value("t" * size)
        token.save()
        assert oauth.user_of_token("t" * size) == found


def test_a_web_session_ends_after_a_working_day(alice):
    browser = Browser()
    log_in(browser)
    assert browser.cookies["sessionid"]["max-age"] == ""  # and with the browser
    row = WebSession.objects.get(pk=browser.cookies["sessionid"].value)
    left = (row.expire_date - timezone.now()).total_seconds()
    assert 12 * 3600 - 60 < left <= 12 * 3600
    WebSession.objects.update(expire_date=timezone.now() - timedelta(seconds=1))
    assert browser.get("/api/v1/me").status_code == 401


@pytest.fixture
def one_minute(monkeypatch):
    """All that is asked comes within the limiter's minute, however long it takes here."""
    began, count = time.time(), itertools.count()
    clock = SimpleNamespace(
        time=lambda: began + next(count) / 1000, monotonic=time.monotonic, sleep=time.sleep
    )
    monkeypatch.setattr("allauth.core.internal.ratelimit.time", clock)


@pytest.mark.usefixtures("one_minute")
def test_logins_of_one_address_are_limited(alice):
    browser = Browser()
    answers = [log_in(browser, name=f"nobody{number}", password="x") for number in range(31)]
    refused = [answer.status_code == 429 or "Too many" in answer.content.decode() for answer in answers]
    assert refused[-1]
    assert not refused[0]


@pytest.mark.usefixtures("one_minute")
@pytest.mark.parametrize(
    ("grant", "limit"),
    [("client_credentials", 60), pytest.param("refresh_token", 600, marks=pytest.mark.slow)],
)
def test_token_requests_of_one_address_are_limited(platform, grant, limit):
    browser, form = Browser(), {"grant_type": grant, "client_id": "pam-client", "refresh_token": "x"}
    answers = [browser.post("/identity/o/api/token", form).status_code for _ in range(limit + 1)]
    assert 429 not in answers[:-1]
    assert answers[-1] == 429


@pytest.mark.usefixtures("one_minute")
def test_device_codes_of_one_address_are_limited(platform):
    browser = Browser()
    answers = [ask_device_code(browser).status_code for _ in range(31)]
    assert answers == [200] * 30 + [429]


@pytest.mark.usefixtures("one_minute")
def test_device_codes_typed_are_limited(platform, alice):
    browser = Browser()
    log_in(browser)
    answers = [browser.get("/identity/o/device", {"code": f"AAAA{number:04}"}) for number in range(21)]
    told = ["too many requests" in answer.content.decode() for answer in answers]
    assert told == [False] * 20 + [True]


def test_a_device_code_expires_and_is_asked_for_at_its_interval(platform, settings, monkeypatch):
    browser, path = Browser(), "/identity/o/api/token"
    code = ask_device_code(browser).json()
    assert (code["expires_in"], code["interval"]) == (600, 2)
    form = {
        "grant_type": "urn:ietf:params:oauth:grant-type:device_code",
        "client_id": "pam-client",
        "device_code": code["device_code"],
    }
    now = time.time()
    moment = SimpleNamespace(time=lambda: now)
    with monkeypatch.context() as standing:
        standing.setattr("allauth.idp.oidc.internal.oauthlib.device_codes.time", moment)
        said = [browser.post(path, form).json()["error"] for _ in range(3)]
    assert said[-1] == "slow_down"
    settings.IDP_OIDC_DEVICE_CODE_EXPIRES_IN = 1
    form["device_code"] = ask_device_code(browser).json()["device_code"]
    deadline = time.monotonic() + 60
    while (error := browser.post(path, form).json()["error"]) in ("slow_down", "authorization_pending"):
        assert time.monotonic() < deadline
        time.sleep(0.3)
    assert error in ("expired_token", "invalid_grant")


# --- the database --------------------------------------------------------------------------------------


def test_a_writer_does_not_wait_for_the_lock_for_ever(alice):
    assert connection.settings_dict["OPTIONS"]["timeout"] == 20
    connection.close()
    connection.settings_dict["OPTIONS"]["timeout"] = 0.1
    try:
        with closing(sqlite3.connect(connection.settings_dict["NAME"], isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(OperationalError, match="locked"), transaction.atomic():
                User.objects.update(is_active=True)
            answer = errors._database_error(OperationalError("database is locked"))
            assert (answer.status, answer.hint) == (503, "try again in a moment")
            other.execute("ROLLBACK")
    finally:
        connection.close()
        connection.settings_dict["OPTIONS"]["timeout"] = 20


def test_a_database_that_says_nothing_is_not_waited_for():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        settings = Database(host="127.0.0.1", port=port, name="pam", user="pam").django()
        assert (settings["OPTIONS"]["connect_timeout"], settings["CONN_MAX_AGE"]) == (10, 60)
        options = {**settings["OPTIONS"], "connect_timeout": 2}  # libpq's shortest
        with pytest.raises(psycopg.OperationalError, match="timeout"):
            psycopg.connect(host="127.0.0.1", port=port, dbname="pam", user="pam", **options)
