"""A recording's events to the frames of one terminal. No terminal, no clock."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

#: A terminal's size as a person has it; anything else in a recording is not believed.
MAX_COLUMNS, MAX_ROWS = 1000, 500
#: Events that begin something with a terminal.
_STARTS = frozenset({"shell", "exec"})


@dataclass(frozen=True)
class Frame:
    """At ``at`` seconds: output, input as it was echoed, a new size (``data`` is ``80x24``)."""

    at: float
    kind: Literal["o", "i", "r"]
    data: str


@dataclass(frozen=True)
class Terminal:
    """What a terminal of a recording was: when it began, for what, its first size."""

    at: float
    columns: int
    rows: int
    term: str
    command: str


def find(events: Iterable[dict[str, Any]], number: int = 1) -> Terminal | None:
    """The recording's terminal ``number``, counted from 1 by when they began."""
    for at, event in _timed(events):
        if _begins_terminal(event):
            number -= 1
            if not number:
                return Terminal(
                    at,
                    _size(event["cols"], MAX_COLUMNS),
                    _size(event["rows"], MAX_ROWS),
                    str(event.get("term") or "xterm"),
                    str(event.get("command") or ""),
                )
    return None


def frames(events: Iterable[dict[str, Any]], number: int = 1) -> Iterator[Frame]:
    """What terminal ``number`` showed, from its beginning at 0 to its end."""
    place: tuple[Any, ...] | None = None
    begun = 0.0
    for at, event in _timed(events):
        here = (event.get("part"), event.get("c"), event.get("ch"))
        if place is None:
            number -= _begins_terminal(event)
            if not number:
                place, begun = here, at
        elif here == place:
            if event.get("kind") == "exit":
                return
            frame = _frame(at - begun, event)
            if frame is not None:
                yield frame


def compressed(source: Iterable[Frame], longest: float) -> Iterator[Frame]:
    """The frames with every pause of more than ``longest`` seconds cut to that."""
    before = shift = 0.0
    for frame in source:
        shift += max(0.0, frame.at - before - longest)
        before = frame.at
        yield Frame(frame.at - shift, frame.kind, frame.data)


def _timed(events: Iterable[dict[str, Any]]) -> Iterator[tuple[float, dict[str, Any]]]:
    """Each event with seconds that never fall: the parts of a session each count from 0."""
    part, base, last = None, 0.0, 0.0
    for event in events:
        if event.get("part") != part:
            part, base = event.get("part"), last
        t = event.get("t")
        if isinstance(t, int | float) and not isinstance(t, bool) and 0 <= t < 1e9:
            last = max(last, base + t)
        yield last, event


def _begins_terminal(event: dict[str, Any]) -> bool:
    return event.get("kind") in _STARTS and type(event.get("cols")) is int and type(event.get("rows")) is int


def _frame(at: float, event: dict[str, Any]) -> Frame | None:
    kind, data = event.get("kind"), event.get("data")
    if kind in ("o", "i") and isinstance(data, str):
        return Frame(at, "o" if kind == "o" else "i", data)
    if kind == "resize" and type(event.get("cols")) is int and type(event.get("rows")) is int:
        return Frame(at, "r", f"{_size(event['cols'], MAX_COLUMNS)}x{_size(event['rows'], MAX_ROWS)}")
    return None


def _size(value: int, limit: int) -> int:
    return min(max(value, 1), limit)
