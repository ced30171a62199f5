"""HAR: every field that version 1.2 asks for, whatever was recorded."""

from __future__ import annotations

import json
import math
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pam_client.export.har import har
from pam_common.errors import PamError

SESSION = {"id": "s-abc", "account": "grafana/viewer", "protocol": "http", "started": 1_790_000_000}

_TEXT = {"type": "string"}
_SIZE = {"type": "integer", "minimum": -1}
_PAIRS = {
    "type": "array",
    "items": {"type": "object", "required": ["name", "value"], "properties": {"name": _TEXT, "value": _TEXT}},
}
_TIME = {"type": "number", "minimum": 0}
#: http://www.softwareishard.com/blog/har-12-spec/: what must be there, and of which type.
SCHEMA = {
    "type": "object",
    "required": ["log"],
    "properties": {
        "log": {
            "type": "object",
            "required": ["version", "creator", "entries"],
            "properties": {
                "version": {"const": "1.2"},
                "creator": {"type": "object", "required": ["name", "version"]},
                "pages": {"type": "array"},
                "entries": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "required": [
                            *("startedDateTime", "time", "request", "response", "cache", "timings"),
                        ],
                        "properties": {
                            "startedDateTime": {
                                "type": "string",
                                "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00$",
                            },
                            "time": _TIME,
                            "cache": {"type": "object"},
                            "timings": {
                                "type": "object",
                                "required": ["send", "wait", "receive"],
                                "properties": {"send": _TIME, "wait": _TIME, "receive": _TIME},
                            },
                            "request": {
                                "type": "object",
                                "required": [
                                    *("method", "url", "httpVersion", "cookies", "headers", "queryString"),
                                    *("headersSize", "bodySize"),
                                ],
                                "properties": {
                                    "method": _TEXT,
                                    "url": _TEXT,
                                    "httpVersion": _TEXT,
                                    "cookies": _PAIRS,
                                    "headers": _PAIRS,
                                    "queryString": _PAIRS,
                                    "postData": {
                                        "type": "object",
                                        "required": ["mimeType", "text"],
                                        "properties": {"mimeType": _TEXT, "text": _TEXT, "params": _PAIRS},
                                    },
                                    "headersSize": _SIZE,
                                    "bodySize": _SIZE,
                                },
                            },
                            "response": {
                                "type": "object",
                                "required": [
                                    *("status", "statusText", "httpVersion", "cookies", "headers", "content"),
                                    *("redirectURL", "headersSize", "bodySize"),
                                ],
                                "properties": {
                                    "status": {"type": "integer"},
                                    "statusText": _TEXT,
                                    "httpVersion": _TEXT,
                                    "cookies": _PAIRS,
                                    "headers": _PAIRS,
                                    "content": {
                                        "type": "object",
                                        "required": ["size", "mimeType"],
                                        "properties": {"size": _SIZE, "mimeType": _TEXT, "text": _TEXT},
                                    },
                                    "redirectURL": _TEXT,
                                    "headersSize": _SIZE,
                                    "bodySize": _SIZE,
                                },
                            },
                        },
                    },
                },
            },
        }
    },
}


VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def export(events: list[dict[str, Any]], session: dict[str, Any] = SESSION) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    found: dict[str, Any] = json.loads("".join(har(lambda: iter(events), session, 1)), parse_constant=refuse)
    VALIDATOR.validate(found)
    return found


def recorded() -> list[dict[str, Any]]:
    post = {
        "method": "POST",
        "url": "https://grafana.corp/login?next=%2Fhome&next=2",
        "version": "1.1",
        "headers": [
            ["Content-Type", "application/x-www-form-urlencoded; charset=utf-8"],
            ["Cookie", "theme=[redacted]; lang=[redacted]"],
        ],
        "body": "user=me&password=[redacted]",
        "body_bytes": 27,
    }
    answer = {
        "status": 302,
        "reason": "Found",
        "version": "1.1",
        "headers": [
            ["Location", "/home"],
            ["Content-Type", "text/html"],
            ["Set-Cookie", "sid=[redacted]; Path=/; HttpOnly"],
        ],
        "body": "<p>moved</p>",
        "body_bytes": 12,
        "ms": 125.5,
    }
    image = {"method": "GET", "url": "https://grafana.corp/logo.png", "headers": [], "body_bytes": 0}
    png = {"status": 200, "headers": [["content-type", "image/png"]], "body_bytes": 9, "body_sha256": "abc"}
    socket = {"method": "GET", "url": "https://grafana.corp/live", "headers": [], "body_bytes": 0}
    return [
        {"part": 1, "t": 0.0, "c": 1, "kind": "start"},
        {"part": 1, "t": 1.0, "c": 1, "kind": "request", "id": 1, **post},
        {"part": 1, "t": 1.125, "c": 1, "kind": "response", "id": 1, **answer},
        {"part": 1, "t": 2.0, "c": 2, "kind": "request", "id": 1, **image},
        {"part": 1, "t": 2.5, "c": 2, "kind": "response", "id": 1, **png},
        {"part": 1, "t": 3.0, "c": 1, "kind": "request", "id": 2, **socket},
        {
            "part": 1,
            "t": 3.1,
            "c": 1,
            "kind": "response",
            "id": 2,
            "status": 101,
            "headers": [],
            "body_bytes": None,
        },
        {
            "part": 1,
            "t": 4.0,
            "c": 1,
            "kind": "ws",
            "id": 2,
            "dir": "up",
            "opcode": "text",
            "data": "hi",
            "bytes": 2,
        },
        {
            "part": 1,
            "t": 5.0,
            "c": 1,
            "kind": "ws",
            "id": 2,
            "dir": "down",
            "opcode": "binary",
            "base64": "AA==",
            "bytes": 1,
        },
        {
            "part": 1,
            "t": 6.0,
            "c": 3,
            "kind": "refused",
            "id": 1,
            "rule": "deny any method: /admin/**",
            "method": "GET",
            "url": "https://grafana.corp/admin",
            "status": 403,
        },
    ]


def test_a_session_becomes_entries() -> None:
    log = export(recorded())["log"]
    assert log["comment"] == "grafana/viewer s-abc"
    login, image, refused, socket = log["entries"]
    assert login["startedDateTime"] == "2026-09-21T14:13:21.000+00:00"
    assert (login["time"], login["timings"]) == (125.5, {"send": 0, "wait": 125.0, "receive": 0.5})
    assert login["request"]["queryString"] == [
        {"name": "next", "value": "/home"},
        {"name": "next", "value": "2"},
    ]
    assert [cookie["name"] for cookie in login["request"]["cookies"]] == ["theme", "lang"]
    assert login["request"]["postData"]["params"][0] == {"name": "user", "value": "me"}
    assert login["response"]["cookies"] == [
        {"name": "sid", "value": "[redacted]", "path": "/", "httpOnly": True, "secure": False}
    ]
    assert login["response"]["redirectURL"] == "/home"
    assert login["response"]["content"] == {"size": 12, "mimeType": "text/html", "text": "<p>moved</p>"}
    assert image["response"]["content"] == {
        "size": 9,
        "mimeType": "image/png",
        "comment": "9 bytes, not all of them recorded; sha256 abc",
    }
    assert (refused["response"]["status"], refused["comment"]) == (
        403,
        "refused by rule: deny any method: /admin/**",
    )
    assert socket["_webSocketMessages"] == [
        {"type": "send", "time": 1_790_000_004.0, "opcode": 1, "data": "hi"},
        {"type": "receive", "time": 1_790_000_005.0, "opcode": 2, "data": "AA=="},
    ]


def test_a_recording_without_requests_is_an_empty_log() -> None:
    assert export([])["log"]["entries"] == []
    assert export([{"t": 0, "c": 1, "kind": "query", "sql": "select 1"}])["log"]["entries"] == []


@pytest.mark.parametrize("protocol", ["postgres", "ssh", None])
def test_what_was_no_web_session_is_refused(protocol: str | None) -> None:
    events = [{"t": 1, "c": 1, "kind": "refused", "reason": "not allowed"}]
    with pytest.raises(PamError, match="for web applications") as caught:
        export(events, SESSION | {"protocol": protocol})
    assert "--export ndjson" in caught.value.hint


@pytest.mark.parametrize("started", [None, "soon", True, math.inf, -1e300])
def test_a_session_without_a_time_begins_somewhere(started: Any) -> None:
    assert len(export(recorded(), SESSION | {"started": started})["log"]["entries"]) == 4


def test_a_form_with_too_many_fields_is_kept_as_text() -> None:
    events = recorded()
    events[1]["body"] = "&".join("a=1" for _ in range(2000))
    found = export(events)["log"]["entries"][0]["request"]["postData"]
    assert found["params"] == []
    assert len(found["text"]) > 4000


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from(sorted(recorded()[1])), JSON), max_size=12))
def test_whatever_was_recorded_the_file_is_valid(changes: list[tuple[int, str, Any]]) -> None:
    events = recorded()
    for index, name, value in changes:
        events[index][name] = value
    export(events)
