"""The pages: who sees what, forms with CSRF, nothing recorded runs in a browser (abuse cases 15, 18, 22)."""

import re

import pytest
from django.test import Client as Browser
from nacl.bindings import crypto_scalarmult_base

from pam_common.keys import SigningKey, b64encode, key_id
from pam_common.recording import PartWriter, Recipient
from pam_platform.accounts.models import Group, User
from pam_platform.recordings import uploads

PASSWORD = "correct horse battery"
IDENTITY = SigningKey(b"i" * 32)
NASTY = "select '</pre><script>alert(1)</script>\x1b[2J\u202e'"


@pytest.fixture
def log_in(db):
    """A browser logged in as a user of that name, made when missing; checks CSRF as a real one."""

    def make(name, groups=(), **fields):
        user = User.objects.filter(username=name).first() or User.objects.create_user(name)
        for field, value in fields.items():
            setattr(user, field, value)
        user.set_password(PASSWORD)
        user.save()
        user.groups.set([Group.objects.get_or_create(name=group)[0] for group in groups])
        browser = Browser(enforce_csrf_checks=True)
        submit(browser, "/accounts/login/", {"login": name, "password": PASSWORD})
        return browser

    return make


def submit(browser, page, fields, action=None):
    """Post a form of the page with the CSRF token it shows."""
    text = browser.get(page).content.decode()
    token = re.findall(r'name="csrfmiddlewaretoken" value="([^"]+)"', text)[-1]
    return browser.post(action or page, {**fields, "csrfmiddlewaretoken": token}, follow=True)


@pytest.fixture
def recorded(new_session, recording_key):
    """An active session of alice with a complete recording; returns the session."""
    events = [{"kind": "query", "sql": NASTY, "tag": "SELECT 1", "columns": ["<b>"], "rows": [["<i>x</i>"]]}]
    events += [{"kind": "query", "sql": f"select {number}"} for number in range(250)]
    return record(new_session, recording_key, events)


@pytest.fixture
def browsed(new_session, recording_key):
    """The same of a web application."""
    asked = {"kind": "request", "id": 1, "method": "GET", "url": f"https://app/{NASTY}", "body_bytes": 0}
    answer = {"kind": "response", "id": 1, "status": 404, "ms": 12.5, "body_bytes": 2048}
    refused = {
        "kind": "refused",
        "id": 2,
        "rule": "deny /x",
        "method": "GET",
        "url": "https://app/x",
        "status": 403,
    }
    events = [asked, answer, refused]
    for number in range(3, 210):
        events.append({**asked, "id": number, "url": f"https://app/page/{number}."})
        events.append({**answer, "id": number, "status": 200})
    return record(new_session, recording_key, events, protocol="http")


def record(new_session, recording_key, events, **fields):
    from django.utils import timezone

    session = new_session(state="active", opened=timezone.now(), review_groups=["audit"], **fields)
    part = uploads.begin_part(session.pk, "dc1-a", b64encode(IDENTITY.public))
    public = crypto_scalarmult_base(recording_key)
    writer = PartWriter(
        session=session.pk,
        part=1,
        agent="dc1-a",
        identity_kid=IDENTITY.kid,
        created=1_700_000_000,
        recipients=[Recipient.from_json({"kid": key_id(public), "key": b64encode(public)})],
        statement="statement",
    )
    data = writer.opening + writer.append(0.5, 1, events) + writer.finish()
    head = writer.head(1_700_000_009, "client closed").sign(IDENTITY)
    uploads.add_bytes(part, 0, data + head.to_trailer(IDENTITY.kid))
    assert uploads.add_head(part, head)
    return session


PAGES = ("/", "/sessions", "/sessions/{}", "/sessions/{}/parts/1", "/identity/o/device", "/accounts/2fa/")


@pytest.mark.parametrize("page", PAGES)
def test_every_page_asks_for_a_login(recorded, page):
    answer = Browser().get(page.format(recorded.pk))
    assert answer.status_code == 302
    assert answer.headers["Location"].startswith("/accounts/login/")


@pytest.mark.parametrize("page", [*PAGES, "/accounts/login/", "/nowhere", "/accounts/password/change/"])
def test_no_page_has_or_allows_scripts(log_in, recorded, page):
    answer = log_in("alice").get(page.format(recorded.pk), follow=True)
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "script-src" not in policy
    assert "unsafe" not in policy
    text = answer.content.decode()
    assert "<script" not in text
    assert not re.search(r'\s(on\w+|style)="', text)
    assert answer.headers["X-Frame-Options"] == "DENY"
    assert answer.headers["Cache-Control"] == "no-store" or "no-cache" in answer.headers["Cache-Control"]


def test_the_style_sheet_is_served():
    answer = Browser().get("/static/web/style.css")
    assert answer.status_code == 200
    assert answer.headers["Content-Type"].startswith("text/css")


def test_recorded_text_is_shown_harmless(log_in, recorded):
    text = log_in("alice").get(f"/sessions/{recorded.pk}/parts/1").content.decode()
    assert "&lt;/pre&gt;&lt;script&gt;" in text
    assert '<span class="ctl">\\x1b</span>[2J<span class="ctl">\\u202e</span>' in text
    assert "&lt;i&gt;x&lt;/i&gt;" in text
    assert not {"\x1b", "\u202e"} & set(text)


def test_the_home_page_tells_how_to_log_in_from_a_fresh_machine(log_in, settings):
    settings.PAM_ISSUER = "https://pam.example.com"
    page = log_in("alice").get("/").content.decode()
    assert "pam-client login --platform https://pam.example.com\n" in page


def test_a_recording_is_shown_in_pages(log_in, recorded):
    browser = log_in("alice")
    first = browser.get(f"/sessions/{recorded.pk}/parts/1").content.decode()
    assert "select 198<" in first
    assert "select 199<" not in first
    following = re.search(r'href="(\?from=\d+)">Later', first)[1]
    second = browser.get(f"/sessions/{recorded.pk}/parts/1{following}").content.decode()
    assert "select 199<" in second
    assert "select 249<" in second
    assert ">Later" not in second


def test_a_web_session_is_shown_as_its_requests(log_in, browsed):
    browser = log_in("alice")
    first = browser.get(f"/sessions/{browsed.pk}/parts/1").content.decode()
    assert "&lt;/pre&gt;&lt;script&gt;" in first
    assert not {"\x1b", "\u202e"} & set(first)
    assert "<script" not in first
    row = first[first.index("<tbody>") : first.index("</tr>", first.index("<tbody>"))]
    assert '<tr class="failed">' in row
    assert list(re.findall(r'<td class="num">([^<]*)</td>', row)) == [
        "404",
        "0 B",
        "2.0 KiB",
        "12",
    ]
    assert "refused by rule: deny /x" in first
    assert "https://app/page/200.<" in first
    assert "https://app/page/201.<" not in first
    following = re.search(r'href="(\?from=\d+)">Later', first)[1]
    second = browser.get(f"/sessions/{browsed.pk}/parts/1{following}").content.decode()
    assert "https://app/page/201.<" in second
    assert ">Later" not in second


def test_a_web_session_has_its_events_too(log_in, browsed):
    browser = log_in("alice")
    first = browser.get(f"/sessions/{browsed.pk}/parts/1?view=events").content.decode()
    assert "<td>response</td>" in first
    following = re.search(r'href="(\?view=events&amp;from=\d+)">Later', first)[1].replace("&amp;", "&")
    second = browser.get(f"/sessions/{browsed.pk}/parts/1{following}").content.decode()
    assert "<td>response</td>" in second
    assert 'href="?">Requests' in second


@pytest.mark.parametrize("start", ["-1", "x", "9" * 30, "²", ""])
def test_an_odd_page_number_is_the_first_page(log_in, recorded, start):
    answer = log_in("alice").get(f"/sessions/{recorded.pk}/parts/1", {"from": start})
    assert "select 1<" in answer.content.decode()


def test_verification_is_shown(log_in, recorded):
    answer = submit(log_in("alice"), f"/sessions/{recorded.pk}", {}, f"/sessions/{recorded.pk}/verify")
    assert "verified" in answer.content.decode()


def test_a_part_that_is_lost_is_shown_as_damage(log_in, recorded):
    recorded.part = 2
    recorded.save()
    answer = submit(log_in("alice"), f"/sessions/{recorded.pk}", {}, f"/sessions/{recorded.pk}/verify")
    page = answer.content.decode()
    assert page.index("verified") < page.index("the recording is lost")
    assert "damaged" in page


@pytest.mark.parametrize(
    ("name", "groups", "roles", "listed", "content"),
    [
        ("alice", [], {}, True, 200),
        ("bob", ["audit"], {}, False, 404),
        ("root", [], {"is_admin": True}, True, 404),
        ("audrey", [], {"is_auditor": True}, False, 404),
        ("audrey", ["audit"], {"is_auditor": True}, True, 200),
    ],
)
def test_who_sees_what(log_in, recorded, name, groups, roles, listed, content):
    browser = log_in(name, groups, **roles)
    assert (f"/sessions/{recorded.pk}" in browser.get("/sessions").content.decode()) is listed
    assert browser.get(f"/sessions/{recorded.pk}").status_code == (200 if listed else 404)
    assert browser.get(f"/sessions/{recorded.pk}/parts/1").status_code == content


def test_an_unnamed_review_group_is_every_auditor(log_in, recorded):
    recorded.review_groups = []
    recorded.save()
    assert str(recorded.pk) in log_in("audrey", is_auditor=True).get("/sessions").content.decode()


def test_sessions_are_filtered_and_paged(log_in, new_session):
    for number in range(60):
        new_session(state="ended" if number % 2 else "active")
    browser = log_in("root", is_admin=True)
    active = browser.get("/sessions?state=active&user=alice").content.decode()
    assert active.count('href="/sessions/s-') == 30
    assert browser.get("/sessions?user=nobody").content.decode().count('href="/sessions/s-') == 0
    first = browser.get("/sessions").content.decode()
    older = re.search(r'href="(\?[^"]+)">Older', first)[1].replace("&amp;", "&")
    second = browser.get(f"/sessions{older}").content.decode()
    links = [re.findall(r"/sessions/(s-[a-z2-7]{26})", text) for text in (first, second)]
    assert [len(found) for found in links] == [50, 10]
    assert not set(links[0]) & set(links[1])


def test_the_owner_kills_a_session(log_in, recorded, audit_trail):
    browser = log_in("alice")
    page = f"/sessions/{recorded.pk}"
    answer = submit(browser, page, {"reason": "wrong <b>window</b>"}, f"{page}/kill")
    text = answer.content.decode()
    assert "The session was killed." in text
    assert "wrong &lt;b&gt;window" in text
    recorded.refresh_from_db()
    assert (recorded.state, recorded.killed) == ("ended", True)
    assert "Kill session" not in text


def test_an_admin_kills_a_session_and_a_stranger_does_not(log_in, recorded):
    page = f"/sessions/{recorded.pk}"
    stranger = log_in("bob", ["audit"], is_auditor=True)
    assert "Kill session" not in stranger.get(page).content.decode()
    assert submit(stranger, page, {}, f"{page}/kill").status_code == 404
    recorded.refresh_from_db()
    assert recorded.state == "active"
    submit(log_in("root", is_admin=True), page, {"reason": ""}, f"{page}/kill")
    recorded.refresh_from_db()
    assert recorded.state == "ended"


def test_killing_needs_a_post_with_a_csrf_token(log_in, recorded):
    browser = log_in("alice")
    assert browser.get(f"/sessions/{recorded.pk}/kill").status_code == 405
    assert browser.post(f"/sessions/{recorded.pk}/kill", {"reason": "x"}).status_code == 403
    recorded.refresh_from_db()
    assert recorded.state == "active"


@pytest.mark.parametrize("path", ["/sessions/s-short", "/sessions/../etc", "/sessions/s-" + "A" * 26])
def test_odd_ids_are_no_pages(log_in, path):
    assert log_in("alice").get(path).status_code == 404


def test_looks_are_on_record(log_in, recorded, audit_trail):
    log_in("alice").get(f"/sessions/{recorded.pk}/parts/1")
    log_in("root", is_admin=True).get(f"/sessions/{recorded.pk}/parts/1")
    looks = [entry for entry in audit_trail() if entry[1] == "recording.view"]
    assert [(entry[0], entry[3]) for entry in looks] == [("alice", "ok"), ("root", "refused")]
