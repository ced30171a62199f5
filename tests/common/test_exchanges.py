"""Exchanges of recorded HTTP: put together however the events come, and within bounds whatever they are."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pam_common import exchanges as module
from pam_common.exchanges import exchanges


def request(number: int, connection: int = 1, t: float = 1.0, **more: Any) -> dict[str, Any]:
    event = {
        "t": t,
        "c": connection,
        "kind": "request",
        "id": number,
        "method": "GET",
        "url": f"http://a/{number}",
    }
    return {**event, "headers": [["Accept", "*/*"]], "body_bytes": 0, **more}


def response(number: int, connection: int = 1, t: float = 1.5, **more: Any) -> dict[str, Any]:
    event = {"t": t, "c": connection, "kind": "response", "id": number, "status": 200, "reason": "OK"}
    return {**event, "headers": [["Content-Type", "text/plain"]], "ms": 450.0, "body_bytes": 5, **more}


def body(number: int, way: str, connection: int = 1, t: float = 2.0, **more: Any) -> dict[str, Any]:
    return {"t": t, "c": connection, "kind": "body", "id": number, "dir": way, **more}


def test_a_request_and_its_answer() -> None:
    (one,) = exchanges([{"kind": "start", "c": 1, "t": 0}, request(1), response(1, body="hello")])
    assert (one.number, one.connection, one.method, one.url, one.status) == (1, 1, "GET", "http://a/1", 200)
    assert (one.response.size, one.response.text, one.milliseconds) == (5, "hello", 500.0)
    assert one.request.header("accept") == "*/*"
    assert one.refused == ""


def test_bodies_in_pieces() -> None:
    events = [
        request(1, body_bytes=None),
        body(1, "up", bytes=3, data="abc"),
        body(1, "up", bytes=3, done=True, sha256="u"),
        response(1, body_bytes=None),
        body(1, "down", bytes=4, data="defg"),
        body(1, "down", bytes=1 << 30),
        body(1, "down", bytes=1 << 31, done=True, sha256="d", cut=True, t=9.0),
        request(2, t=10.0),
    ]
    one, two = exchanges(events)
    assert (one.request.text, one.request.size, one.request.sha256) == ("abc", 3, "u")
    assert (one.response.text, one.response.size, one.response.sha256) == ("defg", 1 << 31, "d")
    assert one.response.cut
    assert one.milliseconds == 8000.0
    assert two.status == 0


def test_connections_do_not_mix() -> None:
    events = [request(1, 1), request(1, 2, url="http://a/other"), response(1, 2), response(1, 1, status=404)]
    assert [(one.connection, one.status) for one in exchanges(events)] == [(2, 200), (1, 404)]


def test_parts_do_not_mix() -> None:
    events = [request(1, part=1), request(1, part=2), response(1, part=2, status=201)]
    assert [(one.part, one.status) for one in exchanges(events)] == [(2, 201), (1, 0)]


def test_a_refusal_with_and_without_its_request() -> None:
    alone = {
        "t": 1,
        "c": 1,
        "kind": "refused",
        "id": 1,
        "rule": "host",
        "method": "GET",
        "url": "http://a/1",
        "status": 403,
    }
    (one,) = exchanges([alone])
    assert (one.method, one.status, one.refused) == ("GET", 403, "refused by rule: host")
    (one,) = exchanges(
        [request(2), {"t": 2, "c": 1, "kind": "failed", "id": 2, "reason": "gone", "status": 502}]
    )
    assert (one.number, one.method, one.status, one.refused) == (0, "GET", 502, "gone")


def test_what_another_protocol_refused_is_no_exchange() -> None:
    foreign = [
        {"t": 1, "c": 1, "kind": "refused", "reason": 'database "x" is not open to readonly'},
        {"t": 1, "c": 1, "kind": "refused", "ch": 1, "what": "x11-req", "reason": "not allowed"},
        {"t": 1, "c": 2, "kind": "failed", "reason": "gone"},
    ]
    assert list(exchanges(foreign)) == []


def test_a_connection_that_ends_or_goes_on_leaves_what_was_open() -> None:
    events = [request(1), {"t": 3, "c": 1, "kind": "end", "reason": "killed"}]
    assert [one.status for one in exchanges(events)] == [0]
    assert [one.url for one in exchanges([request(1), request(2), response(2)])] == [
        "http://a/1",
        "http://a/2",
    ]


def test_messages_of_a_socket() -> None:
    events = [
        request(1),
        response(1, status=101, body_bytes=None),
        {"t": 2, "c": 1, "kind": "ws", "id": 1, "dir": "up", "opcode": "text", "data": "hi", "bytes": 2},
        {"t": 3, "c": 1, "kind": "ws", "id": 1, "dir": "down", "opcode": "text", "data": "ho", "bytes": 2},
        {"t": 4, "c": 1, "kind": "end"},
    ]
    (one,) = exchanges(events)
    assert [event["data"] for event in one.sockets] == ["hi", "ho"]
    assert (one.socket_messages, one.request.size, one.response.size) == (2, 2, 2)


def test_text_is_left_out_where_nobody_wants_it() -> None:
    (one,) = exchanges([request(1), response(1, body="hello")], keep_text=False)
    assert (one.response.text, one.response.size) == ("", 5)


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_OPEN", 3)
    found = exchanges([request(1, connection) for connection in range(5)])
    assert next(found).connection == 0
    assert len(list(found)) == 4
    monkeypatch.setattr(module, "MAX_TEXT", 10)
    pieces = [body(1, "down", bytes=9, data="x" * 9) for _ in range(3)]
    (one,) = exchanges([request(1), response(1, body_bytes=None), *pieces])
    assert len(one.response.text) == 10
    monkeypatch.setattr(module, "MAX_MESSAGES", 2)
    said = {"t": 2, "c": 1, "kind": "ws", "id": 1, "dir": "up", "opcode": "text", "data": "h", "bytes": 1}
    (one,) = exchanges([request(1), *[said] * 4])
    assert (len(one.sockets), one.socket_messages) == (2, 4)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
EVENTS = st.lists(
    st.fixed_dictionaries(
        {"kind": st.sampled_from(["request", "response", "body", "ws", "refused", "failed", "end", "start"])},
        optional={
            name: st.sampled_from([1, 2]) | JSON
            for name in ("t", "c", "id", "part", "bytes", "body_bytes", "status", "ms", "headers", "data")
        },
    ),
    max_size=30,
)


@settings(deadline=None)
@given(EVENTS)
def test_any_json_is_taken(events: list[dict[str, Any]]) -> None:
    found = list(exchanges(events))
    begun = [event for event in events if event["kind"] in ("request", "refused", "failed")]
    assert len(found) <= len(begun)
    assert sum(event["kind"] == "request" for event in events) <= len(found)
    for one in found:
        assert one.milliseconds >= 0
        assert all(isinstance(value, str) for pair in one.request.headers for value in pair)
