"""A terminal's recording for ``asciinema play``: asciicast v2.

https://docs.asciinema.org/manual/asciicast/v2/. Output is neutralised as on our own terminal: a player
writes it to the terminal of whoever plays the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from pam_client.playback.frames import find, frames
from pam_common.errors import PamError
from pam_common.terminal import Neutraliser


def asciicast(
    events: Callable[[], Iterator[dict[str, Any]]], session: dict[str, Any], terminal: int
) -> Iterator[str]:
    """Terminal ``terminal`` (from 1) of the recording. Raises PamError when there is no such one."""
    found = find(events(), terminal)
    if found is None:
        raise PamError(
            "the recording has no terminal" if terminal == 1 else f"the recording has no terminal {terminal}",
            hint="pam-client replay shows what it has.",
        )
    started = session.get("started")
    header = {
        "version": 2,
        "width": found.columns,
        "height": found.rows,
        "timestamp": int(started + found.at) if isinstance(started, int) else 0,
        "title": f"{session.get('account', '')} {session.get('id', '')}".strip(),
        "env": {"TERM": found.term, "SHELL": ""},
    }
    yield json.dumps(header) + "\n"
    screen = Neutraliser()
    for frame in frames(events(), terminal):
        # Output that was dropped whole stays as a moment: the time of it is part of the record.
        data = screen.feed(frame.data) if frame.kind == "o" else _input(frame.data)
        yield json.dumps([round(frame.at, 6), frame.kind, data]) + "\n"


def _input(data: str) -> str:
    """Input is not written to a terminal by players, but may be shown."""
    return "".join(char if char.isprintable() else "?" for char in data)
