"""A recording with terminals as lines: what they showed as text, everything else as any event."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from pam_client.output import clean
from pam_client.replay import head, lines
from pam_common.terminal import PlainText

#: Terminals whose unfinished line is kept; the ones before are told as they are.
MAX_TERMINALS = 256


def transcript(events: Iterable[dict[str, Any]]) -> Iterator[str]:
    """The lines. Output becomes a line when its line ends, with the time of that."""
    screens: dict[tuple[Any, ...], PlainText] = {}
    last: dict[str, Any] = {}
    for event in events:
        place = (event.get("part"), event.get("c"), event.get("ch"))
        if event.get("kind") == "o" and isinstance(event.get("data"), str):
            screen = screens.setdefault(place, PlainText())
            for line in screen.feed(event["data"]):
                yield _shown(event, line)
            if len(screens) > MAX_TERMINALS:
                rest = screens.pop(next(iter(screens))).rest()
                yield from [_shown(event, rest)] if rest else []
        elif event.get("kind") != "i":  # what was typed and echoed is in the output
            if event.get("kind") == "exit" and place in screens:
                rest = screens.pop(place).rest()
                yield from [_shown(event, rest)] if rest else []
            yield from lines(event)
        last = event
    for screen in screens.values():
        rest = screen.rest()
        yield from [_shown(last, rest)] if rest else []


def _shown(event: dict[str, Any], line: str) -> str:
    return f"{head({**event, 'kind': 'screen'})}{clean(line, newlines=True)}".rstrip()
