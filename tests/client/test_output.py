"""Abuse case 22: what was recorded must not steer the reader's terminal."""

from __future__ import annotations

import json
import sys
import unicodedata

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pam_client.output import Reporter, clean, duration, moment, show_table
from pam_client.replay import lines, verdict

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def is_harmless(text: str) -> bool:
    return all(unicodedata.category(char)[0] != "C" and char not in "\u2028\u2029" for char in text)


@given(st.text(st.characters(codec=None)))
def test_clean_leaves_nothing_that_steers(text: str) -> None:
    assert is_harmless(clean(text))
    assert is_harmless(clean(text, newlines=True).replace("\n", "").replace("\t", ""))


def test_clean_shows_what_was_there() -> None:
    assert clean("a\x1b[31mb\x07\r\nc") == "a\\x1b[31mb\\x07\\r\\nc"
    assert clean("pay\u202eload\u200b\x9b1m") == "pay\\u202eload\\u200b\\x9b1m"
    assert clean("naïve 数据 🙂") == "naïve 数据 🙂"
    assert clean(None) == ""
    assert clean("x" * 50, limit=10) == "x" * 10 + "…"


@given(st.dictionaries(st.sampled_from(["t", "c", "kind", "sql", "rows", "error", "\x1b[2J"]), JSON))
def test_any_event_becomes_harmless_lines(event: dict[str, object]) -> None:
    for line in lines(json.loads(json.dumps(event))):
        assert is_harmless(line.replace("\t", ""))


def test_event_for_a_person() -> None:
    event = {
        "t": 3661.2041,
        "c": 1,
        "kind": "query",
        "sql": "select *\nfrom \x1b]0;owned\x07t",
        "tag": "SELECT 1",
        "rows": [["1", None, "\x1b[2J"]],
    }
    assert list(lines(event)) == [
        "1:01:01.204  #1   query     select *",
        "                            from \\x1b]0;owned\\x07t",
        "                            tag=SELECT 1",
        "                            | 1 | NULL | \\x1b[2J",
    ]


def test_verdict_names_parts_and_problems() -> None:
    report = {
        "ok": False,
        "parts": [
            {"part": 1, "ok": True, "problems": [], "end": "closed", "chunks": 3, "bytes": 900},
            {"part": 2, "ok": False, "problems": ["chunk 2 \x1b[0m"], "end": None, "chunks": 1, "bytes": 10},
        ],
    }
    assert list(verdict(report)) == [
        "part 1: verified, 3 chunks, 900 bytes, end: closed",
        "part 2: NOT VERIFIED, 1 chunks, 10 bytes, end: none yet",
        "  problem: chunk 2 \\x1b[0m",
    ]


def test_reporter_says_each_sentence_once_and_is_bounded() -> None:
    said: list[str] = []
    reporter = Reporter(said.append)
    for _ in range(3):
        reporter.once("no relay", "try later")
    assert said == ["error: no relay\nHINT: try later"]
    for number in range(1000):
        reporter.once(f"message {number}")
    assert len(said) == Reporter.LIMIT


@pytest.mark.parametrize("width", [80, 102, 200])
def test_a_table_keeps_its_first_column_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    """What a person copies to the next command is not cut in pieces, however narrow the terminal."""
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    columns = ("SESSION", "USER", "STARTED", "ENDED", "WHY")
    why = "killed by root: " + "left the desk " * 3
    rows = [
        (f"s-{letter * 26}", "alice", "2026-01-01 10:00:00", "2026-01-01 11:00:00", why) for letter in "ab"
    ]
    show_table(columns, rows, empty="none", first_to_go=("WHY", "ENDED"))
    shown = click.unstyle(capsys.readouterr().out)
    assert all(row[0] in shown for row in rows)
    assert max(map(len, shown.splitlines())) <= width
    head = shown.splitlines()[0]
    assert [name in head for name in ("ENDED", "WHY")] == {
        80: [True, False],
        102: [True, True],
        200: [True, True],
    }[width]
    show_table(columns[:3], [("s-" + "a" * 40, "alice", "x" * 60)], empty="none")
    assert "s-" + "a" * 40 in capsys.readouterr().out


def test_durations_and_moments() -> None:
    assert [duration(left) for left in (-5, 12, 250, 28740)] == ["0s", "12s", "4m 10s", "7h 59m"]
    assert moment(None) == ""
    assert moment(1e300) == "1e+300"
    assert moment(0).startswith(("1970", "1969"))
