"""Counts one statement's rows or copy data, keeps a sample up to a budget, hashes what is beyond it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final, Literal, TypeAlias

from pam_agent.protocols.base import Event
from pam_agent.protocols.postgres.codec import HEADER, HEADER_SIZE, Column
from pam_agent.protocols.postgres.redact import CopyRedaction, redact_value
from pam_agent.protocols.postgres.values import decode_row, decode_text

Source: TypeAlias = Literal["rows", "out", "in", "both"]

#: A count goes into the recording each time this much more has flowed, so that a crash in the middle of
#: a long transfer leaves no more than 64 MiB uncounted.
PROGRESS: Final = 64 << 20
#: Wire bytes of one row or copy message, and of all in one event: what becomes of both together in JSON
#: (11 times as much at worst, for binary numbers) stays below the 1 MiB of an event.
ROW: Final = 32 << 10
GROUP: Final = 32 << 10


class Bulk:
    """The bulk of statement ``query``: ``source`` is ``rows`` (a result) or a copy's direction.

    ``room`` is what may still be recorded, in bytes of message bodies. What is not recorded is counted and
    hashed (SHA-256) as it is on the wire: whole messages with their headers, and the ends of cut ones.
    ``early``: copy data that the target has not asked for yet; if it never does, it ignores the data.
    """

    # One of them may belong to each unanswered query, so they are kept small.
    __slots__ = (
        *("query", "source", "count", "bytes", "early"),
        *("_room", "_columns", "_formats", "_encoding", "_told_columns", "_redaction"),
        *("_unrecorded", "_digest", "_next_progress", "_partial"),
    )

    def __init__(
        self,
        query: int | None,
        source: Source,
        room: int,
        *,
        columns: Sequence[Column] = (),
        formats: Sequence[int] | None = None,
        encoding: str = "utf-8",
        early: bool = False,
    ) -> None:
        self.query = query
        self.source = source
        self.count = 0
        self.bytes = 0
        self.early = early
        self._room = room
        self._columns = columns
        self._formats = formats
        self._encoding = encoding
        self._told_columns = not columns
        self._redaction: CopyRedaction | None = None
        self._unrecorded = 0
        self._digest: hashlib._Hash | None = None  # most have nothing beyond the budget
        self._next_progress = PROGRESS
        self._partial: bytearray | None = None

    def run(self, view: memoryview, count: int) -> list[Event]:
        """``count`` whole messages with headers; returns the events to record before they go on."""
        self.count += count
        size = len(view)
        self.bytes += size - HEADER_SIZE * count
        if self._room <= 0:
            self._skip(view)
            return self._progress()
        events: list[Event] = []
        sample: list[bytes] = []
        gathered = position = 0
        while position < size and self._room > 0:
            _, length = HEADER.unpack_from(view, position)
            after = position + 1 + length
            sample.append(self._take(view[position + HEADER_SIZE : after]))
            gathered += len(sample[-1])
            position = after
            if gathered >= GROUP:
                events.append(self._sampled(sample))
                sample, gathered = [], 0
        if position < size:
            self._skip(view[position:])
        if sample:
            events.append(self._sampled(sample))
        return events + self._progress()

    def piece(self, view: memoryview, first: bool, last: bool) -> list[Event]:
        """Part of a message that spans buffers; the first one begins with the header."""
        if first:
            self._partial = bytearray() if self._room > 0 else None
            self.bytes -= HEADER_SIZE
        self.bytes += len(view)
        if self._partial is not None:
            view = view[HEADER_SIZE:] if first else view
            room = max(min(self._room, ROW) - len(self._partial), 0)
            self._partial += view[:room]
            self._skip(view[room:])
        else:
            self._skip(view)
        if not last:
            return self._progress()
        self.count += 1
        if self._partial is None:
            return self._progress()
        body = bytes(self._partial)
        self._partial = None
        self._room -= len(body)
        return [self._sampled([body]), *self._progress()]

    def summary(self) -> Event:
        """The fields of a ``result`` event that tell of the bulk."""
        fields: Event = {"bytes": self.bytes}
        fields["rows" if self.source == "rows" else "messages"] = self.count
        if self.source != "rows":
            fields["copy"] = self.source
        if self._digest is not None:
            fields["unrecorded_bytes"] = self._unrecorded
            fields["unrecorded_sha256"] = self._digest.hexdigest()
        return fields

    def _take(self, body: memoryview) -> bytes:
        kept = bytes(body[: min(self._room, ROW)])
        self._room -= max(len(kept), 1)  # copies of empty lines end too
        if len(kept) < len(body):
            self._skip(body[len(kept) :])
        return kept

    def _skip(self, view: memoryview) -> None:
        if len(view):
            self._unrecorded += len(view)
            if self._digest is None:
                self._digest = hashlib.sha256()
            self._digest.update(view)

    def _sampled(self, sample: list[bytes]) -> Event:
        event: Event = {"kind": "rows", "id": self.query}
        if self.source == "rows":
            if not self._told_columns:
                self._told_columns = True
                event["columns"] = [[column.name, column.type] for column in self._columns]
            event["rows"] = [
                [
                    redact_value(value) if value is not None else None
                    for value in decode_row(body, self._columns, self._formats, self._encoding)
                ]
                for body in sample
            ]
        else:
            event["copy"] = self.source
            if self.early:
                event["early"] = True
            if self._redaction is None:
                self._redaction = CopyRedaction()
            event["data"] = self._redaction.next(decode_text(b"".join(sample), self._encoding))
        return event

    def _progress(self) -> list[Event]:
        if self.bytes < self._next_progress:
            return []
        self._next_progress = self.bytes + PROGRESS
        event: Event = {"kind": "progress", "id": self.query, "messages": self.count, "bytes": self.bytes}
        if self.early:
            event["early"] = True
        return [event]
