"""Header fields, cookies and links between the local origin and the app's own."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pam_agent.protocols.http import cookies
from pam_agent.protocols.http.cookies import Jar
from pam_agent.protocols.http.links import LinkRewriter
from pam_agent.protocols.http.rewrite import Origins, RequestRewriter, response_fields
from pam_agent.protocols.http.wire import Request, Response

LOCAL = "http://viewer.grafana.localhost:41234"
OWN = "https://grafana.corp.example"
ORIGINS = Origins(LOCAL, OWN)


def sent(fields, *, identity=(), injected=(), identified=False, restricted=False, jar=None, page=False):
    given_fields = [(b"Host", b"viewer.grafana.localhost:41234"), *fields]
    request = Request(fields=given_fields, chunked=False, length=None)
    rewriter = RequestRewriter(OWN, identity, injected, identified=identified, restricted=restricted)
    jar = jar or Jar("grafana.corp.example", secure=True)
    return rewriter.fields(request, LOCAL, "/a/b?c", jar, page=page)


def got(fields, *, jar=None, injected=False, own=OWN):
    response = Response(fields=fields, chunked=False, length=None)
    jar = jar or Jar("grafana.corp.example", secure=True)
    return response_fields(response, "/a/b?c", Origins(LOCAL, own), jar, injected=injected)


# --- requests --------------------------------------------------------------------------------------------


def test_http_a_request_speaks_of_the_app():
    fields = sent(
        [
            (b"Origin", LOCAL.encode()),
            (b"Referer", f"{LOCAL}/x?y".encode()),
            (b"Accept", b"text/html"),
            (b"X-Own", b"kept"),
        ]
    )
    assert fields == [
        (b"Host", b"grafana.corp.example"),
        (b"Origin", OWN.encode()),
        (b"Referer", f"{OWN}/x?y".encode()),
        (b"Accept", b"text/html"),
        (b"X-Own", b"kept"),
    ]


@pytest.mark.parametrize("referer", ["https://other.example/", LOCAL + "5/x", LOCAL + ".evil.example/", ""])
def test_http_a_referer_of_another_page_is_dropped(referer):
    assert sent([(b"Referer", referer.encode())]) == [(b"Host", b"grafana.corp.example")]


@pytest.mark.parametrize(
    "name",
    [
        b"Connection",
        b"Keep-Alive",
        b"Proxy-Connection",
        b"Proxy-Authorization",
        b"TE",
        b"Trailer",
        b"Transfer-Encoding",
        b"Upgrade",
        b"HTTP2-Settings",
        b"Content-Length",
        b"Forwarded",
        b"X-Forwarded-For",
        b"X_Forwarded_Host",
        b"X-Forwarded-User",
        b"X-Real-IP",
        b"X_Real_IP",
        b"True_Client_IP",
        b"Transfer_Encoding",
        b"Content_Length",
        b"Sec-WebSocket-Extensions",
    ],
)
def test_http_what_is_about_a_connection_or_a_proxy_is_dropped(name):
    assert sent([(name, b"x"), (name.lower(), b"x"), (name.upper(), b"x")])[1:] == []


def test_http_what_connection_names_is_dropped():
    assert sent([(b"Connection", b"close, X-Hop"), (b"x-hop", b"1"), (b"X-Kept", b"1")])[1:] == [
        (b"X-Kept", b"1")
    ]


@pytest.mark.parametrize(
    "name",
    [
        b"X-Remote-User",
        b"x-remote-user",
        b"X_Remote_User",
        b"X-REMOTE_USER",
        b"X.Remote.User",
        b"X~Remote|User",
    ],
)
def test_abuse_26_identity_headers_are_the_agents_alone(name):
    fields = sent([(name, b"root"), (name, b"admin")], identity=(("X-Remote-User", "alice"),))
    assert fields[1:] == [(b"X-Remote-User", b"alice")]


@pytest.mark.parametrize("name", [b"Authorization", b"authorization", b"AUTHORIZATION"])
def test_abuse_26_an_injected_credential_replaces_the_users(name):
    fields = sent([(name, b"Basic mine")], injected=(("Authorization", "Bearer theirs"),))
    assert fields[1:] == [(b"Authorization", b"Bearer theirs")]
    # A form's cookies, a certificate: no other identity beside them.
    assert sent([(name, b"Basic mine")], identified=True)[1:] == []
    # Where the agent does not log in, what the user sends is between them and the app.
    assert sent([(name, b"Basic mine")])[1:] == [(name, b"Basic mine")]


@pytest.mark.parametrize(
    ("accepts", "expected"),
    [
        (b"gzip, deflate, br", b"gzip"),
        (b"br, GZIP;q=0.5", b"gzip"),
        (b"br", b"identity"),
        (b"gzip;q=0", b"identity"),
        (b"gzip;q=0.0, br", b"identity"),
        (b"*", b"identity"),
        (b"", b"identity"),
    ],
)
def test_http_only_what_can_be_recorded_is_accepted(accepts, expected):
    assert sent([(b"Accept-Encoding", accepts)])[1:] == [(b"Accept-Encoding", expected)]
    assert sent([(b"Accept-Encoding", accepts)], page=True)[1:] == [(b"Accept-Encoding", b"identity")]


FIELD_NAMES = st.sampled_from(
    [b"Host", b"cookie", b"X-Remote-User", b"x_remote_user", b"Connection", b"X-A", b"Authorization", b"TE"]
)
FIELD_VALUES = st.sampled_from([b"a", b"x-a", b"close, x-a", b"__pam=1; b=2", b"b=2", b"root"])


@given(st.lists(st.tuples(FIELD_NAMES, FIELD_VALUES), max_size=12))
@settings(max_examples=300, deadline=None)
def test_http_whatever_the_user_sends_the_agent_decides(given_fields):
    fields = sent(
        given_fields,
        identity=(("X-Remote-User", "alice"),),
        injected=(("Authorization", "Bearer t"),),
    )
    names = [name.lower().replace(b"_", b"-") for name, _ in fields]
    assert names.count(b"host") == 1
    assert names.count(b"cookie") <= 1
    assert [value for name, value in fields if name.lower().replace(b"_", b"-") == b"x-remote-user"] == [
        b"alice"
    ]
    assert [value for name, value in fields if name.lower() == b"authorization"] == [b"Bearer t"]
    assert not {b"connection", b"te"} & set(names)
    assert all(b"__pam" not in value for name, value in fields if name == b"Cookie")


# --- answers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (OWN + "/x?y#z", LOCAL + "/x?y#z"),
        ("http://grafana.corp.example/x", LOCAL + "/x"),
        ("https://grafana.corp.example:443/x", "https://grafana.corp.example:443/x"),
        ("//GRAFANA.corp.example/x", LOCAL + "/x"),
        (OWN, LOCAL),
        ("/x", "/x"),
        ("x", "x"),
        (OWN + ".evil.example/", OWN + ".evil.example/"),
        (OWN + ":8443/", OWN + ":8443/"),
        ("https://grafana.corp.example@evil.example/", "https://grafana.corp.example@evil.example/"),
        ("https://other.example/", "https://other.example/"),
        ("javascript:alert(1)", "javascript:alert(1)"),
    ],
)
def test_http_a_location_leads_to_the_local_origin(value, expected):
    assert got([(b"Location", value.encode())]) == [(b"Location", expected.encode())]
    assert got([(b"Content-Location", value.encode())]) == [(b"Content-Location", expected.encode())]


def test_http_a_location_of_an_app_with_a_port():
    fields = got([(b"Location", b"http://app.example:8080/x")], own="http://app.example:8080")
    assert fields == [(b"Location", f"{LOCAL}/x".encode())]
    fields = got([(b"Location", b"http://app.example/x")], own="http://app.example:80")
    assert fields == [(b"Location", f"{LOCAL}/x".encode())]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        (b"Refresh", f"5; url={OWN}/x", f"5; url={LOCAL}/x"),
        (b"Link", f"<{OWN}/a.css>; rel=preload", f"<{LOCAL}/a.css>; rel=preload"),
        (b"Access-Control-Allow-Origin", OWN, LOCAL),
        (b"Access-Control-Allow-Origin", "*", "*"),
        (b"Access-Control-Allow-Origin", "https://other.example", "https://other.example"),
        (
            b"Content-Security-Policy",
            f"default-src 'self' {OWN}; connect-src wss://grafana.corp.example https://x.example; "
            "upgrade-insecure-requests",
            f"default-src 'self' {LOCAL}; connect-src ws{LOCAL[4:]} https://x.example",
        ),
        (b"Content-Security-Policy", "img-src grafana.corp.example/x", f"img-src {LOCAL}/x"),
        (b"ETag", '"x"', '"x"'),
        (b"WWW-Authenticate", "Basic", "Basic"),
    ],
)
def test_http_answers_speak_of_the_local_origin(name, value, expected):
    assert got([(name, value.encode())]) == [(name, expected.encode())]


@pytest.mark.parametrize(
    "name",
    [
        *(b"Strict-Transport-Security", b"Alt-Svc", b"Public-Key-Pins", b"Clear-Site-Data", b"Connection"),
        *(b"Keep-Alive", b"Transfer-Encoding", b"Upgrade", b"Trailer", b"Proxy-Authenticate"),
    ],
)
def test_http_answers_that_bind_the_browser_elsewhere_lose_that(name):
    assert got([(name, b"x"), (name.lower(), b"x")]) == []


def test_http_a_policy_that_only_upgrades_is_dropped():
    assert got([(b"Content-Security-Policy", b"upgrade-insecure-requests")]) == []


def test_http_the_browser_is_not_asked_for_what_the_agent_answers_for():
    assert got([(b"WWW-Authenticate", b"Basic")], injected=True) == []


# --- cookies ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("a=b", "a=b"),
        ("a=b; Path=/x; HttpOnly", "a=b; path=/x; httponly"),
        ("a=b; Domain=grafana.corp.example; Secure", "a=b"),
        ("a=b; Domain=.corp.example", "a=b"),
        ("a=b; SameSite=None; Secure", "a=b; samesite=Lax"),
        ("a=b; SameSite=Strict", "a=b; samesite=Strict"),
        ("a=b; Max-Age=5; Partitioned", "a=b; max-age=5"),
        ("__Host-a=b; Secure; Path=/", "__Host-a=b; secure; path=/"),
        ("a=b=c", "a=b=c"),
        ('a="b"', 'a="b"'),
    ],
)
def test_http_a_cookie_goes_to_the_local_origin(header, expected):
    assert got([(b"Set-Cookie", header.encode())]) == [(b"Set-Cookie", expected.encode())]


@pytest.mark.parametrize(
    "header",
    [
        "__pam=x",
        "__pam-1=x",
        "a=b; Domain=evil.example",
        "a=b; Domain=afana.corp.example",
        "novalue",
        "=x",
        "a b=c",
        "",
    ],
)
def test_http_a_cookie_that_no_browser_may_have(header):
    assert got([(b"Set-Cookie", header.encode())]) == []


def jar(**more) -> Jar:
    return Jar("grafana.corp.example", secure=more.pop("secure", True), **more)


def test_http_hidden_cookies_stay_in_the_agent():
    one = jar(hide=True)
    assert got([(b"Set-Cookie", b"sid=1; Path=/"), (b"Set-Cookie", b"x=2; Path=/a")], jar=one) == []
    assert one.header("/a/b", [b"mine=3; __pam=4; __pam-9=5"]) == b"x=2; sid=1; mine=3"
    assert one.header("/b", []) == b"sid=1"
    assert one.header("/ab", []) == b"sid=1"
    # What is kept here the user cannot replace.
    assert one.header("/b", [b"sid=mine"]) == b"sid=1"
    assert "1" not in repr(one).removeprefix("<Jar of")[3:]


def test_http_some_cookies_stay_in_the_agent():
    one = jar(hide=frozenset({"sid"}))
    assert one.take("sid=1", "/x") is None
    assert one.take("csrf=2", "/x") == "csrf=2"
    assert one.header("/x", [b"csrf=2; sid=mine"]) == b"sid=1; csrf=2"
    # Nor give one before the app has set it: it would choose the session.
    assert jar(hide=frozenset({"sid"})).header("/x", [b"sid=mine"]) is None


def test_http_the_cookies_of_a_login_stay_in_the_agent_even_when_renewed():
    one = jar()
    assert one.take("sid=1; Path=/", "/login", login=True) is None
    assert one.take("sid=2; Path=/", "/") is None
    assert one.take("other=2", "/") == "other=2"
    assert one.header("/", [b"sid=mine; other=2"]) == b"sid=2; other=2"
    one.begin_login()
    assert one.header("/", [b"sid=mine"]) is None


def test_http_cookies_end():
    now = [1000.0]
    one = jar(hide=True, clock=lambda: now[0])
    one.take("a=1; Max-Age=10", "/")
    one.take("b=1; Expires=Thu, 01 Jan 1970 00:16:50 GMT", "/")  # 1010
    one.take("c=1", "/")
    one.take("d=1; Expires=Thu, 31 Feb 9999999 00:00:00 GMT", "/")
    assert one.names() == {"a", "b", "c", "d"}
    now[0] = 1010.0
    assert one.header("/", []) == b"c=1; d=1"
    one.take("c=; Max-Age=0", "/")
    assert one.names() == {"d"}


def test_http_secure_cookies_are_for_tls():
    one = jar(hide=True, secure=False)
    one.take("a=1; Secure", "/")
    assert one.header("/", []) is None


def test_http_cookies_are_bounded():
    one = jar(hide=True)
    for number in range(cookies.MAX_COOKIES + 5):
        one.take(f"c{number}=1", "/")
    assert len(one.names()) == cookies.MAX_COOKIES
    one = jar(hide=True)
    one.take("a=" + "x" * (cookies.MAX_COOKIE - 1), "/")
    one.take("b=" + "x" * cookies.MAX_COOKIE, "/")
    assert one.names() == {"a"}


@given(st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_http_any_set_cookie_is_read_or_dropped(text):
    header = text.encode("latin-1", "ignore").decode("latin-1")
    one = jar(hide=True)
    assert one.take(header, "/x") is None
    (one.header("/x", []) or b"").decode("latin-1")


# --- links -----------------------------------------------------------------------------------------------


def relinked(page: bytes, cuts=()) -> bytes:
    rewriter = LinkRewriter(ORIGINS)
    edges = sorted({0, len(page), *(cut % (len(page) + 1) for cut in cuts)})
    parts = [rewriter.feed(page[a:b]) for a, b in itertools.pairwise(edges)]
    return b"".join([*parts, rewriter.finish()])


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        (b'<a href="https://grafana.corp.example/x">', b'<a href="http://viewer.grafana.localhost:41234/x">'),
        (b"https://grafana.corp.example", LOCAL.encode()),
        (b"HTTP://Grafana.Corp.Example/", LOCAL.encode() + b"/"),
        (b'"//grafana.corp.example/x"', b'"//viewer.grafana.localhost:41234/x"'),
        (b'"wss://grafana.corp.example/"', b'"ws://viewer.grafana.localhost:41234/"'),
        (rb'"https:\/\/grafana.corp.example\/x"', rb'"http:\/\/viewer.grafana.localhost:41234\/x"'),
        (b"https://grafana.corp.example.evil/", b"https://grafana.corp.example.evil/"),
        (b"https://grafana.corp.example:8443/", b"https://grafana.corp.example:8443/"),
        (b"https://grafana.corp.example@x/", b"https://grafana.corp.example@x/"),
        (b"https://x.grafana.corp.example/", b"https://x.grafana.corp.example/"),
        (b"ftp://grafana.corp.example/", b"ftp://grafana.corp.example/"),
        (b"grafana.corp.example/x", b"grafana.corp.example/x"),
        (b"", b""),
    ],
)
def test_http_links_of_a_page(page, expected):
    assert relinked(page) == expected


PARTS = st.sampled_from(
    [b"https:", b"//", b"grafana.corp.example", b"/", b".", b":", b"x", b"wss:", rb"\/", b" ", b'"', b"http"]
)


@given(st.lists(PARTS, max_size=25).map(b"".join), st.lists(st.integers(0, 1000), max_size=12))
@settings(max_examples=500, deadline=None)
def test_http_links_any_split_gives_the_same(page, cuts):
    assert relinked(page, cuts) == relinked(page)


def test_http_a_page_is_put_right_and_a_file_is_not(make_gate, make_app, ask):
    def answer(kind: bytes, more: bytes = b"") -> bytes:
        body = b"<a href='https://grafana.corp.example/x'>"
        return b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\n%bContent-Length: %d\r\n\r\n%b" % (
            kind,
            more,
            len(body),
            body,
        )

    def page_of(kind: bytes, more: bytes = b"", mode: str = "browser") -> bytes:
        gate = make_gate(make_app(answer(kind, more)).port, mode=mode, host="grafana.corp.example")
        shown = b"Cookie: %s=%s\r\n" % (gate.preamble.cookie_name, gate.preamble.cookie.encode())
        cookie = shown if mode == "browser" else b""
        got = ask(gate, b"GET / HTTP/1.1\r\nHost: HOST\r\nConnection: close\r\n" + cookie + b"\r\n")
        return got.replace(gate.host.encode(), b"LOCAL")

    assert b"http://LOCAL/x" in page_of(b"text/html; charset=utf-8")
    for kind, more, mode in (
        (b"text/plain", b"", "browser"),
        (b"text/html", b"Content-Encoding: br\r\n", "browser"),
        (b"text/html", b"", "program"),
    ):
        assert b"https://grafana.corp.example/x" in page_of(kind, more, mode)
