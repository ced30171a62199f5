"""One event per line, as recorded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any


def ndjson(
    events: Callable[[], Iterator[dict[str, Any]]], _session: dict[str, Any], _terminal: int
) -> Iterator[str]:
    """ASCII only, so that nothing in it can steer a terminal."""
    for event in events():
        yield json.dumps(event, ensure_ascii=True) + "\n"
