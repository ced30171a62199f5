"""Recorded HTTP as exchanges: one request with its answer, put together from the events that tell of it.

    request ─ body(up)* ─ response ─ body(down)* ─▶ one exchange      refused │ failed ─▶ one, with the reason
                                    └ ws* ──────▶                      end, the next request ─▶ what was open

A connection has one exchange at a time, so as much is kept as there are connections. Any JSON is taken: what
a recording holds was written by another machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

#: Connections with an open exchange; agents carry a fifth of it per session. More: the oldest is given out.
MAX_OPEN = 1000
#: Text kept of one exchange, in characters: twice what a recording keeps of a body at most.
MAX_TEXT = 32 << 20
#: Messages of one socket.
MAX_MESSAGES = 100_000

Event: TypeAlias = dict[str, Any]


@dataclass
class Message:
    """What one side said: a head, and its body as far as it was recorded."""

    fields: Event = field(default_factory=dict)  #: the event with the head; empty when there is none
    at: float = 0.0  #: seconds since the part began
    size: int = 0  #: of the body, in bytes
    text: str = ""
    sha256: str = ""
    cut: bool = False  #: it did not end by itself

    @property
    def headers(self) -> list[tuple[str, str]]:
        """Names and values, in order."""
        pairs = self.fields.get("headers")
        return [
            (str(pair[0]), str(pair[1]))
            for pair in (pairs if isinstance(pairs, list) else [])
            if isinstance(pair, list) and len(pair) == 2
        ]

    def header(self, name: str) -> str:
        """The first value, or nothing; ``name`` in lower case."""
        return next((value for given, value in self.headers if given.lower() == name), "")


@dataclass
class Exchange:
    """One request and what came of it."""

    number: int  #: of the event that began it, from 0
    part: int
    connection: int
    request: Message
    response: Message = field(default_factory=Message)
    sockets: list[Event] = field(default_factory=list)  #: events of a WebSocket
    socket_messages: int = 0  #: all of them, those left out too
    refused: str = ""  #: why there is no answer of the app
    ended: float = 0.0  #: seconds since the part began
    left: int = MAX_TEXT

    @property
    def method(self) -> str:
        return _text(self.request.fields.get("method"))

    @property
    def url(self) -> str:
        return _text(self.request.fields.get("url"))

    @property
    def status(self) -> int:
        """0 without an answer."""
        return _number(self.response.fields.get("status"))

    @property
    def milliseconds(self) -> float:
        """From the request to the last byte of its answer."""
        return max(seconds(self.response.fields.get("ms")), (self.ended - self.request.at) * 1000, 0.0)


def exchanges(events: Iterable[Event], *, keep_text: bool = True) -> Iterator[Exchange]:
    """The exchanges in the order in which they ended; open ones last."""
    opened: dict[tuple[int, int], Exchange] = {}
    for number, event in enumerate(events):
        key = (_number(event.get("part")), _number(event.get("c")))
        found = opened.get(key)
        kind = event.get("kind")
        if kind == "request" or (_is_refusal(event) and not _same(found, event)):
            if found is not None:
                yield opened.pop(key)
            found = opened[key] = Exchange(number, *key, Message(event, time_of(event)))
            found.left = MAX_TEXT if keep_text else 0
            if len(opened) > MAX_OPEN:
                yield opened.pop(next(iter(opened)))
        if found is None:
            continue
        if kind == "end" or _take(found, event):
            found.ended = max(found.ended, found.request.at)
            yield opened.pop(key)
    yield from opened.values()


def time_of(event: Event) -> float:
    """Seconds since the part began."""
    return seconds(event.get("t"))


def _is_refusal(event: Event) -> bool:
    """Whether a request was refused or failed: other protocols' events of these kinds have no method."""
    return event.get("kind") in ("refused", "failed") and isinstance(event.get("method"), str)


def _same(found: Exchange | None, event: Event) -> bool:
    return found is not None and found.request.fields.get("id") == event.get("id")


def _take(exchange: Exchange, event: Event) -> bool:
    """Add an event to its exchange; True when that is complete."""
    kind = event.get("kind")
    if not _same(exchange, event):
        return False
    exchange.ended = max(exchange.ended, time_of(event))
    if kind == "request":
        _take_body(exchange, exchange.request, event)
    elif kind == "response":
        exchange.response = Message(event, time_of(event))
        _take_body(exchange, exchange.response, event)
        return event.get("body_bytes") is not None
    elif kind == "body":
        up = event.get("dir") == "up"
        _take_body(exchange, exchange.request if up else exchange.response, event)
        return not up and event.get("done") is True
    elif kind == "ws":
        _take_socket(exchange, event)
    elif kind in ("refused", "failed"):
        exchange.refused = _text(event.get("reason")) or f"refused by rule: {_text(event.get('rule'))}"
        if not exchange.status:
            exchange.response = Message({"status": event.get("status")}, time_of(event))
        return True
    return False


def _take_body(exchange: Exchange, message: Message, event: Event) -> None:
    # A head's event has the whole body, a body's event a piece of it and the count so far.
    message.size = max(message.size, _number(event.get("body_bytes")), _number(event.get("bytes")))
    text = _text(event.get("body")) or _text(event.get("data"))
    message.text += text[: exchange.left]
    exchange.left -= min(len(text), exchange.left)
    message.sha256 = _text(event.get("body_sha256")) or _text(event.get("sha256"))
    message.cut = message.cut or event.get("cut") is True


def _take_socket(exchange: Exchange, event: Event) -> None:
    way = exchange.request if event.get("dir") == "up" else exchange.response
    if event.get("more") is not True:
        exchange.socket_messages += 1
        way.size += _number(event.get("bytes"))
    size = len(_text(event.get("data"))) + len(_text(event.get("base64")))
    if exchange.left and len(exchange.sockets) < MAX_MESSAGES:
        exchange.sockets.append(event)
        exchange.left -= min(size, exchange.left)


def seconds(value: object) -> float:
    """A recorded time, 0 for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return 0.0
    # JSON as Python reads it knows NaN and infinity; a century is beyond any session.
    return float(value) if 0 <= value < 1e10 and math.isfinite(value) else 0.0


def _number(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
