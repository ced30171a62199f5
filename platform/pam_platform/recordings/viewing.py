"""Showing recordings to people: the decrypted events, in bounds.

Who may see a recording is decided in :mod:`pam_platform.recordings.rights`; every view is audited by
the caller.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from pam_common.recording import NoRecipientError, PartReader, RecordingError
from pam_platform.recordings.models import RecordingPart
from pam_platform.recordings.store import PartStore
from pam_platform.vault import keys

# What one view decompresses of a part at most: hours of reading, and the end of a decompression bomb.
MAX_VIEW = 2 * 1024**3


def events_of(part: RecordingPart) -> Iterator[dict[str, Any]]:
    """The part's events in order, ``{"t", "c", "kind", …}``.

    Raises RecordingError: at once when this platform's keys do not open it, and after the events that
    could be read when the rest is damaged or, of a part still arriving, not there yet.
    """
    store = PartStore()
    name = store.name_of(part.session_id, part.number)
    if not store.exists(name):
        if part.state == RecordingPart.State.RECEIVING:
            return
        raise RecordingError("the file is lost")
    with store.reading(name) as file:
        yield from _reader(file).events()


def _reader(file: BinaryIO) -> PartReader:
    try:
        return PartReader(file, keys.recording_private_keys(), max_bytes=MAX_VIEW)
    except NoRecipientError as error:
        raise RecordingError(
            "the recording is sealed to auditors only, and the platform cannot open it",
            hint=f"pam-client replay --key-file opens it, with the key {' or '.join(error.kids)}.",
        ) from None


def ndjson(parts: Iterable[RecordingPart]) -> Iterator[bytes]:
    """All events as lines of ASCII JSON, each with its ``part``; a damage becomes a last line.

    Control characters are escaped by JSON, so the stream is harmless in a terminal.
    """
    for part in parts:
        try:
            for event in events_of(part):
                yield _line({"part": part.number, **event})
        except RecordingError as error:
            yield _line({"part": part.number, "kind": "problem", "problem": str(error), "hint": error.hint})


def _line(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, separators=(",", ":")).encode("ascii") + b"\n"
