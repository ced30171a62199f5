"""Who may use the local origin: every request is asked, sockets too."""

from __future__ import annotations

import dataclasses
import json

import pytest

from pam_agent.protocols.base import ClientProtocolError
from pam_agent.protocols.http import door
from pam_agent.protocols.http.door import AdmissionError, Door, Entry, Preamble, parse_preamble
from pam_agent.protocols.http.wire import Request
from pam_common.keys import b64encode

HOST = "viewer.grafana.localhost:41234"
ORIGIN = f"http://{HOST}"
BROWSER = Preamble("browser", ORIGIN, bytes(range(32)))
PROGRAM = Preamble("program", "http://127.0.0.1:41235")
COOKIE = f"__pam-41234={BROWSER.cookie}"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def request(method: str = "GET", target: str = "/", **fields: str) -> Request:
    given = {"host": HOST, "cookie": COOKIE} | {name.replace("_", "-"): text for name, text in fields.items()}
    kept = [(name.encode(), text.encode()) for name, text in given.items() if text]
    return Request(fields=kept, chunked=False, length=None, method=method, target=target)


# --- the preamble ----------------------------------------------------------------------------------------


def test_http_preamble():
    key = b64encode(bytes(32))
    said = {"v": 1, "mode": "browser", "origin": ORIGIN, "key": key}
    assert parse_preamble(json.dumps(said).encode()) == Preamble("browser", ORIGIN, bytes(32))
    said = {"v": 1, "mode": "program", "origin": "http://127.0.0.1:1"}
    assert parse_preamble(json.dumps(said).encode()).host == "127.0.0.1:1"
    assert "key" not in repr(BROWSER)


@pytest.mark.parametrize(
    "change",
    [
        {"v": 2},
        {"mode": "both"},
        {"mode": None},
        {"origin": "https://viewer.grafana.localhost:1"},
        {"origin": "http://evil/:1"},
        {"origin": "http://a:1/x"},
        {"origin": 1},
        {"key": b64encode(bytes(31))},
        {"key": "="},
        {"key": None},
    ],
)
def test_http_preamble_that_is_none(change):
    said = {"v": 1, "mode": "browser", "origin": ORIGIN, "key": b64encode(bytes(32))} | change
    with pytest.raises(ClientProtocolError):
        parse_preamble(json.dumps(said).encode())
    for line in (b"", b"[]", b"GET / HTTP/1.1", b"[" * 1000, b"\xff"):
        with pytest.raises(ClientProtocolError):
            parse_preamble(line)


def test_http_preamble_is_bounded(make_gate, make_app):
    gate = make_gate(make_app(OK).port)
    gate.said = gate.line[:-2] + b', "x": "' + b"a" * door.MAX_PREAMBLE + b'"}\n'
    with gate.connect() as sock:
        sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert b"did not say what it carries" in sock.recv(65536)


# --- the browser -----------------------------------------------------------------------------------------


def test_http_a_browser_enters_once_by_its_link():
    shared = Door()
    link = request(target=f"/.pam/enter?t={BROWSER.link}", cookie="")
    assert shared.admit(BROWSER, link) == Entry("/", f"{COOKIE}; HttpOnly; SameSite=Strict; Path=/")
    assert shared.admit(BROWSER, request()) is None
    with pytest.raises(AdmissionError) as refused:
        shared.admit(BROWSER, link)  # a second browser
    assert refused.value.rule == "used link"
    # The one that it let in may reload it.
    assert shared.admit(BROWSER, request(target=f"/.pam/enter?t={BROWSER.link}"))


@pytest.mark.parametrize(
    "target", ["/.pam/enter", "/.pam/enter?t=", f"/.pam/enter?t={BROWSER.cookie}", "/.pam/enter?t=ä"]
)
def test_http_a_wrong_link(target):
    with pytest.raises(AdmissionError, match="link"):
        Door().admit(BROWSER, request(target=target, cookie=""))


def test_http_link_and_cookie_say_nothing_of_each_other():
    assert BROWSER.link != BROWSER.cookie
    assert Preamble("browser", ORIGIN, bytes(32)).cookie != BROWSER.cookie
    with pytest.raises(AdmissionError):
        Door().admit(BROWSER, request(cookie=f"__pam-41234={BROWSER.link}"))


@pytest.mark.parametrize(
    "cookie",
    [
        "",
        "__pam-41234=",
        "__pam-41234=x",
        "x" + COOKIE,
        COOKIE + "x",
        "a=b; " + COOKIE.replace("pam", "PAM"),
        "__pam=" + BROWSER.cookie,
        COOKIE.replace("41234", "41235"),
    ],
)
def test_http_without_the_cookie_there_is_a_page_that_says_how(cookie):
    with pytest.raises(AdmissionError) as refused:
        Door().admit(BROWSER, request(cookie=cookie))
    assert "pam-client connect" in refused.value.hint


def test_http_another_cookie_of_the_name_does_not_shut_out():
    assert Door().admit(BROWSER, request(cookie=f"__pam-41234=tossed; {COOKIE}; a=b")) is None


def test_http_keys_of_a_session_are_bounded():
    shared = Door()
    for number in range(door.MAX_KEYS + 1):
        one = Preamble("browser", ORIGIN, bytes([number]) * 32)
        link = request(target=f"/.pam/enter?t={one.link}", cookie="")
        if number < door.MAX_KEYS:
            assert shared.admit(one, link)
        else:
            with pytest.raises(AdmissionError):
                shared.admit(one, link)


CROSS_SITE = {
    "another host": {"host": "evil.example:41234"},
    "another port": {"host": "viewer.grafana.localhost:1"},
    "another account": {"host": "admin.grafana.localhost:41234"},
    "the address": {"host": "127.0.0.1:41234"},
    "no host": {"host": ""},
    "another page": {"origin": "https://evil.example"},
    "another account's page": {"origin": "http://admin.grafana.localhost:41234"},
    "a page of another port": {"origin": "http://viewer.grafana.localhost:1"},
    "a page without an origin": {"origin": "null"},
    "a sandboxed page": {"origin": "null", "sec_fetch_site": "cross-site"},
    "an image of another page": {"sec_fetch_site": "cross-site", "sec_fetch_dest": "image"},
    "a frame of another page": {
        "sec_fetch_site": "cross-site",
        "sec_fetch_mode": "navigate",
        "sec_fetch_dest": "iframe",
    },
    "a sibling's fetch": {"sec_fetch_site": "same-site", "sec_fetch_mode": "cors", "sec_fetch_dest": "empty"},
    "something unheard of": {"sec_fetch_site": "near"},
}


@pytest.mark.parametrize("case", CROSS_SITE)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_abuse_14_cross_site_and_rebound_requests_are_refused(case, method):
    with pytest.raises(AdmissionError):
        Door().admit(BROWSER, request(method, **CROSS_SITE[case]))


def test_http_what_the_own_page_does_is_admitted():
    for fields in (
        {},
        {"origin": ORIGIN},
        {"origin": ORIGIN, "sec_fetch_site": "same-origin"},
        {"origin": "null", "sec_fetch_site": "same-origin"},  # Referrer-Policy: no-referrer
        {"sec_fetch_site": "none", "sec_fetch_mode": "navigate", "sec_fetch_dest": "document"},
    ):
        assert Door().admit(BROWSER, request(**fields)) is None
    with pytest.raises(AdmissionError):  # but no form that another page posts
        Door().admit(
            BROWSER,
            request(
                "POST", sec_fetch_site="cross-site", sec_fetch_mode="navigate", sec_fetch_dest="document"
            ),
        )


def test_http_a_link_on_another_page_leads_on_only_if_the_user_says_so(make_gate, make_app, ask):
    """Whether the cookie came along or not. The next request is from a page of the origin's own."""
    for site, cookie in (("cross-site", ""), ("same-site", COOKIE)):
        fields = {"sec_fetch_site": site, "sec_fetch_mode": "navigate", "sec_fetch_dest": "document"}
        assert Door().admit(BROWSER, request(target="//evil.example/x", cookie=cookie, **fields)) == Entry(
            f"{ORIGIN}//evil.example/x"
        )
        with pytest.raises(AdmissionError):
            Door().admit(BROWSER, request("POST", cookie=cookie, **fields))
    app = make_app(OK)
    gate = make_gate(app.port, mode="browser")
    answer = ask(
        gate,
        b'GET /a?b="><script>&c HTTP/1.1\r\nHost: HOST\r\nConnection: close\r\nSec-Fetch-Site: cross-site\r\n'
        b"Sec-Fetch-Mode: navigate\r\nSec-Fetch-Dest: document\r\n\r\n",
    )
    assert answer.startswith(b"HTTP/1.1 200")
    assert f'href="{gate.preamble.origin}/a?b=&quot;&gt;&lt;script&gt;&amp;c"'.encode() in answer
    assert b"refresh" not in answer
    assert b"Set-Cookie" not in answer
    assert app.connections == 0


def test_http_two_clients_of_an_account_do_not_shut_each_other_out():
    """Their origins have the same host, whose cookies go to both ports."""
    other = Preamble("browser", ORIGIN.replace("41234", "41235"), bytes(range(1, 33)))
    cookies = f"{COOKIE}; {other.cookie_name.decode()}={other.cookie}"
    assert Door().admit(BROWSER, request(cookie=cookies)) is None
    assert Door().admit(other, request(host="viewer.grafana.localhost:41235", cookie=cookies)) is None


def test_abuse_14_a_socket_of_another_page_is_refused():
    upgrade = {"connection": "Upgrade", "upgrade": "websocket"}
    assert Door().admit(BROWSER, request(origin=ORIGIN, **upgrade)) is None
    for fields in ({}, {"origin": "https://evil.example"}, {"origin": "null"}):
        with pytest.raises(AdmissionError):
            Door().admit(BROWSER, request(**fields, **upgrade))
    with pytest.raises(AdmissionError):
        Door().admit(BROWSER, request(origin=ORIGIN, cookie="", **upgrade))


@pytest.mark.parametrize("name", [b"Host", b"Sec-Fetch-Site", b"Origin"])
def test_http_a_header_that_decides_stands_once(name):
    one = request(origin=ORIGIN, sec_fetch_site="same-origin")
    twice = dataclasses.replace(one, fields=[*one.fields, (name, dict(one.fields)[name.lower()])])
    with pytest.raises(AdmissionError):
        Door().admit(BROWSER, twice)


# --- programs --------------------------------------------------------------------------------------------


def test_http_a_program_needs_no_link():
    assert Door().admit(PROGRAM, request(host="127.0.0.1:41235", cookie="")) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"host": "evil.example:41235"},
        {"host": "127.0.0.1"},
        {"host": "localhost:41235"},  # an old browser says nothing else, and may have followed a link
        {"host": ""},
        {"origin": "http://127.0.0.1:41235"},
        {"sec_fetch_site": "none"},
        {"Sec_Fetch_Dest": "document"},
    ],
)
def test_abuse_14_a_browser_cannot_use_the_programs_port(fields):
    with pytest.raises(AdmissionError):
        Door().admit(PROGRAM, request(**({"host": "127.0.0.1:41235"} | fields)))


# --- on a connection -------------------------------------------------------------------------------------


def test_abuse_14_the_second_request_on_a_connection_is_checked_like_the_first(make_gate, make_app, ask):
    app = make_app(OK)
    gate = make_gate(app.port, mode="browser")
    cookie = b"Cookie: %s=%s\r\n" % (gate.preamble.cookie_name, gate.preamble.cookie.encode())
    good = b"GET /good HTTP/1.1\r\nHost: HOST\r\n" + cookie + b"\r\n"
    for bad in (
        b"GET /bad HTTP/1.1\r\nHost: HOST\r\n\r\n",
        b"GET /bad HTTP/1.1\r\nHost: evil.example\r\n" + cookie + b"\r\n",
        b"POST /bad HTTP/1.1\r\nHost: HOST\r\nOrigin: https://evil.example\r\n" + cookie + b"\r\n",
        b"GET /bad HTTP/1.1\r\nHost: HOST\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    ):
        answer = ask(gate, good + bad)
        assert answer.count(b"HTTP/1.1 200 OK") == 1
        assert answer.count(b"HTTP/1.1 403 Forbidden") == 1
    assert all(head.startswith(b"GET /good") for head in app.received)
    assert {event["rule"] for event in gate.of("refused")} == {"no link", "host", "origin"}


def test_http_the_cookie_is_set_by_the_link_and_kept_from_the_app(make_gate, make_app, ask):
    app = make_app(OK)
    gate = make_gate(app.port, mode="browser")
    target = f"/.pam/enter?t={gate.preamble.link}".encode()
    answer = ask(gate, b"GET " + target + b" HTTP/1.1\r\nHost: HOST\r\nConnection: close\r\n\r\n")
    # A page that leads on, and no redirect: one that another site began would come without the cookie.
    assert answer.startswith(b"HTTP/1.1 200")
    assert b'content="0; url=/"' in answer
    name = gate.preamble.cookie_name.decode()
    assert f"Set-Cookie: {name}={gate.preamble.cookie}; HttpOnly; SameSite=Strict; Path=/".encode() in answer
    assert app.connections == 0
    ask(
        gate,
        b"GET / HTTP/1.1\r\nHost: HOST\r\nConnection: close\r\n"
        + f"Cookie: a=b; {name}={gate.preamble.cookie}; __pam-1=of-another; c=d\r\n\r\n".encode(),
    )
    (head,) = app.received
    assert b"Cookie: a=b; c=d\r\n" in head
    assert b"__pam" not in head
    assert gate.preamble.cookie not in json.dumps(gate.events)
    assert gate.preamble.link not in json.dumps(gate.events)
