"""Recordings as files for other programs; one module per format, each with one function.

A format gets the events twice where it needs to look ahead, so it takes a function that fetches them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from pam_client.export.asciicast import asciicast
from pam_client.export.har import har
from pam_client.export.ndjson import ndjson

Events: TypeAlias = Callable[[], Iterator[dict[str, Any]]]
#: (events, the session as the API shows it, terminal number) → the file's text, piece by piece.
Export: TypeAlias = Callable[[Events, dict[str, Any], int], Iterator[str]]

#: name → function.
EXPORTS: dict[str, Export] = {"asciicast": asciicast, "har": har, "ndjson": ndjson}
