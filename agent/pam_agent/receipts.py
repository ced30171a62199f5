"""Receipts: which recordings the platform has acknowledged, so that it is noticed when it loses one.

A part is deleted here once the platform has it. A platform that was restored from an older backup does not
know the latest parts any more, and nothing there could tell: the agent remembers them, and asks.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from pathlib import Path
from typing import Any

from pam_common.errors import PamError, RefusedError
from pam_common.files import remove_scratch, write_private
from pam_common.keys import b64decode, b64encode
from pam_common.logging import get_logger, kv
from pam_common.platform_client import PlatformClient
from pam_common.recording.format import HASH_SIZE, Head, RecordingError, parse_part_name, part_name

log = get_logger("agent.receipts")

#: The newest so many. A backup is about a day old at most, and one agent has fewer sessions in a day.
MAX_RECEIPTS = 1000
#: Receipts per question: some 25 KiB of JSON, of which the platform takes 64.
BATCH = 200
#: A restored platform was away for a moment, and is asked at once when it is back; this is for the rest.
CHECK_INTERVAL = 3600.0
#: Bytes of the longest line and some; a longer one is not ours.
_LINE = 200


class Receipts:
    """The acknowledged parts, kept in ``path``. ``soon`` from any thread, the rest from the uploader's."""

    def __init__(self, path: Path, platform: PlatformClient) -> None:
        self._path, self._platform = path, platform
        self._kept = _load(path)  # name → chain hash; the oldest first
        self._due = threading.Event()
        self._due.set()
        self._next = 0.0
        self._reported: frozenset[str] = frozenset()  # a part of what is kept, so as bounded
        self._trouble = ""

    @property
    def lost(self) -> list[str]:
        """``session.part`` of what the platform said it has not any more."""
        return sorted(self._reported)

    def add(self, head: Head) -> None:
        """The platform has this part. To be called before the part is deleted here; raises nothing."""
        name = part_name(head.session, head.part)
        self._kept.pop(name, None)
        self._kept[name] = b64encode(head.hash)
        while len(self._kept) > MAX_RECEIPTS:
            oldest = next(iter(self._kept))
            del self._kept[oldest]
            self._reported -= {oldest}
        lines = [json.dumps(item) + "\n" for item in self._kept.items()]
        try:
            write_private(self._path, "".join(lines).encode("ascii"))
        except OSError as error:
            # Not worth keeping the part: on a full disk it is the deletion that makes room.
            log.warning("receipt not kept", extra=kv(session=head.session, reason=error.strerror))

    def soon(self) -> None:
        """The platform was away and is back: ask at the next opportunity."""
        self._due.set()

    def check(self) -> None:
        """Ask, if it is time, whether the platform still has what it acknowledged. Raises nothing."""
        if not self._due.is_set() and time.monotonic() < self._next:
            return
        self._due.clear()
        self._next = time.monotonic() + CHECK_INTERVAL
        names = list(self._kept)
        try:
            for start in range(0, len(names), BATCH):
                self._ask(names[start : start + BATCH])
        except PamError as error:
            self._due.set()
            # A platform of an older version does not know the question: nothing to say, nothing to repeat.
            if isinstance(error, RefusedError):
                self._due.clear()
            elif str(error) != self._trouble:
                log.warning("receipts not checked, will try again", extra=kv(reason=error))
            self._trouble = str(error)
        else:
            self._trouble = ""

    def _ask(self, names: list[str]) -> None:
        parts = []
        for name in names:
            ids = parse_part_name(name)
            assert ids is not None  # checked when it was loaded
            parts.append({"session": ids[0], "part": ids[1], "hash": self._kept[name]})
        answer = self._platform.post("/agent/recordings/check", json={"parts": parts})
        lost = _lost(answer).intersection(names)
        for name in sorted(lost - self._reported):
            session, part = parse_part_name(name) or ("", 0)
            log.error(
                "platform has lost a recording that it acknowledged",
                extra=kv(session=session, recording_part=part),
            )
        self._reported = self._reported.difference(names) | lost


def _lost(answer: dict[str, Any]) -> set[str]:
    entries = answer.get("lost")
    try:
        return {part_name(entry["session"], entry["part"]) for entry in entries or ()}
    except (TypeError, KeyError, RecordingError):
        return set()


def _load(path: Path) -> dict[str, str]:
    """What an earlier process kept. Damage costs receipts, never a start."""
    kept: dict[str, str] = {}
    with contextlib.suppress(OSError):
        remove_scratch(path)
    try:
        with path.open("rb") as file:
            lines = file.read(MAX_RECEIPTS * _LINE).splitlines()
    except FileNotFoundError:
        return kept
    except OSError as error:
        log.warning("receipts cannot be read", extra=kv(reason=error.strerror))
        return kept
    for line in lines[-MAX_RECEIPTS:]:
        try:
            name, digest = json.loads(line)
        except (ValueError, TypeError):
            continue
        if isinstance(name, str) and isinstance(digest, str) and parse_part_name(name) and _is_hash(digest):
            kept[name] = digest
    return kept


def _is_hash(text: str) -> bool:
    try:
        return len(b64decode(text)) == HASH_SIZE
    except (ValueError, PamError):
        return False
