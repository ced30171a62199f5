"""Heads and bodies: exactly one reading of each, whatever the pieces they come in."""

from __future__ import annotations

import contextlib
import itertools

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pam_agent.protocols.base import ClientProtocolError, TargetProtocolError
from pam_agent.protocols.http import wire
from pam_agent.protocols.http.wire import Inbox, Machine, request_of, response_of


def pieces_of(data: bytes, cuts: list[int]):
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    parts = [data[a:b] for a, b in itertools.pairwise(edges)]
    return lambda: parts.pop(0) if parts else b""


def read_all(data: bytes, cuts: list[int] | None = None):
    """Every request of a stream: [(method, target, body)], and what is left."""
    inbox = Inbox(pieces_of(data, cuts or []), ClientProtocolError)
    found = []
    while True:
        machine = Machine("server")
        event = inbox.begin(machine)
        if event is None:
            return found
        request = request_of(event)
        body = b""
        while (piece := inbox.piece(machine)) is not None:
            body += piece
        found.append((request.method, request.target, body))


STREAM = (
    b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello"
    b"GET /b?c HTTP/1.1\r\nHost: x\r\n\r\n"
    b"PUT /d HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"3\r\nabc\r\nA;x=1\r\n0123456789\r\n0\r\nT: u\r\n\r\n"
    b"GET /e HTTP/1.1\r\nHost: x\r\n\r\n"
)


@given(st.lists(st.integers(0, 10_000), max_size=30))
@settings(deadline=None)
def test_http_wire_any_split_gives_the_same(cuts):
    assert read_all(STREAM, cuts) == [
        ("POST", "/a", b"hello"),
        ("GET", "/b?c", b""),
        ("PUT", "/d", b"abc0123456789"),
        ("GET", "/e", b""),
    ]


SMUGGLED = {
    "both lengths": b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "two lengths that differ": b"Content-Length: 4\r\nContent-Length: 5\r\n\r\nabcde",
    "two lengths that agree": b"Content-Length: 4\r\nContent-Length: 4\r\n\r\nabcd",
    "a list of lengths": b"Content-Length: 4, 4\r\n\r\nabcd",
    "a signed length": b"Content-Length: +4\r\n\r\nabcd",
    "a negative length": b"Content-Length: -1\r\n\r\n",
    "a hexadecimal length": b"Content-Length: 0x4\r\n\r\nabcd",
    "a length with an underscore": b"Content-Length: 1_0\r\n\r\n0123456789",
    "a huge length": b"Content-Length: 99999999999999999999\r\n\r\n",
    "an empty length": b"Content-Length:\r\n\r\n",
    "another coding": b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "identity": b"Transfer-Encoding: identity\r\n\r\n",
    "a coding with a tail": b"Transfer-Encoding: chunked, x\r\n\r\n0\r\n\r\n",
    "a quoted coding": b'Transfer-Encoding: "chunked"\r\n\r\n0\r\n\r\n',
    "two codings": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a coding with a vertical tab": b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "a space before the colon": b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "a folded line": b"X: a\r\n Transfer-Encoding: chunked\r\n\r\n",
    "a line folded by a tab": b"X: a\r\n\tb\r\n\r\n",
    "a folded first line": b" X: a\r\n\r\n",
    "a bare line feed": b"X: a\nTransfer-Encoding: chunked\r\n\r\n",
    "a bare carriage return": b"X: a\rTransfer-Encoding: chunked\r\n\r\n",
    "a NUL": b"X: a\0b\r\n\r\n",
    "a line without a colon": b"nonsense\r\n\r\n",
    "an empty name": b": a\r\n\r\n",
    "a name with a space": b"X Y: a\r\n\r\n",
    "a bad chunk size": b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n\r\n",
    "a signed chunk size": b"Transfer-Encoding: chunked\r\n\r\n+1\r\na\r\n0\r\n\r\n",
    "a chunk size with 0x": b"Transfer-Encoding: chunked\r\n\r\n0x1\r\na\r\n0\r\n\r\n",
    "a chunk size with an underscore": b"Transfer-Encoding: chunked\r\n\r\n1_0\r\n",
    "a chunk size that is too long": b"Transfer-Encoding: chunked\r\n\r\n" + b"0" * 20 + b"1\r\na\r\n",
    "a chunk without its end": b"Transfer-Encoding: chunked\r\n\r\n1\r\naXX0\r\n\r\n",
    "a chunk line ended by a line feed": b"Transfer-Encoding: chunked\r\n\r\n1;\nx\r\na\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("name", SMUGGLED)
def test_http_wire_what_has_two_readings_is_refused(name):
    with pytest.raises(ClientProtocolError):
        read_all(b"POST / HTTP/1.1\r\nHost: x\r\n" + SMUGGLED[name])


@pytest.mark.parametrize(
    "line",
    [
        b"GET  / HTTP/1.1",
        b" GET / HTTP/1.1",
        b"GET / HTTP/1.1 ",
        b"GET /",
        b"GET / HTTP/2.0x",
        b"GET /\x7f HTTP/1.1",
        b"GET /\xc3\xa4 HTTP/1.1",
        b"GET\t/ HTTP/1.1",
        b"",
        b"\x16\x03\x01\x02",
    ],
)
def test_http_wire_a_first_line_that_is_none(line):
    with pytest.raises(ClientProtocolError):
        read_all(line + b"\r\nHost: x\r\n\r\n")


def test_http_wire_a_chunked_message_of_1_0_is_refused():
    with pytest.raises(ClientProtocolError):
        read_all(b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")


def test_http_wire_a_head_is_bounded_in_size():
    head = b"GET / HTTP/1.1\r\nHost: x\r\nX: %b\r\n\r\n"
    room = wire.MAX_HEAD - len(head) + 2
    assert read_all(head % (b"a" * room), [1000])
    with pytest.raises(ClientProtocolError, match="64 KiB"):
        read_all(head % (b"a" * (room + 1)), [1000])

    def endless():
        return b"a" * 1000

    with pytest.raises(ClientProtocolError, match="64 KiB"):
        Inbox(endless, ClientProtocolError).head()


def test_http_wire_a_head_is_bounded_in_fields():
    head = b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: a\r\n" * (wire.MAX_FIELDS - 1) + b"\r\n"
    assert read_all(head)
    with pytest.raises(ClientProtocolError, match="100 header fields"):
        read_all(head[:-2] + b"X: a\r\n\r\n")


def test_http_wire_a_chunk_line_is_bounded():
    head = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1;"
    with pytest.raises(ClientProtocolError, match="too long"):
        read_all(head + b"x" * 200_000)


def test_http_wire_pieces_are_no_larger_than_what_was_read():
    data = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 300000\r\n\r\n" + bytes(300000)
    inbox = Inbox(pieces_of(data, list(range(0, len(data), wire.PIECE))), ClientProtocolError)
    machine = Machine("server")
    inbox.begin(machine)
    sizes = []
    while (piece := inbox.piece(machine)) is not None:
        sizes.append(len(piece))
    assert max(sizes) <= wire.PIECE
    assert sum(sizes) == 300000


def test_http_wire_a_message_that_ends_too_early():
    with pytest.raises(ClientProtocolError):
        read_all(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhell")
    with pytest.raises(ClientProtocolError):
        read_all(b"GET / HTTP/1.1\r\nHost:")


def test_http_wire_errors_hold_nothing_of_the_message():
    with pytest.raises(ClientProtocolError) as caught:
        read_all(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nhunter2\r\n")
    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in repr(caught.value.__cause__)


def test_http_wire_an_answer_until_the_end_of_the_stream():
    machine = Machine("client")
    machine.send(h11.Request(method="GET", target="/", headers=[("Host", "x")]))
    machine.send(h11.EndOfMessage())
    inbox = Inbox(pieces_of(b"HTTP/1.1 200 OK\r\n\r\nall of it", [19, 22]), TargetProtocolError)
    response = response_of(inbox.begin(machine))
    assert (response.chunked, response.length) == (False, None)
    body = b""
    while (piece := inbox.piece(machine)) is not None:
        body += piece
    assert body == b"all of it"


@given(st.binary(max_size=400))
@settings(max_examples=300, deadline=None)
def test_http_wire_nothing_but_documented_errors(data):
    chunked = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    for prefix in (b"", b"GET / HTTP/1.1\r\nHost: x\r\n", chunked):
        with contextlib.suppress(ClientProtocolError):
            read_all(prefix + data)


NAMES = st.from_regex(r"[A-Za-z0-9-]{1,20}", fullmatch=True)
VALUES = st.from_regex(r"[!-~]([ -~]{0,30}[!-~])?", fullmatch=True)


@given(st.lists(st.tuples(NAMES, VALUES), max_size=20), st.binary(max_size=2000), st.booleans())
@settings(max_examples=150, deadline=None)
def test_http_wire_what_is_written_is_read_the_same(fields, body, chunked):
    """What one machine writes, another reads alike: the app sees what was checked."""
    framing = {"content-length", "transfer-encoding", "connection", "upgrade", "host", "expect"}
    fields = [(n, v) for n, v in fields if n.lower() not in framing]
    length = ("Transfer-Encoding", "chunked") if chunked else ("Content-Length", str(len(body)))
    writer = Machine("client")
    data = writer.send(h11.Request(method="POST", target="/x", headers=[("Host", "h"), length, *fields]))
    data += (writer.send(h11.Data(data=body)) if body else b"") + writer.send(h11.EndOfMessage())
    inbox = Inbox(pieces_of(data, [7, 90]), ClientProtocolError)
    machine = Machine("server")
    request = request_of(inbox.begin(machine))
    assert [(n.decode(), v.decode()) for n, v in request.fields[2:]] == fields
    got = b""
    while (piece := inbox.piece(machine)) is not None:
        got += piece
    assert got == body
