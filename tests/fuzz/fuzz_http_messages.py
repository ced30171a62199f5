"""HTTP from either side: heads and bodies, WebSocket frames, paths, cookies, pages, the client's first line.

Input: a byte that says what it is, then the bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import h11
from material import Input, pieces

from pam_agent.protocols.base import ClientProtocolError, TargetProtocolError
from pam_agent.protocols.http.cookies import Jar
from pam_agent.protocols.http.door import parse_preamble
from pam_agent.protocols.http.forms import find_form
from pam_agent.protocols.http.frames import Frames
from pam_agent.protocols.http.links import LinkRewriter
from pam_agent.protocols.http.paths import Pattern, normalise, split
from pam_agent.protocols.http.redact import REDACTED, Redactor
from pam_agent.protocols.http.rewrite import Origins, RequestRewriter, response_fields
from pam_agent.protocols.http.rules import Rule, RuleError, Rules
from pam_agent.protocols.http.wire import (
    PIECE,
    Inbox,
    Machine,
    Request,
    Response,
    request_of,
    response_of,
    without,
)

SECRET = "correct horse battery"
ORIGINS = Origins("http://viewer.app.localhost:41234", "https://app.corp.example")
REDACTOR = Redactor([SECRET], ["x-key"], list)
REWRITER = RequestRewriter(
    ORIGINS.own, (("X-User", "alice"),), (("Authorization", "Bearer t"),), identified=True, restricted=True
)
RULES = Rules(deny=(Rule(paths=(Pattern("/admin/**"),)),))


def TestOneInput(data: bytes) -> None:
    source = Input(data)
    kinds = (_requests, _answer, _frames, _path, _preamble, _cookie, _page)
    kinds[source.byte() % len(kinds)](source.rest())


def seeds() -> Iterator[bytes]:
    head, own = b" HTTP/1.1\r\nHost: x\r\n", b"//app.corp.example/"
    yield b"\0POST /a?b" + head + b"X_User: root\r\nContent-Length: 2\r\n\r\nokGET /" + head + b"\r\n"
    yield b"\0PUT /" + head + b"Transfer-Encoding: chunked\r\n\r\n2;a=b\r\nok\r\n0\r\nT: u\r\n\r\n"
    yield b"\0GET /" + head + b"Connection: Upgrade, X\r\nUpgrade: websocket\r\nCookie: __pam=a; b=c\r\n\r\n"
    yield b"\1HTTP/1.1 200 OK\r\nSet-Cookie: a=b; Secure\r\nLocation: " + own + b"\r\n\r\nuntil the end"
    ok = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nRefresh: 0; url=" + own + b"\r\n\r\nok"
    yield b"\1HTTP/1.1 103 Early\r\n\r\n" + ok
    yield b"\2\x81\x82\1\2\3\4`f\x02\x83\1\2\3\4ace\x80\x80\1\2\3\4\x88\x80\1\2\3\4"
    yield b"\3/a/../%61dmin;x/./b//c\\d?e"
    yield b'\4{"v":1,"mode":"program","origin":"http://127.0.0.1:1"}'
    yield b"\5a=b; Expires=Thu, 01 Jan 1970 00:16:50 GMT; Max-Age=5; Domain=corp.example; SameSite=Lax"
    yield b"\6<form action=x><input name=u><input type=hidden name=h value='" + own + b"'></form>"


# --- messages --------------------------------------------------------------------------------------------


def _requests(data: bytes) -> None:
    whole, split_ = _read_requests([data]), _read_requests(pieces(data))
    assert whole == split_
    for request, _ in whole:
        _rewritten(request)


def _read_requests(chunks: Iterable[bytes]) -> list[tuple[Request, bytes]]:
    inbox = Inbox(_puller(chunks), ClientProtocolError)
    found = []
    try:
        while True:
            machine = Machine("server")
            event = inbox.begin(machine)
            if event is None:
                return found
            request = request_of(event)
            found.append((request, _body(inbox, machine)))
    except ClientProtocolError:
        return found


def _rewritten(request: Request) -> None:
    fields = REWRITER.fields(request, ORIGINS.local, "/", Jar("app.corp.example", secure=True), page=False)
    assert [value for name, value in fields if name.lower().replace(b"_", b"-") == b"x-user"] == [b"alice"]
    assert [value for name, value in fields if name.lower() == b"authorization"] == [b"Bearer t"]
    assert not any(b"__pam=" in value for name, value in fields if name == b"Cookie")
    # What is written for the app has one reading, and says the same.
    machine = Machine("client")
    written = machine.send(h11.Request(method=request.method, target=request.target, headers=fields))
    reader = Machine("server")
    event = Inbox(_puller([written]), ClientProtocolError).begin(reader)
    again = request_of(event)
    assert (again.method, again.target, again.fields) == (request.method, request.target, fields)
    REDACTOR.fields(fields)


def _answer(data: bytes) -> None:
    whole, split_ = _read_answer([data]), _read_answer(pieces(data))
    assert whole == split_
    if whole is not None:
        jar = Jar("app.corp.example", secure=True, hide=frozenset({"sid"}))
        fields = response_fields(whole[0], "/", ORIGINS, jar, injected=True)
        names = {name.lower() for name, _ in fields}
        assert not names & {b"connection", b"strict-transport-security", b"www-authenticate"}
        writer = Machine("server")
        writer.feed(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        writer.next()
        fields = without(fields, b"content-length")
        assert writer.send(h11.Response(status_code=whole[0].status, headers=fields))


def _read_answer(chunks: Iterable[bytes]) -> tuple[Response, bytes] | None:
    machine = Machine("client")
    machine.send(h11.Request(method="GET", target="/", headers=[("Host", "x")]))
    machine.send(h11.EndOfMessage())
    inbox = Inbox(_puller(chunks), TargetProtocolError)
    try:
        while True:
            event = inbox.begin(machine)
            if event is None:
                return None
            response = response_of(event)
            if response.status >= 200:
                return response, _body(inbox, machine)
            if response.status == 101:
                return None
    except TargetProtocolError:
        return None


def _puller(chunks: Iterable[bytes]) -> Callable[[], bytes]:
    given = iter([chunk for chunk in chunks if chunk])
    return lambda: next(given, b"")


def _body(inbox: Inbox, machine: Machine) -> bytes:
    parts = []
    while (piece := inbox.piece(machine)) is not None:
        assert len(piece) <= PIECE
        parts.append(piece)
    return b"".join(parts)


# --- the rest --------------------------------------------------------------------------------------------


def _frames(data: bytes) -> None:
    assert _fed([data]) == _fed(pieces(data))


def _fed(chunks: Iterable[bytes]) -> tuple[list[tuple[object, object]], bool]:
    frames = Frames(1, "up", 1 << 20, REDACTOR, Rules())
    messages: list[tuple[object, object]] = []
    try:
        for chunk in chunks:
            for event in frames.feed(chunk):
                if not event.get("more"):
                    messages.append((event["opcode"], event["bytes"]))
    except ClientProtocolError:
        # How much of what came before is told depends on what came along with it.
        return [], False
    return messages, frames.at_boundary


def _path(data: bytes) -> None:
    text = "/" + data.decode("latin-1")
    try:
        raw, _query = split(text)
        path = normalise(raw)
    except ClientProtocolError:
        return
    again = normalise(path.sent)
    assert (again.plain, again.sent) == (path.plain, path.sent)
    for reading in (path.plain, path.bare):
        assert not {".", ".."} & set(reading.split("/"))
        assert "//" not in reading
    denied = any(reading.lower().split("/")[1] == "admin" for reading in (path.plain, path.bare))
    try:
        RULES.check("GET", text)
        assert not denied
    except RuleError:
        pass


def _preamble(data: bytes) -> None:
    try:
        preamble = parse_preamble(data)
    except ClientProtocolError:
        return
    assert preamble.origin.startswith("http://")
    assert len(preamble.key) == (32 if preamble.mode == "browser" else 0)


def _cookie(data: bytes) -> None:
    header = data.decode("latin-1")
    jar = Jar("app.corp.example", secure=True, hide=True, clock=lambda: 1e9)
    assert jar.take(header, "/x/y") is None
    kept = jar.header("/x/y", [data])
    assert kept is None or b"\n" not in kept or b"\n" in data
    shown = Jar("app.corp.example", secure=True, clock=lambda: 1e9).take(header, "/x/y")
    assert shown is None or "domain=" not in shown.lower().partition(";")[2] or "domain=" in header.lower()


def _page(data: bytes) -> None:
    whole, split_ = LinkRewriter(ORIGINS), LinkRewriter(ORIGINS)
    parts = b"".join(split_.feed(piece) for piece in pieces(data)) + split_.finish()
    assert whole.feed(data) + whole.finish() == parts
    text = data.decode("utf-8", "replace")
    found = find_form(text, {"u", "p"})
    assert found is None or found.names & {"u", "p"}
    assert SECRET not in REDACTOR.text(f"{text}{SECRET}{text}").replace(REDACTED, "")
    REDACTOR.address(text)
