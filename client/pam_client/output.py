"""What commands print: tables for people on a terminal, plain columns in a pipe, JSON for programs.

Everything that came from elsewhere (names, reasons, recorded statements) passes :func:`clean`: a
recording may hold any bytes, and a terminal obeys them.
"""

from __future__ import annotations

import json
import sys
import time
import unicodedata
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import click
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

#: Unicode categories that steer a terminal or the eye: controls, formats (bidi overrides, zero width),
#: surrogates, private use, unassigned, line and paragraph separators.
_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def clean(value: object, *, limit: int | None = None, newlines: bool = False) -> str:
    """``value`` as text without control characters: each is shown escaped, as ``\\x1b`` or ``\\u202e``.

    With ``newlines``, line feeds and tabs stay. ``limit`` cuts the text after that many characters.
    """
    text = "" if value is None else str(value)
    if limit is not None and len(text) > limit:
        text = text[:limit] + "…"
    if text.isprintable() and text.isascii():
        return text
    return "".join(char if _is_safe(char, newlines) else _escape(char) for char in text)


def _is_safe(char: str, newlines: bool) -> bool:
    if char in "\n\t":
        return newlines
    return unicodedata.category(char) not in _UNSAFE


def _escape(char: str) -> str:
    return (
        char.encode("unicode_escape").decode("ascii")
        if ord(char) < 0xD800 or ord(char) > 0xDFFF
        else "\\ufffd"
    )


def say(text: str) -> None:
    """One line for the person, on stderr: stdout belongs to the results."""
    click.echo(text, err=True)


def show_json(value: Any) -> None:
    """``value`` on stdout; ASCII only, so that nothing in it can steer a terminal."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=True))


def show_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    empty: str,
    first_to_go: Sequence[str] = (),
) -> None:
    """A table on stdout; ``empty`` is said (on stderr) when there are no rows.

    Where a terminal is too narrow, the columns ``first_to_go`` are left out, in that order.
    """
    cells = [[clean(cell) for cell in row] for row in rows]
    if not cells:
        say(empty)
    elif sys.stdout.isatty():
        _show_table(columns, cells, first_to_go)
    else:
        _show_plain(columns, cells)


#: Between two columns.
_GAP = 2
#: A text in less than this is no longer readable.
_FOLDED = 20


def _show_table(columns: Sequence[str], cells: list[list[str]], first_to_go: Sequence[str]) -> None:
    console = Console()
    widths = [max(cell_len(line[index]) for line in (columns, *cells)) for index in range(len(columns))]
    for name in first_to_go:  # folded rather than left out
        widths[columns.index(name)] = min(widths[columns.index(name)], _FOLDED)
    kept = list(range(len(columns)))
    for name in first_to_go:
        if sum(widths[index] + _GAP for index in kept) - _GAP > console.width:
            kept.remove(columns.index(name))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index in kept:
        # The first is what a person copies into the next command: whole, however narrow the others get.
        table.add_column(columns[index], overflow="fold", no_wrap=index == 0)
    for row in cells:
        table.add_row(*(Text(row[index]) for index in kept))
    console.print(table)


def _show_plain(columns: Sequence[str], cells: list[list[str]]) -> None:
    """Aligned columns and no wrapping: one row is one line, for grep and awk."""
    lines = [list(columns), *cells]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    for line in lines:
        padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        click.echo("  ".join(padded).rstrip())


def show_fields(fields: Sequence[tuple[str, object]]) -> None:
    """``name: value`` lines on stdout, one per field that has a value."""
    width = max(len(name) for name, _ in fields) + 1
    for name, value in fields:
        if value not in (None, ""):
            click.echo(f"{name + ':':<{width}} {clean(value)}")


def duration(seconds: float) -> str:
    """``7h 59m``, ``4m 10s`` or ``12s``; never negative."""
    left = max(0, int(seconds))
    hours, minutes, seconds = left // 3600, left // 60 % 60, left % 60
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {seconds:02d}s" if minutes else f"{seconds}s"


def moment(value: object) -> str:
    """UNIX seconds in the reader's own time zone; anything else is shown as it is."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return datetime.fromtimestamp(value).astimezone().strftime("%Y-%m-%d %H:%M:%S")
        except (ValueError, OverflowError, OSError):
            pass
    return clean(value)


class Reporter:
    """Says each sentence once: a connection pool that keeps trying must not flood the terminal.

    Safe from any thread.
    """

    #: Different sentences of one session; reasons may carry varying detail, and a set must not grow.
    LIMIT = 100

    def __init__(self, write: Callable[[str], None] = say) -> None:
        self._write = write
        self._said: dict[str, float] = {}

    def once(self, message: str, hint: str = "") -> None:
        """``error: …`` with its ``HINT: …``, unless this message was said already."""
        if message in self._said or len(self._said) >= self.LIMIT:
            return
        self._said[message] = time.monotonic()
        self._write("\n".join([f"error: {clean(message)}"] + ([f"HINT: {clean(hint)}"] if hint else [])))
