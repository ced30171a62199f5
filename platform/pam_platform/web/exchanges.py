"""Recorded HTTP as rows of a page: what was asked for, what came of it, how large, how long."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from pam_common.exchanges import Exchange, exchanges

# As many as of events; a row is a line or two.
PAGE_SIZE = 200


@dataclass(frozen=True)
class ExchangeRow:
    """One request, ready for the template, which escapes everything."""

    event: int  # the number of its first event, where the list of events goes on with it
    clock: str
    method: str
    url: str
    status: str
    failed: bool
    sent: int
    received: int
    milliseconds: str
    note: str


@dataclass(frozen=True)
class Page:
    """Some exchanges, in the order in which they ended, and whether others follow."""

    rows: tuple[ExchangeRow, ...]
    following: int | None


def page(events: Iterable[dict[str, Any]], start: int) -> Page:
    """The exchanges from number ``start`` (from 0) on, as many as a page holds."""
    some = list(islice(exchanges(events, keep_text=False), start, start + PAGE_SIZE + 1))
    following = start + PAGE_SIZE if len(some) > PAGE_SIZE else None
    return Page(tuple(map(row_of, some[:PAGE_SIZE])), following)


def row_of(exchange: Exchange) -> ExchangeRow:
    """One exchange's row."""
    status = exchange.status
    return ExchangeRow(
        event=exchange.number,
        clock=_clock(exchange.request.at),
        method=exchange.method,
        url=exchange.url,
        status=str(status) if status else "none",
        failed=bool(exchange.refused) or not status or status >= 400,
        sent=exchange.request.size,
        received=exchange.response.size,
        milliseconds=f"{exchange.milliseconds:.0f}",
        note=_note(exchange),
    )


def _note(exchange: Exchange) -> str:
    """What the other columns do not say."""
    if exchange.refused:
        return exchange.refused
    if exchange.socket_messages:
        return f"WebSocket, {exchange.socket_messages} message{'' if exchange.socket_messages == 1 else 's'}"
    if not exchange.status:
        return "no answer was recorded"
    return "cut off" if exchange.request.cut or exchange.response.cut else ""


def _clock(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02d}:{rest:06.3f}"
