"""Credentials: put into headers, or spent on a login form whose cookies stay in the agent."""

from __future__ import annotations

import base64
import json
import re
import threading
from urllib.parse import parse_qs

import pytest

from pam_agent.protocols.base import Credential, TargetLoginError
from pam_agent.protocols.http import account as accounts
from pam_agent.protocols.http import forms
from pam_agent.protocols.http.options import Form, LoggedOut, Success
from pam_agent.protocols.http.wire import Response

PASSWORD = "correct horse battery"
TOKEN = "tok-5f0c2a9e7b"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
GET = b"GET / HTTP/1.1\r\nHost: HOST\r\nAuthorization: mine\r\nX-Api-Key: mine\r\nConnection: close\r\n\r\n"
OWN = "http://app.example"


# --- headers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"login": "basic"}, b"Authorization: Basic " + base64.b64encode(f"viewer:{PASSWORD}".encode())),
        ({"login": "bearer"}, b"Authorization: Bearer " + TOKEN.encode()),
        ({"login": "header", "header": "X-Api-Key"}, b"X-Api-Key: " + TOKEN.encode()),
    ],
)
def test_http_a_credential_goes_into_every_request(make_gate, make_app, ask, options, expected):
    app = make_app(OK)
    gate = make_gate(app.port, account=options)
    ask(gate, GET)
    (head,) = app.received
    name = expected.partition(b":")[0]
    assert [line for line in head.split(b"\r\n") if line.startswith(name)] == [expected]
    recorded = json.dumps(gate.events)
    for secret in (PASSWORD, TOKEN, expected.split()[-1].decode()):
        assert secret not in recorded


def test_http_identity_headers_are_set(make_gate, make_app, ask):
    app = make_app(OK)
    gate = make_gate(app.port, account={"identity_headers": {"X-Remote-User": "{person}"}})
    ask(gate, b"GET / HTTP/1.1\r\nHost: HOST\r\nX_remote_user: root\r\nConnection: close\r\n\r\n")
    assert re.findall(rb"(?i)remote.user: (\w+)", app.received[0]) == [b"alice"]


def test_http_an_app_that_says_the_secret_back_does_not_get_it_recorded(make_gate, make_app, ask):
    text = f"you are {PASSWORD}".encode()
    answer = b"HTTP/1.1 200 OK\r\nX-Echo: %b\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n%b"
    app = make_app(answer % (PASSWORD.encode(), len(text), text))
    gate = make_gate(app.port, account={"login": "basic"})
    ask(gate, GET)
    assert PASSWORD not in json.dumps(gate.events)


# --- forms, as text --------------------------------------------------------------------------------------

PAGE = """<form action="/search"><input name=q></form>
<form method=post action="do-login"><input type="hidden" name="csrf" value="a&amp;b"><input name=username>
<INPUT TYPE=password name=password><input type=hidden name=next value="/x"></form><input type=hidden>"""


def test_http_the_form_of_a_page_is_found():
    found = forms.find_form(PAGE, {"username", "password"})
    assert found is not None
    assert found.action == "do-login"
    assert found.hidden == {"csrf": "a&b", "next": "/x"}
    assert forms.find_form(PAGE, {"email"}) is None
    assert forms.find_form("<form><input name=", {"x"}) is None


def test_http_forms_are_bounded():
    page = "<form>" + "".join(f"<input type=hidden name=n{n}>" for n in range(forms.MAX_INPUTS + 50))
    found = forms.find_form(page, {"n1"})
    assert found is not None
    assert len(found.hidden) == forms.MAX_INPUTS
    page = "<form><input name=x></form>" * forms.MAX_FORMS + "<form><input name=late></form>"
    assert forms.find_form(page, {"x"}) is not None
    assert forms.find_form(page, {"late"}) is None


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("do", "/login/do"),
        ("/do?x=y", "/do?x=y"),
        ("?x", "/login/?x"),
        ("", "/login/"),
        ("http://app.example/a", "/a"),
        ("http://APP.example:80/a#b", "/a"),
        ("//app.example/a", "/a"),
    ],
)
def test_http_a_form_is_posted_within_the_app(reference, expected):
    assert forms.within(OWN, "/login/", reference) == expected


@pytest.mark.parametrize(
    "reference",
    [
        *("http://evil.example/", "//evil.example/", "https://app.example/", "http://app.example:81/"),
        *("javascript:x", "http://app.example@evil.example/", "http://[", "http:\\\\evil.example"),
    ],
)
def test_http_a_form_is_posted_nowhere_else(reference):
    try:
        assert forms.within(OWN, "/login/", reference).startswith("/")
        assert "evil" not in reference or "\\" in reference  # a path of the app with odd characters
    except TargetLoginError:
        pass


def form(**more) -> Form:
    return Form("/login/", (("u", "{user}"), ("p", "{password}")), **more)


def answer(status: int, location: str = "") -> Response:
    fields = [(b"Location", location.encode())] if location else []
    return Response(fields=fields, chunked=False, length=None, status=status)


def test_http_what_is_posted():
    found = forms.FoundForm("", {"csrf": "t", "u": "nobody"})
    body = forms.filled(form(), found, Credential("me&you", "p=&{user}"))
    assert parse_qs(body.decode()) == {"csrf": ["t"], "u": ["me&you"], "p": ["p=&{user}"]}


@pytest.mark.parametrize(
    ("success", "status", "location", "cookies", "ok"),
    [
        (Success(), 302, "/", set(), True),
        (Success(), 302, "/login/?error", set(), False),
        (Success(), 302, "http://elsewhere.example/", set(), False),
        (Success(), 200, "", {"sid"}, False),
        (Success(cookie="sid"), 200, "", {"sid"}, True),
        (Success(cookie="sid"), 302, "/", set(), False),
        (Success(status=(204,)), 204, "", set(), True),
        (Success(status=(204,)), 200, "", set(), False),
        (Success(location="/home"), 302, "/home/x", set(), True),
        (Success(location="/home"), 302, "/homes", set(), False),
        (Success(cookie="sid", location="/home"), 302, "/home", set(), False),
        (Success(cookie="sid"), 500, "", {"sid"}, False),
    ],
)
def test_http_whether_a_login_worked(success, status, location, cookies, ok):
    assert forms.succeeded(success, form(), answer(status, location), OWN, cookies) is ok


@pytest.mark.parametrize(
    ("status", "location", "out"),
    [
        (401, "", True),
        (403, "", False),
        (302, "/login/?next=/x", True),
        (302, "/login", True),
        (302, "/logins", False),
        (302, "http://app.example/login/", True),
        (302, "http://evil.example/login/", False),
        (200, "/login/", False),
    ],
)
def test_http_whether_the_app_has_forgotten_the_login(status, location, out):
    signs = LoggedOut(status=(401,), location="/login/")
    assert forms.logged_out(signs, answer(status, location), OWN, "/x") is out


# --- forms, with an app ----------------------------------------------------------------------------------


class FormApp:
    """An app with a login: what a scripted app serves. ``sessions`` are the valid cookies."""

    def __init__(self) -> None:
        self.sessions: set[str] = set()
        self.logins = 0
        self.password = PASSWORD
        self.posts: list[bytes] = []
        self._lock = threading.Lock()

    def serve(self, sock, app) -> None:
        while head := app.read_head(sock):
            length = re.search(rb"(?i)content-length: (\d+)", head)
            body = b""
            while length and len(body) < int(length[1]):
                body += sock.recv(65536)
            sock.sendall(self.answer(head, body))

    def answer(self, head: bytes, body: bytes) -> bytes:
        method, path = head.split()[:2]
        cookies = dict(re.findall(rb"(\w+)=([\w-]+)", b" ".join(re.findall(rb"Cookie: (.*)\r", head))))
        if path == b"/login/" and method == b"GET":
            page = b"<form><input type=hidden name=csrf value=c1><input name=u><input name=p></form>"
            return _answer(b"200 OK", page, b"Content-Type: text/html\r\nSet-Cookie: pre=1\r\n")
        if path == b"/login/":
            return self._login(body, cookies)
        if cookies.get(b"sid", b"").decode() not in self.sessions:
            return _answer(b"302 Found", b"", b"Location: /login/?next=/\r\n")
        if method == b"POST":
            self.posts.append(body)
        return _answer(b"200 OK", b"private", b"Content-Type: text/plain\r\n")

    def _login(self, body: bytes, cookies: dict[bytes, bytes]) -> bytes:
        given = parse_qs(body.decode())
        right = (
            given == {"csrf": ["c1"], "u": ["viewer"], "p": [self.password]} and cookies.get(b"pre") == b"1"
        )
        with self._lock:
            self.logins += 1
            if not right:
                return _answer(b"200 OK", b"wrong")
            sid = f"session-{self.logins}"
            self.sessions.add(sid)
        return _answer(
            b"302 Found", b"", f"Location: /\r\nSet-Cookie: sid={sid}; Path=/; HttpOnly\r\n".encode()
        )


def _answer(status: bytes, body: bytes, fields: bytes = b"") -> bytes:
    return b"HTTP/1.1 %b\r\n%bContent-Length: %d\r\n\r\n%b" % (status, fields, len(body), body)


ACCOUNT = {
    "login": "form",
    "form": {
        "path": "/login/",
        "fields": {"u": "{user}", "p": "{password}"},
        "success": {"cookie": "sid"},
        "logged_out": {"status": [401], "location": "/login/"},
    },
}
ASK = b"GET /x HTTP/1.1\r\nHost: HOST\r\nConnection: close\r\n\r\n"


def test_http_a_form_login_once_for_all_connections(make_gate, make_app, ask):
    state = FormApp()
    gate = make_gate(make_app(state.serve).port, account=ACCOUNT)
    threads = [threading.Thread(target=lambda: answers.append(ask(gate, ASK))) for _ in range(6)]
    answers: list[bytes] = []
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(answers) == 6
    assert all(got.endswith(b"private") for got in answers)
    assert all(b"Set-Cookie" not in got for got in answers)
    assert state.logins == 1
    assert [e["ok"] for e in gate.of("login")] == [True]
    gate.wait_done()
    recorded = json.dumps(gate.events)
    assert PASSWORD not in recorded
    assert "session-1" not in recorded


def test_http_a_login_that_the_app_forgot_is_renewed(make_gate, make_app, ask):
    state = FormApp()
    gate = make_gate(make_app(state.serve).port, account=ACCOUNT)
    assert ask(gate, ASK).endswith(b"private")
    state.sessions.clear()
    assert ask(gate, ASK).endswith(b"private")
    assert state.logins == 2


def test_http_what_changes_something_is_not_sent_twice_after_a_renewed_login(make_gate, make_app, ask):
    state = FormApp()
    gate = make_gate(make_app(state.serve).port, account=ACCOUNT)
    ask(gate, ASK)
    state.sessions.clear()
    post = b"POST /x HTTP/1.1\r\nHost: HOST\r\nContent-Length: 3\r\nConnection: close\r\n\r\na=b"
    answer = ask(gate, post)
    assert answer.startswith(b"HTTP/1.1 502")
    assert b"go back and do it again" in answer
    assert state.posts == []
    assert ask(gate, post).endswith(b"private")
    assert state.posts == [b"a=b"]
    assert state.logins == 2


def test_http_logins_are_not_renewed_without_end(make_gate, make_app, ask, monkeypatch):
    """An app where every answer looks like a logout: its own answer is shown in the end."""
    state = FormApp()

    class Forgetful(set):
        def __contains__(self, item) -> bool:
            return False

    state.sessions = Forgetful()
    gate = make_gate(make_app(state.serve).port, account=ACCOUNT)
    gate.interceptor._account._clock = lambda: 1000.0  # all within a minute, however long they take
    for _ in range(accounts.MAX_LOGINS + 5):
        answer = ask(gate, ASK)
        assert answer.startswith(b"HTTP/1.1 302")
    assert state.logins == accounts.MAX_LOGINS


def test_http_a_wrong_password_is_told_and_not_tried_for_every_request(make_gate, make_app, ask, monkeypatch):
    monkeypatch.setattr(accounts, "LOGIN_INTERVAL", 600.0)  # however slowly the requests follow each other
    state = FormApp()
    state.password = "another"
    gate = make_gate(make_app(state.serve).port, account=ACCOUNT)
    for _ in range(5):
        answer = ask(gate, ASK)
        assert answer.startswith(b"HTTP/1.1 502")
        assert b"did not accept the account&#x27;s login" in answer
    assert state.logins == 1
    assert [e["ok"] for e in gate.of("login")] == [False]
    assert PASSWORD not in json.dumps(gate.events)
    monkeypatch.setattr(accounts, "LOGIN_INTERVAL", 0.0)
    state.password = PASSWORD
    assert ask(gate, ASK).endswith(b"private")


def test_http_a_login_page_that_redirects_without_end(make_gate, make_app, ask):
    app = make_app(_answer(b"302 Found", b"", b"Location: /login/\r\n"))
    gate = make_gate(app.port, account=ACCOUNT)
    assert b"redirects without end" in ask(gate, ASK)
    assert len(app.received) == accounts.MAX_REDIRECTS + 1


def test_http_a_login_page_that_leads_elsewhere_gets_no_password(make_gate, make_app, ask):
    page = b'<form action="https://evil.example/"><input name=u><input name=p></form>'
    app = make_app(_answer(b"200 OK", page, b"Content-Type: text/html\r\n"))
    gate = make_gate(app.port, account=ACCOUNT)
    assert b"leads to another place" in ask(gate, ASK)
    assert len(app.received) == 1


def test_http_a_login_page_is_bounded(make_gate, make_app, ask):
    app = make_app(_answer(b"200 OK", b"x" * (accounts.MAX_PAGE + 1)))
    gate = make_gate(app.port, account=ACCOUNT)
    assert b"longer than 1024 KiB" in ask(gate, ASK)


def test_http_a_login_that_is_not_answered_is_given_up(make_gate, make_app, ask, monkeypatch):
    monkeypatch.setattr(accounts, "LOGIN_SECONDS", 0.3)
    hold = threading.Event()
    app = make_app(lambda sock, app: (app.read_head(sock), hold.wait(60)))
    gate = make_gate(app.port, account=ACCOUNT)
    answer = ask(gate, ASK)
    hold.set()
    assert answer.startswith(b"HTTP/1.1 502")
    assert b"the login to the app took longer than" in answer
