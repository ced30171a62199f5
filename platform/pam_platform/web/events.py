"""Recorded events as rows of a page: time, connection, what happened, and the rest as facts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from pam_common.terminal import PlainText

# Enough to read at a sitting, little enough for any browser: most events are a statement of a line.
PAGE_SIZE = 200
# One page's text; a page of megabyte statements stops early and says so.
MAX_PAGE_TEXT = 4 * 1024 * 1024
# A terminal's events in one row of the page: minutes of typing.
MAX_RUN = 5000
# Result rows shown per event; the NDJSON has all that were recorded.
MAX_ROWS = 50

# What an event is about, most telling first; shown as its text.
_TEXT_FIELDS = ("sql", "data", "text", "command", "message", "reason")
_ERROR_FIELDS = ("severity", "code", "message")
_PLACED = frozenset(("t", "c", "kind", "rows", "error", "columns"))


@dataclass(frozen=True)
class EventRow:
    """One event, ready for the template, which escapes everything."""

    number: int
    seconds: float
    connection: int
    kind: str
    text: str
    facts: tuple[tuple[str, str], ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    more_rows: int
    error: str

    @property
    def clock(self) -> str:
        """Time since the part began, ``h:mm:ss.mmm``."""
        minutes, seconds = divmod(self.seconds, 60)
        hours, minutes = divmod(int(minutes), 60)
        return f"{hours}:{minutes:02d}:{seconds:06.3f}"


@dataclass(frozen=True)
class Page:
    """Some consecutive events, and whether others follow."""

    rows: tuple[EventRow, ...]
    following: int | None


def page(events: Iterable[dict[str, Any]], start: int) -> Page:
    """The events from number ``start`` (from 0) on, as many as a page holds.

    A terminal's output comes in pieces, and with it what is typed: consecutive ones are one row.
    """
    rows: list[EventRow] = []
    run: _Screen | None = None
    left = MAX_PAGE_TEXT
    for number, event in enumerate(islice(events, start, None), start):
        if run is not None and (left <= 0 or not run.takes(event)):
            rows.append(run.row())
            run = None
        if len(rows) == PAGE_SIZE or left <= 0:
            return Page(tuple(rows), number)
        if _of_terminal(event):
            run = run or _Screen(number, event)
            left -= run.add(event)
            continue
        row = row_of(number, event)
        left -= len(row.text) + sum(len(value) for _, value in row.facts) + sum(map(_width, row.rows))
        rows.append(row)
    return Page((*rows, run.row()) if run is not None else tuple(rows), None)


class _Screen:
    """What one terminal showed in consecutive events, as lines of text."""

    def __init__(self, number: int, event: dict[str, Any]) -> None:
        self._first = row_of(number, {"t": event["t"], "c": event["c"], "kind": "screen"})
        self._place = _place(event)
        self._text = PlainText()
        self._lines: list[str] = []
        self._typed = 0
        self._count = 0

    def takes(self, event: dict[str, Any]) -> bool:
        return _of_terminal(event) and _place(event) == self._place and self._count < MAX_RUN

    def add(self, event: dict[str, Any]) -> int:
        """Take one event; how much it adds to the page, at least."""
        self._count += 1
        if event["kind"] == "i":
            self._typed += event["bytes"] if type(event.get("bytes")) is int else 0
            return 1
        self._lines += self._text.feed(event["data"])
        return 1 + len(event["data"])

    def row(self) -> EventRow:
        typed = (("typed", f"{self._typed} bytes"),) if self._typed else ()
        lines = [*self._lines, self._text.rest()]
        text = "\n".join(lines).strip("\n")
        return replace(self._first, text=text, facts=(("ch", _text(self._place[1])), *typed))


def _of_terminal(event: dict[str, Any]) -> bool:
    kind = event.get("kind")
    return kind == "i" or (kind == "o" and isinstance(event.get("data"), str))


def _place(event: dict[str, Any]) -> tuple[Any, Any]:
    return event["c"], event.get("ch")


def row_of(number: int, event: dict[str, Any]) -> EventRow:
    """One event's row. Any JSON is taken: what a later agent records is shown, too."""
    text_field = next((name for name in _TEXT_FIELDS if isinstance(event.get(name), str)), None)
    rows = event["rows"] if isinstance(event.get("rows"), list) else []
    columns = event["columns"] if isinstance(event.get("columns"), list) else []
    return EventRow(
        number=number,
        seconds=float(event["t"]),
        connection=event["c"],
        kind=event["kind"],
        text=event[text_field] if text_field else "",
        facts=tuple(_facts(event, text_field)),
        columns=tuple(map(_column, columns)),
        rows=tuple(_cells(row) for row in rows[:MAX_ROWS]),
        more_rows=max(0, len(rows) - MAX_ROWS),
        error=_error(event["error"]) if event.get("error") else "",
    )


def _facts(event: dict[str, Any], text_field: str | None) -> Iterator[tuple[str, str]]:
    for name, value in event.items():
        if name == "rows" and not isinstance(value, list):
            yield name, _text(value)  # a count, not the rows themselves
        elif name not in _PLACED and name != text_field and value is not None:
            yield name, _text(value)


def _column(column: object) -> str:
    """A column's name; PostgreSQL's rows describe columns as name and type number."""
    return _text(column[0]) if isinstance(column, list) and column else _text(column)


def _error(error: object) -> str:
    """An error in one line when it has the usual fields, else all of it."""
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        rest = {name: value for name, value in error.items() if name not in _ERROR_FIELDS and value}
        words = [_text(error[name]) for name in _ERROR_FIELDS if error.get(name)]
        return ": ".join(words) + (f"\n{_text(rest)}" if rest else "")
    return _text(error)


def _cells(row: object) -> tuple[str, ...]:
    return tuple(map(_text, row)) if isinstance(row, list) else (_text(row),)


def _text(value: object) -> str:
    if value is None:
        return "NULL"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _width(cells: tuple[str, ...]) -> int:
    return sum(map(len, cells))
