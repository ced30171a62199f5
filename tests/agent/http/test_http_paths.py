"""One form of each path, and rules that hold for every reading of it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pam_agent.protocols.base import ClientProtocolError
from pam_agent.protocols.http.paths import AmbiguousPathError, Pattern, normalise, split
from pam_agent.protocols.http.rules import Rule, RuleError, Rules


@pytest.mark.parametrize(
    ("raw", "plain"),
    [
        ("/", "/"),
        ("/a/b", "/a/b"),
        ("/a/", "/a/"),
        ("//a///b//", "/a/b/"),
        ("/a/./b/.", "/a/b/"),
        ("/a/../b", "/b"),
        ("/../../a", "/a"),
        ("/a/b/..", "/a/"),
        ("/%61%2e%2E/b", "/a../b"),
        ("/%2e%2e/b", "/b"),
        ("/a\\b", "/a/b"),
        ("/a/..\\..\\b", "/b"),
        ("/caf%c3%A9", "/café"),
        ("/a b", "/a b"),
        ("/a;v=1/b", "/a;v=1/b"),
        ("/%3F%23", "/?#"),
    ],
)
def test_http_paths_have_one_form(raw, plain):
    path = normalise(raw)
    assert path.plain == plain
    assert normalise(path.sent).plain == plain


@pytest.mark.parametrize(
    "raw",
    [
        "/a%2fb",
        "/a%2Fb",
        "/%5cb",
        "/a%00",
        "/%252e%252e/a",
        "/a%",
        "/a%zz",
        "/a%1",
        "/%ff",
        "/%c0%ae%c0%ae/a",
        "/a%0d%0ab",
        "/a%7f",
        "/a/..;/b",
        "/a/.;x/b",
        "/a/;x/b",
        "/..;x",
    ],
)
def test_http_paths_that_could_be_read_otherwise_are_refused(raw):
    with pytest.raises(AmbiguousPathError):
        normalise(raw)


@given(st.text(alphabet="ab./\\;%2eE5cfF0é ~+&", max_size=40))
@settings(max_examples=500, deadline=None)
def test_http_paths_normalising_twice_changes_nothing(text):
    try:
        path = normalise("/" + text)
    except AmbiguousPathError:
        return
    again = normalise(path.sent)
    assert (again.plain, again.bare, again.sent) == (path.plain, path.bare, path.sent)
    assert path.sent.isascii()
    for reading in (path.plain, path.bare):
        segments = reading.split("/")
        assert segments[0] == ""
        assert "" not in segments[1:-1]
        assert not {".", ".."} & set(segments)
        assert "\\" not in reading


@pytest.mark.parametrize("target", ["*", "http://x/", "x", "", "/a b", "/ä", "/a#b", "/a\x7f", "/a\n"])
def test_http_addresses_that_are_none(target):
    with pytest.raises(ClientProtocolError):
        split(target)


@pytest.mark.parametrize(
    ("pattern", "allowed", "not_allowed"),
    [
        ("/**", ["/", "/a", "/a/b/"], []),
        ("/a/**", ["/a", "/a/", "/a/b", "/a/b/c"], ["/", "/ab", "/A/b", "/b/a/"]),
        ("/a/*", ["/a/b", "/a/"], ["/a/b/c", "/a"]),
        ("/a/*/c", ["/a/b/c"], ["/a/c", "/a/b/b/c"]),
        ("/a/**/c", ["/a/b/c", "/a/b/b/c"], ["/a/c/d"]),
        ("/a.js", ["/a.js"], ["/abjs", "/a.jsx"]),
        ("/*.js", ["/a.js"], ["/b/a.js"]),
    ],
)
def test_http_patterns(pattern, allowed, not_allowed):
    one = Pattern(pattern)
    for text in allowed:
        assert one.allows(normalise(text)), text
    for text in not_allowed:
        assert not one.allows(normalise(text)), text


DENIED = [
    "/admin",
    "/admin/",
    "/admin/users",
    "//admin/users",
    "/./admin/users",
    "/x/../admin/users",
    "/%61dmin/users",
    "/x/%2e%2e/admin/users",
    "/ADMIN/users",
    "/Admin",
    "/admin;x=1/users",
    "/admin;/users",
    "/x\\..\\admin\\users",
    "/admin/?x=/public",
    "/admin/../admin/./users",
]


@pytest.mark.parametrize("target", DENIED)
def test_http_rules_deny_however_it_is_written(target):
    rules = Rules(deny=(Rule(paths=(Pattern("/admin/**"),)),))
    with pytest.raises(RuleError) as refused:
        rules.check("GET", target)
    assert refused.value.rule == "deny any method: /admin/**"
    assert refused.value.status == 403


@pytest.mark.parametrize("method", ["DELETE", "delete", "Delete"])
def test_http_rules_deny_a_method_however_it_is_written(method):
    """Many frameworks take ``delete`` for ``DELETE``."""
    rules = Rules(deny=(Rule(methods=frozenset({"DELETE"})),))
    with pytest.raises(RuleError) as refused:
        rules.check(method, "/users/1")
    assert refused.value.rule == "deny DELETE: any path"
    assert rules.check("GET", "/users/1") == "/users/1"


def test_http_rules_allow_only_what_every_reading_allows():
    rules = Rules(allow=(Rule(frozenset({"GET"}), (Pattern("/pub/**"),)),))
    assert rules.check("GET", "/pub/x?q=/admin") == "/pub/x?q=/admin"
    assert rules.check("GET", "/pub/a;v=1") == "/pub/a;v=1"
    for method, target in [
        ("POST", "/pub/x"),
        ("get", "/pub/x"),
        ("GET", "/PUB/x"),
        ("GET", "/pub/../admin"),
        ("GET", "/pub;x"),
        ("GET", "/pub;/x"),
        ("GET", "/x"),
    ]:
        with pytest.raises(RuleError) as refused:
            rules.check(method, target)
        assert refused.value.rule == "no allow rule"
    with pytest.raises(RuleError) as refused:
        rules.check("GET", "/pub/%2e%2e%2fadmin")
    assert refused.value.rule == "ambiguous path"


def test_http_rules_send_what_they_checked():
    rules = Rules(deny=(Rule(paths=(Pattern("/admin/**"),)),))
    assert rules.check("GET", "/a//b/../c%20d?x=%2f") == "/a/c%20d?x=%2f"
    # Without rules an address is the app's own business.
    assert Rules().check("GET", "/a//b/../c%2fd") == "/a//b/../c%2fd"


def test_http_rules_that_allow_nothing():
    with pytest.raises(RuleError):
        Rules(allow=()).check("GET", "/")


def test_http_rules_about_sizes():
    rules = Rules(max_request=10)
    rules.check_size(10)
    with pytest.raises(RuleError) as refused:
        rules.check_size(11)
    assert (refused.value.rule, refused.value.status) == ("max_request 10", 413)


SEGMENTS = st.lists(st.sampled_from(["admin", "x", "..", ".", "", "%61dmin", "a;b", "%2e%2e"]), max_size=6)


@given(SEGMENTS)
@settings(max_examples=500, deadline=None)
def test_http_rules_hold_for_an_app_that_decodes_and_resolves(segments):
    """Whatever is let through, an app that decodes once and resolves dots does not get to /admin."""
    rules = Rules(deny=(Rule(paths=(Pattern("/admin/**"),)),))
    try:
        sent = rules.check("GET", "/" + "/".join(segments))
    except RuleError:
        return
    from urllib.parse import unquote

    kept: list[str] = []
    for segment in unquote(sent).split("/"):
        if segment == "..":
            del kept[-1:]
        elif segment not in ("", "."):
            kept.append(segment.partition(";")[0])
    assert kept[:1] != ["admin"]


# --- through the interceptor -----------------------------------------------------------------------------

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
ACCOUNT = {
    "rules": {
        "allow": [
            {"methods": ["GET", "HEAD"], "paths": ["/**"]},
            {"methods": ["POST"], "paths": ["/api/**"]},
        ],
        "deny": [{"paths": ["/admin/**"]}],
        "max_request": 1000,
    }
}


def test_http_a_refusal_is_a_page_that_names_the_rule_and_an_event(make_gate, make_app, ask):
    app = make_app(OK)
    gate = make_gate(app.port, account=ACCOUNT)
    end = b" HTTP/1.1\r\nHost: HOST\r\n\r\n"
    answer = ask(gate, b"GET /x/../admin/" + end + b"DELETE /a" + end + b"GET /ok HTTP/1.0" + end[9:])
    assert answer.count(b"HTTP/1.1 403 Forbidden") == 2
    assert b"rule: deny any method: /admin/**" in answer
    assert b"rule: no allow rule" in answer
    assert answer.endswith(b"ok")  # the connection goes on
    assert [head.split()[1] for head in app.received] == [b"/ok"]
    assert [(e["rule"], e["method"]) for e in gate.of("refused")] == [
        ("deny any method: /admin/**", "GET"),
        ("no allow rule", "DELETE"),
    ]


def test_http_methods_that_have_no_place(make_gate, make_app, ask):
    app = make_app(OK)
    gate = make_gate(app.port)
    for request in (b"CONNECT x:80", b"TRACE /", b"trace /", b"GET http://x/", b"OPTIONS *"):
        answer = ask(gate, request + b" HTTP/1.1\r\nHost: HOST\r\nConnection: close\r\n\r\n")
        assert answer[9:12] in (b"405", b"400"), answer
    assert not app.received


def test_http_too_large_a_request_is_refused_before_it_is_sent(make_gate, make_app, ask):
    app = make_app(OK)
    gate = make_gate(app.port, account=ACCOUNT)
    answer = ask(gate, b"POST /api/ HTTP/1.1\r\nHost: HOST\r\nContent-Length: 1001\r\n\r\n", end=False)
    assert answer.startswith(b"HTTP/1.1 413")
    assert not app.received
    body = b"1f4\r\n" + bytes(500) + b"\r\n1f5\r\n" + bytes(501) + b"\r\n0\r\n\r\n"
    answer = ask(
        gate, b"POST /api/ HTTP/1.1\r\nHost: HOST\r\nTransfer-Encoding: chunked\r\n\r\n" + body, end=True
    )
    assert answer.startswith(b"HTTP/1.1 413")
    assert not app.received


def test_http_a_stream_that_grows_too_large_is_cut(make_gate, make_app):
    def serve(sock, app):
        app.read_head(sock)
        while sock.recv(65536):
            pass

    account = {"rules": {"max_request": 200_000}}
    gate = make_gate(make_app(serve).port, account=account)
    with gate.connect() as sock:
        head = f"POST / HTTP/1.1\r\nHost: {gate.host}\r\nTransfer-Encoding: chunked\r\n\r\n"
        sock.sendall(head.encode())
        for _ in range(5):
            sock.sendall(b"10000\r\n" + bytes(65536) + b"\r\n")
        answer = b""
        while b"</html>" not in answer:
            answer += sock.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"max_request 200000" in answer
    gate.wait_done()
    (last,) = [e for e in gate.of("body") if e.get("done")]
    assert last["cut"] is True
    assert last["bytes"] <= 200_000


def test_http_headers_that_would_change_the_method_or_path_are_dropped(make_gate, make_app, ask):
    app = make_app(OK)
    fields = b"X-HTTP-Method-Override: DELETE\r\nX_Original_URL: /admin\r\nX-Rewrite-Url: /admin\r\n"
    for account, kept in ((ACCOUNT, False), ({}, True)):
        gate = make_gate(app.port, account=account)
        ask(gate, b"GET / HTTP/1.1\r\nHost: HOST\r\nConnection: close\r\n" + fields + b"\r\n")
        assert (b"DELETE" in app.received[-1]) is kept
        assert (b"/admin" in app.received[-1]) is kept
