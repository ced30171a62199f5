"""Scripted conversations without sockets: what is recorded, and which answer belongs to which query."""

from __future__ import annotations

import hashlib
import json
import struct
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pam_agent.protocols.base import ClientProtocolError, TargetProtocolError
from pam_agent.protocols.postgres import pipeline as pipelines
from pam_agent.protocols.postgres.client_side import ClientSide
from pam_agent.protocols.postgres.codec import CLIENT_KINDS, TARGET_KINDS, error_response, message
from pam_agent.protocols.postgres.framing import Framer
from pam_agent.protocols.postgres.pipeline import Pipeline
from pam_agent.protocols.postgres.target_side import TargetSide


def u16(*numbers):
    return b"".join(struct.pack("!H", number) for number in numbers)


def u32(*numbers):
    return b"".join(struct.pack("!I", number) for number in numbers)


def query(sql):
    return message(b"Q", sql.encode() + b"\0")


def parse(name, sql, *types):
    body = name.encode() + b"\0" + sql.encode() + b"\0"
    return message(b"P", body + u16(len(types)) + u32(*types))


def bind(portal, statement, *values, formats=(), results=()):
    body = portal.encode() + b"\0" + statement.encode() + b"\0" + u16(len(formats), *formats)
    body += u16(len(values))
    for value in values:
        body += struct.pack("!i", -1) if value is None else u32(len(value)) + value
    return message(b"B", body + u16(len(results), *results))


def execute(portal="", most=0):
    return message(b"E", portal.encode() + b"\0" + u32(most))


def describe(what, name=""):
    return message(b"D", what.encode() + name.encode() + b"\0")


def close(what, name):
    return message(b"C", what.encode() + name.encode() + b"\0")


def columns(*pairs):
    body = u16(len(pairs))
    for name, type_ in pairs:
        body += name.encode() + b"\0" + struct.pack("!IHIhih", 0, 0, type_, 4, -1, 0)
    return message(b"T", body)


def row(*values):
    body = u16(len(values))
    for value in values:
        body += struct.pack("!i", -1) if value is None else u32(len(value)) + value
    return message(b"D", body)


def done(tag):
    return message(b"C", tag.encode() + b"\0")


def error(code="42601", text="wrong", severity="ERROR"):
    return error_response(code, text, severity=severity)


SYNC, FLUSH = message(b"S"), message(b"H")
PARSED, BOUND, CLOSED, NO_DATA, SUSPENDED = (message(kind) for kind in (b"1", b"2", b"3", b"n", b"s"))
READY, IN_TRANSACTION = message(b"Z", b"I"), message(b"Z", b"T")
COPY_IN, COPY_OUT = message(b"G", b"\0\0\1\0\0"), message(b"H", b"\0\0\1\0\0")
COPY_DONE, COPY_FAIL = message(b"c"), message(b"f", b"no\0")


class Play:
    """Both sides of one connection; ``client`` and ``target`` feed bytes and give the events."""

    def __init__(self, rows_bytes=1000):
        self.now = 0.0
        self.pipeline = Pipeline()
        self._client = ClientSide(self.pipeline, lambda: self.now, rows_bytes)
        self._target = TargetSide(self.pipeline, rows_bytes, lambda: self.now)
        self._up = Framer(CLIENT_KINDS, frozenset(b"d"), self._client, ClientProtocolError)
        self._down = Framer(TARGET_KINDS, frozenset(b"Dd"), self._target, TargetProtocolError)
        self.events = []

    def _feed(self, framer, side, parts):
        data = b"".join(parts)
        assert framer.feed(data, len(data)) == len(data)
        events = side.take_events()
        self.events += events
        for event in events:
            assert len(json.dumps(event)) < 1 << 20
        return events

    def client(self, *parts):
        return self._feed(self._up, self._client, parts)

    def target(self, *parts):
        return self._feed(self._down, self._target, parts)

    def of(self, kind):
        return [event for event in self.events if event["kind"] == kind]


@pytest.fixture
def play():
    return Play()


def test_postgres_simple_query_with_several_statements(play):
    assert play.client(query("select 1; select 2")) == [
        {"kind": "query", "id": 1, "mode": "simple", "sql": "select 1; select 2"}
    ]
    play.now = 0.25
    events = play.target(
        columns(("a", 23)),
        row(b"1"),
        done("SELECT 1"),
        columns(("b", 23)),
        row(b"2"),
        done("SELECT 1"),
        READY,
    )
    assert events == [
        {"kind": "rows", "id": 1, "columns": [["a", 23]], "rows": [["1"]]},
        {"kind": "result", "id": 1, "tag": "SELECT 1", "ms": 250.0, "bytes": 7, "rows": 1},
        {"kind": "rows", "id": 1, "columns": [["b", 23]], "rows": [["2"]]},
        {"kind": "result", "id": 1, "tag": "SELECT 1", "ms": 0.0, "bytes": 7, "rows": 1},
    ]


def test_postgres_one_event_for_parse_bind_execute(play):
    events = play.client(
        parse("", "select $1, $2", 23, 25), bind("", "", b"\0\0\0\7", b"x", formats=(1, 0)), execute(), SYNC
    )
    assert events == [
        {
            "kind": "query",
            "id": 1,
            "mode": "extended",
            "sql": "select $1, $2",
            "statement": 1,
            "params": ["7", "x"],
        }
    ]
    assert [e["kind"] for e in play.target(PARSED, BOUND, row(b"7"), done("SELECT 1"), READY)] == [
        "rows",
        "result",
    ]


def test_postgres_parse_and_bind_alone_are_recorded_at_once(play):
    assert play.client(parse("s", "select $1"), describe("S", "s"), FLUSH) == [
        {"kind": "parse", "statement": 1, "name": "s", "sql": "select $1"}
    ]
    play.target(PARSED, message(b"t", u16(1) + u32(23)), columns(("a", 23)))
    assert play.client(bind("p", "s", b"\0\0\0\5", formats=(1,), results=(1,)), FLUSH) == [
        {
            "kind": "bind",
            "sql": "select $1",
            "statement": 1,
            "name": "s",
            "portal": "p",
            "params": ["5"],
        }
    ]
    play.target(BOUND)
    play.client(execute("p", 1), SYNC)
    events = play.target(row(b"\0\0\0\5"), SUSPENDED, READY)
    assert events[0]["rows"] == [["5"]]
    assert events[1]["suspended"]


def test_postgres_pipeline_error_skips_to_sync(play):
    play.client(
        parse("", "select 1"), bind("", ""), execute(),
        parse("", "bad"), bind("", ""), execute(),
        parse("", "select 3"), bind("", ""), execute(), SYNC,
        parse("", "select 4"), bind("", ""), execute(), SYNC,
    )  # fmt: skip
    play.target(PARSED, BOUND, done("SELECT 1"), error(), READY)
    play.target(PARSED, BOUND, row(b"4"), done("SELECT 4"), READY)
    assert play.of("skipped") == [{"kind": "skipped", "ids": [2, 3]}]
    assert [(e["id"], e.get("tag")) for e in play.of("result")] == [
        (1, "SELECT 1"),
        (None, None),
        (4, "SELECT 4"),
    ]
    assert play.of("result")[1]["statement"] == 2
    assert play.of("rows")[0]["id"] == 4
    assert play.of("unmatched") == []


def test_postgres_what_comes_while_the_server_skips_is_marked(play):
    play.client(parse("", "bad"), FLUSH)
    play.target(error())
    events = play.client(bind("", ""), execute(), query("select 1"), SYNC, query("select 2"))
    assert [event.get("skipped") for event in events if event["kind"] == "query"] == [True, True, None]
    play.target(READY, done("SELECT 2"), READY)
    assert play.of("result")[-1]["id"] == 3


def test_postgres_error_at_commit_belongs_to_the_sync(play):
    play.client(parse("", "insert"), bind("", ""), execute(), SYNC, query("select 1"))
    play.target(PARSED, BOUND, done("INSERT 0 1"), error("23503"), READY, done("SELECT 1"), READY)
    assert [(e["id"], "error" in e) for e in play.of("result")] == [(1, False), (None, True), (2, False)]


def test_postgres_a_failed_parse_does_not_rename_a_statement(play):
    """Parse of a name that is taken fails; a pipelined Bind then runs the old text. Recorded as such."""
    play.client(parse("s", "drop table t"), SYNC)
    play.target(PARSED, READY)
    play.client(parse("s", "select 1"), SYNC, bind("", "s"), execute(), SYNC)
    assert play.of("query")[-1]["sql"] == "select 1"
    play.target(error("42P05"), READY, BOUND, done("DROP TABLE"), READY)
    (correction,) = play.of("correction")
    assert (correction["id"], correction["sql"], correction["statement"]) == (1, "drop table t", 1)
    play.client(bind("", "s"), execute(), SYNC)
    assert play.of("query")[-1]["sql"] == "drop table t"


def test_postgres_a_statement_made_by_sql_is_said_to_be_unknown(play):
    play.client(query("prepare s as drop table t"))
    play.target(done("PREPARE"), READY)
    (event,) = play.client(bind("", "s"), execute(), SYNC)
    assert (event["sql"], event["name"]) == (None, "s")
    play.target(BOUND, done("DROP TABLE"), READY)
    assert play.of("correction") == []
    play.client(parse("t", "select 1"), bind("", "t"), execute(), SYNC)
    assert play.of("query")[-1]["uncertain"]


def test_postgres_closed_names_are_forgotten(play):
    play.client(parse("s", "select 1"), SYNC)
    play.target(PARSED, READY)
    play.client(close("S", "s"), SYNC)
    play.target(CLOSED, READY)
    play.client(bind("", "s"), execute(), SYNC)
    assert play.of("query")[-1]["sql"] is None
    play.client(query("discard all"))


def test_postgres_copy_in_extended_swallows_the_sync(play):
    """libpq sends Execute and Sync together, the copy, and another Sync: one ReadyForQuery in all."""
    play.client(parse("", "copy t from stdin"), bind("", ""), execute(), SYNC)
    play.target(PARSED, BOUND, COPY_IN)
    play.client(message(b"d", b"1\n"), SYNC, message(b"d", b"2\n"), COPY_DONE, SYNC)
    play.target(done("COPY 2"), READY)
    play.client(query("select 1"))
    play.target(row(b"1"), done("SELECT 1"), READY)
    assert [(e["id"], e["tag"]) for e in play.of("result")] == [(1, "COPY 2"), (2, "SELECT 1")]
    copied = play.of("result")[0]
    assert (copied["copy"], copied["bytes"], copied["messages"]) == ("in", 4, 2)
    assert [event["data"] for event in play.of("rows")[:2]] == ["1\n", "2\n"]


def copies(events):
    return [
        (event["id"], event["messages"], event["bytes"])
        for event in events
        if event["kind"] == "result" and "copy" in event
    ]


def data_of(events):
    return [
        (event["id"], event.get("early", False), event["data"])
        for event in events
        if event["kind"] == "rows" and "data" in event
    ]


def test_postgres_copy_sent_without_waiting(play):
    play.client(
        parse("", "copy t from stdin"), bind("", ""), execute(), message(b"d", b"1\n"), COPY_DONE, SYNC,
        query("select 1"),
    )  # fmt: skip
    play.target(PARSED, BOUND, COPY_IN, done("COPY 1"), READY, done("SELECT 1"), READY)
    assert [(e["id"], e["tag"]) for e in play.of("result")] == [(1, "COPY 1"), (2, "SELECT 1")]
    assert copies(play.events) == [(1, 1, 2)]
    assert data_of(play.events) == [(1, True, "1\n")]
    assert play.of("unmatched") == []


def test_postgres_copy_data_before_the_answer_is_counted_and_hashed():
    """Part of it comes before the target has asked for it, part after: one copy, one budget, one digest."""
    play = Play(rows_bytes=4)
    parts = [message(b"d", b"%d\n" % number) for number in range(5)]
    play.client(query("copy t from stdin"), *parts[:3], parts[3][:6])  # the last one not whole
    play.target(COPY_IN)
    play.client(parts[3][6:], parts[4], COPY_DONE)
    play.target(done("COPY 5"), READY)
    assert data_of(play.events) == [(1, True, "0\n1\n")]
    (result,) = play.of("result")
    assert (result["copy"], result["messages"], result["bytes"]) == ("in", 5, 10)
    assert result["unrecorded_bytes"] == 21
    assert result["unrecorded_sha256"] == hashlib.sha256(b"".join(parts[2:])).hexdigest()


def test_postgres_copies_one_after_the_other_without_waiting(play):
    one, two = query("copy t from stdin"), query("copy u from stdin")
    play.client(one, message(b"d", b"1\n"), COPY_DONE, two, message(b"d", b"22\n"), COPY_DONE)
    play.target(COPY_IN, done("COPY 1"), READY)
    play.client(query("select 3"))
    play.target(COPY_IN, done("COPY 1"), READY, done("SELECT 3"), READY)
    assert data_of(play.events) == [(1, True, "1\n"), (2, True, "22\n")]
    assert copies(play.events) == [(1, 1, 2), (2, 1, 3)]
    assert play.of("result")[-1]["id"] == 3


@pytest.mark.parametrize("waits", [True, False])
def test_postgres_copies_of_one_query(play, waits):
    """Each end of a copy ends one, and what is sent behind the last is not taken for more of its data."""
    parts = [message(b"d", b"1\n"), COPY_DONE, message(b"d", b"22\n"), COPY_DONE]
    play.client(query("copy t from stdin; copy u from stdin"), *([] if waits else [*parts, SYNC, query("x")]))
    play.target(COPY_IN)
    play.client(*(parts[:2] if waits else []))
    play.target(done("COPY 1"), COPY_IN)
    play.client(*([*parts[2:], SYNC, query("x")] if waits else []))
    play.target(done("COPY 1"), READY, READY, error(), READY)
    assert [event["id"] for event in play.of("result")] == [1, 1, 2]
    assert sum(size for _, _, size in copies(play.events)) == 5
    assert play.of("unmatched") == []


def test_postgres_copy_data_that_the_target_ignored_is_not_said_to_be_copied(play):
    data = message(b"d", b"1\n")
    play.client(query("copy nothing from stdin"), data, COPY_DONE)
    play.target(error(), READY)
    play.client(data)  # nobody asked for anything
    play.client(query("select 1"), data, COPY_DONE)
    play.target(done("SELECT 1"), READY)
    play.client(parse("", "wrong"), bind("", ""), execute(), data, COPY_DONE, SYNC, query("select 2"))
    play.target(error(), READY, done("SELECT 2"), READY)
    assert data_of(play.events) == [(1, True, "1\n"), (2, True, "1\n"), (3, True, "1\n")]
    assert copies(play.events) == []
    assert [event["id"] for event in play.of("result")] == [1, 2, None, 4]


def test_postgres_what_a_replica_says_is_no_copy_into_the_target(play):
    play.client(query("start_replication 0/0"))
    play.target(message(b"W", b"\0\0\0"), message(b"d", b"wal"))
    assert play.client(message(b"d", b"status")) == []


def test_postgres_a_sync_with_bad_copy_data_ends_the_skipping(play):
    """The server fails at the data and takes the Sync behind it, which it would ignore in a good copy."""
    play.client(parse("", "copy t from stdin"), bind("", ""), execute(), FLUSH)
    play.target(PARSED, BOUND, COPY_IN)
    play.client(message(b"d", b"not a number\n"), SYNC)
    play.target(error("22P02"), READY)
    (event,) = play.client(query("delete from payroll"))
    assert "skipped" not in event
    play.target(done("DELETE 50"), READY)
    play.client(parse("", "delete from payroll"), bind("", ""), execute(), FLUSH)
    assert play.of("query")[-1]["sql"] == "delete from payroll"
    play.target(PARSED, BOUND, error())
    (event,) = play.client(query("select 1"))
    assert event["skipped"]
    play.client(SYNC)
    play.target(READY)
    assert "skipped" not in play.client(query("select 2"))[0]
    assert [event["id"] for event in play.of("result")] == [1, 2, 3]
    assert play.of("unmatched") == []


def test_postgres_a_ready_for_query_ends_skipping(play):
    """Whatever the target says it for: it takes the next message."""
    play.client(parse("", "bad"), FLUSH)
    play.target(error(), READY)
    assert "skipped" not in play.client(query("delete from payroll"))[0]


def test_postgres_where_a_server_may_skip_or_not_that_is_said(play):
    """Of two Syncs among bad copy data nobody but the server knows whether it took one: no message is
    recorded as skipped that may run, and results are said to be uncertain."""
    play.client(parse("", "copy t from stdin"), bind("", ""), execute(), FLUSH)
    play.target(PARSED, BOUND, COPY_IN)
    play.client(message(b"d", b"1\n"), SYNC, message(b"d", b"bad\n"))
    play.target(error("22P02"))
    assert "skipped" not in play.client(query("delete from payroll"))[0]
    play.client(SYNC)
    play.target(READY)
    assert len(play.of("unmatched")) == 1
    # All at once.
    again = Play()
    again.client(parse("", "copy t from stdin"), bind("", ""), execute(), SYNC, query("select 1"), SYNC)
    again.target(PARSED, BOUND, COPY_IN, error(), READY)
    assert len(again.of("unmatched")) == 1


class Server:
    """What a server answers; its copies fail at the data ``bad``. Like PostgreSQL's, see CopyGetData and
    ignore_till_sync: in a copy a Sync is read and ignored, after an error it ends the skipping."""

    def __init__(self, extended):
        self._extended = extended
        self._copying = self._skipping = False
        self._asked = b""

    def answer(self, data):
        kind = data[:1]
        if self._copying and kind in b"dSHcf":
            return self._copy(kind, data)
        if self._skipping and kind != b"S":
            return b""
        if kind == b"S":
            self._skipping = False
            return READY
        if kind in b"PB":
            self._asked = data if kind == b"P" else self._asked
            return PARSED if kind == b"P" else BOUND
        asked = data if kind == b"Q" else self._asked
        if kind not in b"QE":
            return b""  # copy data that nobody asked for
        ready = READY if kind == b"Q" else b""
        if b"copy" in asked:
            self._copying = True
            return COPY_IN
        if b"wrong" in asked:
            self._skipping = kind == b"E"
            return error() + ready
        return done("SELECT " + asked.split(b"number ")[1][:1].decode()) + ready

    def _copy(self, kind, data):
        if kind not in b"cf" and not data.endswith(b"bad"):
            return b""
        self._copying = False
        self._skipping = self._extended and kind != b"c"
        answer = done("COPY 0") if kind == b"c" else error("22P02")
        return answer if self._extended else answer + READY


@settings(max_examples=300)
@given(
    st.booleans(),
    st.lists(st.sampled_from([SYNC, message(b"d", b"good"), message(b"d", b"bad")]), max_size=6),
    st.sampled_from([COPY_DONE, COPY_FAIL]),
    st.lists(st.booleans(), min_size=3, max_size=3),
    st.lists(st.booleans(), min_size=25, max_size=25),
)
def test_postgres_a_copy_leaves_the_answers_behind_it_matched(extended, middle, end, wrong, waits):
    """However many Syncs lie among the data, and wherever the copy fails."""
    play, server = Play(), Server(extended)

    def asks(sql):
        return [parse("", sql), bind("", ""), execute()] if extended else [query(sql)]

    script = [*asks("copy t from stdin"), *middle, end, *([SYNC] if extended else [])]
    for number, bad in enumerate(wrong, start=2):
        script += [*asks(f"{'wrong' if bad else 'select'} number {number}"), *([SYNC] if extended else [])]
    answers = b""
    for data, wait in zip(script, [*waits, *[False] * len(script)], strict=False):
        play.client(data)
        answers += server.answer(data)
        if wait:
            play.target(answers)
            answers = b""
    play.target(answers)
    assert len(play.of("query")) == 4
    assert not [event for event in play.of("query") if event.get("skipped")]
    assert [event["id"] for event in play.of("result")] == [1, 2, 3, 4]
    for event in play.of("result")[1:]:
        assert event.get("tag", f"SELECT {event['id']}") == f"SELECT {event['id']}"
    assert play.of("unmatched") == play.of("correction") == []


def test_postgres_syncs_among_copy_data_cost_little():
    """Neither a client with many of them nor a target that says again and again that a copy begins."""
    play = Play()
    start = time.thread_time()
    play.client(query("copy t from stdin"), *[SYNC + message(b"d", b"x")] * 30_000)
    play.target(COPY_IN)
    with pytest.raises(TargetProtocolError, match="a copy begins within a copy"):
        play.target(COPY_IN)
    play.client(COPY_DONE)
    play.target(*[error(), COPY_IN] * 3_000, done("COPY 1"), READY)
    assert time.thread_time() - start < 5  # 0.3 s; walking through all Syncs each time took 5 s
    play.client(query("select 2"))
    play.target(done("SELECT 2"), READY)
    assert copies(play.events)[0] == (1, 30_000, 30_000)
    assert play.of("result")[-1]["id"] == 2


@pytest.mark.parametrize("end", [COPY_DONE, COPY_FAIL])
def test_postgres_copy_in_fails(play, end):
    play.client(parse("", "copy t from stdin"), bind("", ""), execute(), SYNC)
    play.target(PARSED, BOUND, COPY_IN)
    play.client(message(b"d", b"x\n"), end, SYNC)
    play.target(error("22P02"), READY)
    play.client(query("copy t from stdin"))
    play.target(COPY_IN)
    play.client(message(b"d", b"y\n"), COPY_FAIL)
    play.target(error("57014"), READY)
    play.client(query("select 3"))
    play.target(done("SELECT 3"), READY)
    results = play.of("result")
    assert [event["id"] for event in results] == [1, 2, 3]
    assert "unmatched" not in [event["kind"] for event in play.events]


@pytest.mark.parametrize("kind", [b"D", b"d"])
@pytest.mark.parametrize("size", [7, 50])  # whole, and its first piece
def test_postgres_a_target_sends_no_rows_while_the_client_copies_in(play, kind, size):
    """They would be counted and sampled as the client's, whose own sample would be lost."""
    play.client(query("copy t from stdin"))
    play.target(COPY_IN)
    play.client(message(b"d", b"1\n")[:6])
    with pytest.raises(TargetProtocolError, match="rows while the client copies in"):
        play.target(message(kind, bytes(size))[:12])
    (event,) = [event for event in play.client(b"\n") if event["kind"] == "rows"]
    assert (event["copy"], event["data"]) == ("in", "1\n")


def test_postgres_copy_out_beyond_the_budget():
    play = Play(rows_bytes=10)
    play.client(query("copy t to stdout"))
    events = play.target(COPY_OUT, *[message(b"d", b"12345\n")] * 5, COPY_DONE, done("COPY 5"), READY)
    assert events[0] == {"kind": "rows", "id": 1, "copy": "out", "data": "12345\n1234"}
    assert events[1]["bytes"] == 30
    assert events[1]["unrecorded_bytes"] == 2 + 3 * 11
    assert len(events[1]["unrecorded_sha256"]) == 64


def test_postgres_no_rows_when_the_budget_is_zero():
    play = Play(rows_bytes=0)
    play.client(query("select 1"))
    events = play.target(columns(("a", 23)), row(b"1"), done("SELECT 1"), READY)
    assert [event["kind"] for event in events] == ["result"]


def test_postgres_function_call_is_recorded(play):
    body = u32(954) + u16(1, 1, 2) + u32(4) + b"\0\0\0\1" + struct.pack("!i", -1) + u16(1)
    (event,) = play.client(message(b"F", body))
    assert (event["mode"], event["function"], event["params"]) == ("function", 954, ["\\x00000001", None])
    play.target(message(b"V", u32(4) + b"\0\0\0\2"), READY)
    assert play.of("result")[0]["id"] == 1


def test_postgres_notices_notifications_and_settings(play):
    play.client(query("select 1"))
    events = play.target(
        message(b"N", b"SNOTICE\0\0"),
        message(b"A", u32(7) + b"news\0hello\0"),
        message(b"S", b"client_encoding\0LATIN1\0"),
        done("SELECT 1"),
        READY,
    )
    assert events[0] == {"kind": "notification", "pid": 7, "channel": "news", "payload": "hello"}
    assert events[1] == {"kind": "setting", "name": "client_encoding", "value": "LATIN1"}
    assert events[2]["notices"] == 1
    assert play.client(message(b"Q", b"select '\xe9'\0"))[0]["sql"] == "select 'é'"


def test_postgres_parameters_of_sensitive_statements_are_hidden(play):
    (event,) = play.client(
        parse("", "update users set password = $1 where id = $2", 25, 23),
        bind("", "", b"hunter2", b"\0\0\0\3", formats=(0, 1)),
        execute(),
        SYNC,
    )
    assert event["params"] == ["***", "3"]
    events = play.target(PARSED, BOUND, error("22000", 'bad value "hunter2"'), READY)
    assert "hunter2" not in repr(events)


@pytest.mark.parametrize("oid", [0, 17, 18, 19, 25, 114, 142, 705, 1042, 1043, 3802, 1009, 16500])
def test_postgres_binary_parameters_of_sensitive_statements_are_hidden(play, oid):
    """Of every type that may hold a text: char(n), name, json, citext, domains and types of one's own."""
    play.client(parse("s", "update users set password = $1"), describe("S", "s"), SYNC)
    play.target(PARSED, message(b"t", u16(1) + u32(oid)), NO_DATA, READY)
    (event,) = play.client(bind("", "s", b"hunter2", formats=(1,)), execute(), SYNC)
    assert event["params"] == ["***"]


@pytest.mark.parametrize(
    ("oid", "value", "text"),
    [
        (16, b"\1", "t"),
        (20, bytes(7) + b"\5", "5"),
        (1082, bytes(4), "2000-01-01"),
        (1184, bytes(8), "2000-01-01 00:00:00+00"),
        (2950, bytes(16), "00000000-0000-0000-0000-000000000000"),
    ],
)
def test_postgres_numbers_and_times_of_sensitive_statements_are_shown(play, oid, value, text):
    sql = "update users set password = 'x' where y = $1"
    events = play.client(parse("", sql, oid), bind("", "", value, formats=(1,)), execute(), SYNC)
    assert events[0]["params"] == [text]


@pytest.mark.parametrize("way", ["in", "early", "out"])
def test_postgres_copy_data_is_redacted_like_rows(play, way):
    secret = (
        b"SCRAM-SHA-256$4096:c2FsdA==$abc:hunter2\tmd5" + b"0" * 32 + b"\t1\thost=h password=hunter2 user=u\n"
        b"postgres://u:hunter2@h/d\tplain\n"
    )
    clean = "***\t***\t1\thost=h password=*** user=u\npostgres://u:***@h/d\tplain\n"
    data = message(b"d", secret)
    if way == "out":
        play.client(query("copy t to stdout"))
        play.target(COPY_OUT, data, COPY_DONE, done("COPY 2"), READY)
    elif way == "in":
        play.client(query("copy t from stdin"))
        play.target(COPY_IN)
        play.client(data, COPY_DONE)
    else:
        play.client(query("copy t from stdin"), data, COPY_DONE)
    assert play.of("rows")[0]["data"] == clean


def test_postgres_long_statements_are_told_once(play):
    sql = "select " + "1, " * 2000 + "1"
    first = play.client(parse("s", sql), bind("", "s"), execute(), SYNC)
    assert [event["kind"] for event in first] == ["parse", "query"]
    assert first[0]["sql"] == sql
    assert first[1]["sql"] == sql[:256]
    assert first[1]["truncated"]
    assert first[1]["statement"] == first[0]["statement"]


def test_postgres_worst_case_texts_fit_into_events():
    play = Play(rows_bytes=1 << 20)
    play.client(message(b"Q", "\U0001f512".encode() * 200_000 + b"\0"))
    play.target(row(b"\1" * 500_000), *[row(b"\xff" * 9)] * 5000, done("SELECT 1"), READY)
    play.client(message(b"Q", b"\xff" * 500_000 + b"\0"))
    play.client(
        parse("n" * 5000, "select 1"), bind("p" * 5000, "n" * 5000, b"\2" * 9000), execute("p" * 5000)
    )


def test_postgres_too_many_names(play):
    """Which names SQL dropped is not known: the oldest are forgotten, and nothing wrong is said of them."""
    for number in range(pipelines.NAMES_LIMIT):
        play.client(parse(f"s{number}", f"select {number}"), SYNC)
        play.target(PARSED, READY)
    play.client(bind("", "s7"), execute(), SYNC)
    assert play.of("query")[-1] == {
        **{"kind": "query", "id": 1, "mode": "extended", "sql": "select 7"},
        **{"statement": 8, "name": "s7"},
    }
    play.target(BOUND, done("SELECT 1"), READY)
    play.client(parse("", "select $1"), parse("one more", "select 1"), bind("", "", b"x"), execute(), SYNC)
    assert play.of("query")[-1]["sql"] == "select $1"
    play.target(PARSED, PARSED, BOUND, done("SELECT 1"), READY)
    play.client(bind("", "s0"), execute(), bind("", "s7"), execute(), SYNC)
    play.target(BOUND, done("SELECT 0"), BOUND, done("SELECT 7"), READY)
    forgotten, known = play.of("query")[-2:]
    assert (forgotten["sql"], forgotten["name"]) == (None, "s0")
    assert (known["sql"], known["uncertain"]) == ("select 7", True)
    assert play.of("correction") == []
    assert len(play.pipeline.statements) == len(play.pipeline._confirmed) == pipelines.NAMES_LIMIT


def test_postgres_of_a_forgotten_sensitive_statement_the_values_stay_hidden(play, monkeypatch):
    monkeypatch.setattr(pipelines, "NAMES_LIMIT", 1)
    play.client(parse("s", "update users set password = $1", 25), parse("t", "select 1"), SYNC)
    play.target(PARSED, PARSED, READY)
    play.client(bind("", "s", b"hunter2"), execute(), SYNC)
    assert play.of("query")[-1]["params"] == ["***"]
    play.target(BOUND, error("22000", 'bad value "hunter2"'), READY)
    assert "hunter2" not in repr(play.events)


def test_postgres_too_many_portals(play):
    for number in range(pipelines.NAMES_LIMIT):
        play.client(bind(f"p{number}", ""))
    with pytest.raises(ClientProtocolError, match="too many open portals"):
        play.client(bind("one more", ""))


def test_postgres_names_that_sql_drops_do_not_end_the_connection(play):
    """psycopg on a libpq without Close: ``DEALLOCATE _pg3_7`` for each statement that it has used enough."""
    for number in range(pipelines.NAMES_LIMIT + 100):
        play.client(parse(f"_pg3_{number}", "select 1"), bind("", f"_pg3_{number}"), execute(), SYNC)
        play.target(PARSED, BOUND, done("SELECT 1"), READY)
        play.client(query(f"DEALLOCATE _pg3_{number}"))
        play.target(done("DEALLOCATE"), READY)
    assert {event["sql"][:6] for event in play.of("query")} == {"select", "DEALLO"}
    assert play.of("correction") == []


@pytest.mark.parametrize("tag", ["DEALLOCATE ALL", "DISCARD ALL"])
def test_postgres_all_names_are_forgotten_with_their_answer(play, tag):
    """But not those that the client has parsed since, without waiting for it."""
    for name in "abc":
        play.client(parse(name, f"select '{name}'"), SYNC)
        play.target(PARSED, READY)
    play.client(query(tag), parse("b", "select 'new b'"), parse("d", "select 'd'"), SYNC)
    play.target(done(tag), READY, PARSED, PARSED, READY)
    for name, sql in (("a", None), ("b", "select 'new b'"), ("c", None), ("d", "select 'd'")):
        play.client(bind("", name), execute(), SYNC)
        assert play.of("query")[-1]["sql"] == sql
        play.target(error() if sql is None else BOUND + done("SELECT 1"), READY)
    assert sorted(play.pipeline.statements) == ["b", "d"]
    assert play.of("correction") == []


@pytest.mark.parametrize(
    "data",
    [
        message(b"Q", b"select 1\0; drop table t\0"),
        message(b"Q", b"select 1"),
        message(b"P", b"s\0select 1\0" + u16(2) + u32(23)),
        message(b"P", b"s\0select 1\0" + u16(0) + b"x"),
        message(b"B", b"\0\0" + u16(0, 1) + u32(100) + b"x"),
        message(b"B", b"\0\0" + u16(0, 0, 0) + b"rest"),
        message(b"D", b"Xname\0"),
        message(b"C", b"Sname"),
        message(b"E", b"name" * 3),
        message(b"X") + query("select 1"),
    ],
)
def test_postgres_client_messages_that_lie_about_themselves(play, data):
    with pytest.raises(ClientProtocolError):
        play.client(data)


CLIENT = st.one_of(
    st.sampled_from(["s", "t", ""]).map(lambda name: parse(name, f"select '{name}'")),
    st.tuples(st.sampled_from(["", "p"]), st.sampled_from(["s", "t", ""])).map(lambda pair: bind(*pair)),
    st.sampled_from(
        [execute(), execute("p", 5), describe("S", "s"), describe("P"), close("S", "s"), close("P", "p")]
    ),
    st.sampled_from([SYNC, FLUSH, query("select 1"), message(b"d", b"x"), COPY_DONE, COPY_FAIL]),
)
TARGET = st.one_of(
    st.sampled_from([PARSED, BOUND, CLOSED, NO_DATA, SUSPENDED, READY, IN_TRANSACTION]),
    st.sampled_from([COPY_IN, COPY_OUT, COPY_DONE, message(b"W", b"\0\0\0"), message(b"d", b"y")]),
    st.sampled_from([row(b"1"), columns(("a", 23)), done("SELECT 1"), done("DISCARD ALL"), error()]),
    st.sampled_from([done("COPY 1"), done("DEALLOCATE")]),
    st.sampled_from([message(b"I"), message(b"V", u32(0)), message(b"t", u16(1) + u32(23))]),
)


@settings(max_examples=150)
@given(st.lists(st.one_of(CLIENT.map(lambda data: (True, data)), TARGET.map(lambda data: (False, data)))))
def test_postgres_any_order_of_messages_is_survived(script):
    """Nothing but protocol errors, whatever either side says; every query asked for is recorded."""
    play = Play()
    asked = 0
    for from_client, data in script:
        if from_client:
            play.client(data)
            asked += data[:1] in (b"Q", b"E")
            continue
        try:
            play.target(data)
        except TargetProtocolError:
            break  # the connection is over
    assert len(play.of("query")) == asked


@settings(max_examples=60)
@given(st.lists(st.sampled_from("sepnc"), max_size=6), st.lists(st.integers(1, 40), max_size=30))
def test_postgres_answers_cut_anywhere_give_the_same_events(asked, sizes):
    """Whole answers in one buffer take a shorter way than what is cut."""
    told = []
    for cuts in ([], sizes):
        pipeline = Pipeline()
        client = ClientSide(pipeline, lambda: 0.0)
        target = TargetSide(pipeline, 16384, lambda: 0.0)
        up = Framer(CLIENT_KINDS, frozenset({ord("d")}), client, ClientProtocolError)
        down = Framer(TARGET_KINDS, frozenset({ord("d"), ord("D")}), target, TargetProtocolError)
        stream = b""
        for kind in asked:
            question, answer = EXCHANGES[kind]
            up.feed(question, len(question))
            stream += answer
        events = client.take_events()
        rest = b""
        while stream:
            size = cuts.pop(0) if cuts else len(stream)
            rest, stream = rest + stream[:size], stream[size:]
            rest = rest[down.feed(rest, len(rest)) :]
            events += target.take_events()
        assert not rest
        told.append(merged(events))
    assert told[0] == told[1]


def merged(events):
    """With what was found in several buffers as one event."""
    found = []
    for event in events:
        if (
            event["kind"] == "rows"
            and found
            and found[-1]["kind"] == "rows"
            and found[-1]["id"] == event["id"]
        ):
            found[-1]["rows"] += event["rows"]
        else:
            found.append(event)
    return found


COLUMN = columns(("a", 23))
READY = message(b"Z", b"I")
EXCHANGES = {
    "s": (query("select 1"), COLUMN + row(b"1") + row(None) + done("SELECT 2") + READY),
    "e": (query("wrong"), error() + READY),
    "p": (
        parse("s1", "select $1", 23) + bind("", "s1", b"1") + describe("P") + execute() + message(b"S"),
        message(b"1") + message(b"2") + COLUMN + row(b"1") + done("SELECT 1") + READY,
    ),
    "n": (query("notify x"), message(b"N", b"SNOTICE\0\0") + done("NOTIFY") + READY),
    "c": (
        query("copy t to stdout"),
        message(b"H", b"\0" + u16(1, 0)) + message(b"c") + done("COPY 0") + READY,
    ),
}


@given(st.lists(st.sampled_from(["ok", "bad parse", "bad execute", "simple", "simple bad"]), max_size=20))
def test_postgres_pipelines_are_matched_as_a_server_would_answer(script):
    """A model of the server: each result must name the query that caused it."""
    play = Play()
    answers = []
    expected = []
    for number, what in enumerate(script, start=1):
        if what.startswith("simple"):
            play.client(query(f"select {number}"))
            answers.append(error() + READY if what.endswith("bad") else done(f"SELECT {number}") + READY)
            expected.append(number)
            continue
        play.client(parse("", f"select {number}"), bind("", ""), describe("P"), execute(), SYNC)
        if what == "bad parse":
            answers.append(error() + READY)
            expected.append(None)
        elif what == "bad execute":
            answers.append(PARSED + BOUND + NO_DATA + error() + READY)
            expected.append(number)
        else:
            answers.append(PARSED + BOUND + NO_DATA + done(f"SELECT {number}") + READY)
            expected.append(number)
    play.target(*answers)
    assert [event["id"] for event in play.of("result")] == expected
    assert play.of("unmatched") == play.of("correction") == []


def test_postgres_sides_answers_nobody_asked_for_cost_little():
    pipeline = Pipeline()
    for _ in range(pipelines.STEPS_LIMIT - 1):
        pipeline.push(pipelines.Step(pipelines.Kind.SYNC))
    side = TargetSide(pipeline, 0, lambda: 0.0)
    start = time.thread_time()
    for _ in range(1000):
        side.control(ord("1"), b"", 0, None)
    assert time.thread_time() - start < 1  # 20 ms; walking through all steps took 3 s
    assert [event["kind"] for event in side.take_events()] == ["unmatched"]
