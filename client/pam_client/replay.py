"""Recorded events as lines for a person: when, on which connection, what happened.

    0:00:01.204  #1  query   select * from accounts
                             where id = 7
                             tag=SELECT 1  rows=1

Whatever was recorded is foreign text: it is shown, never obeyed (see :func:`pam_client.output.clean`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pam_client.output import clean

#: Fields that say most, in this order; the first one present is the event's text.
_TEXT_FIELDS = ("sql", "statement", "text", "command", "message", "reason")
_HANDLED = frozenset(("t", "c", "kind", "part"))
#: What a person reads of one value; the whole of it is in ``--json``.
MAX_TEXT, MAX_VALUE = 10_000, 300
#: Result rows shown of one event.
MAX_ROWS = 20
_INDENT = " " * 28


def lines(event: dict[str, Any]) -> Iterator[str]:
    """One event as one or more lines. Any JSON object is taken: a newer agent may record new kinds."""
    field = next((name for name in _TEXT_FIELDS if isinstance(event.get(name), str)), None)
    text = clean(event[field], limit=MAX_TEXT, newlines=True).split("\n") if field else []
    yield f"{head(event)}{text[0] if text else ''}".rstrip()
    for line in text[1:]:
        yield _INDENT + line
    rows = event.get("rows")
    facts = [
        f"{clean(name, limit=40)}={_value(value)}"
        for name, value in event.items()
        if name not in _HANDLED
        and name != field
        and value is not None
        and not (name == "rows" and value is rows)
    ]
    if rows is not None and not isinstance(rows, list):
        facts.append(f"rows={_value(rows)}")
    if facts:
        yield _INDENT + "  ".join(facts)
    if isinstance(rows, list):
        yield from _rows(rows)


def head(event: dict[str, Any]) -> str:
    """When, on which connection, what: as wide as the lines below it are indented."""
    where = f"#{clean(event.get('c'), limit=8):<3} {clean(event.get('kind'), limit=32):<10}"
    prefix = f"{clock(event.get('t'))}  {where}"
    return f"{prefix:<{len(_INDENT)}}"


def clock(seconds: object) -> str:
    """Seconds since the part began as ``0:00:01.204``."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < 1e9:
        return clean(seconds, limit=12)
    minutes, rest = divmod(float(seconds), 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02d}:{rest:06.3f}"


def _rows(rows: list[Any]) -> Iterator[str]:
    for row in rows[:MAX_ROWS]:
        cells = row if isinstance(row, list) else [row]
        yield _INDENT + "| " + " | ".join("NULL" if cell is None else _value(cell) for cell in cells)
    if len(rows) > MAX_ROWS:
        yield f"{_INDENT}| … {len(rows) - MAX_ROWS} more"


def _value(value: object) -> str:
    return clean(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), limit=MAX_VALUE)


def verdict(report: dict[str, Any]) -> Iterator[str]:
    """The platform's verification of a recording, one line per part and problem."""
    parts = report.get("parts")
    for part in parts if isinstance(parts, list) else []:
        if not isinstance(part, dict):
            continue
        state = "verified" if part.get("ok") is True else "NOT VERIFIED"
        sizes = f"{clean(part.get('chunks'))} chunks, {clean(part.get('bytes'))} bytes"
        yield f"part {clean(part.get('part'))}: {state}, {sizes}, end: {clean(part.get('end') or 'none yet')}"
        problems = part.get("problems")
        for problem in problems if isinstance(problems, list) else []:
            yield f"  problem: {clean(problem, limit=500)}"
