"""What the target answers, as events; recorded before it is forwarded to the client."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pam_agent.protocols.base import Event, TargetProtocolError
from pam_agent.protocols.postgres.bulk import Bulk, Source
from pam_agent.protocols.postgres.codec import Column, Reader, parse_columns, parse_error
from pam_agent.protocols.postgres.pipeline import KEPT_COLUMNS, Kind, Pipeline, Portal, Step
from pam_agent.protocols.postgres.redact import redact_message
from pam_agent.protocols.postgres.values import decode_text, python_encoding

_IN_EXTENDED = frozenset({Kind.PARSE, Kind.BIND, Kind.DESCRIBE, Kind.EXECUTE, Kind.CLOSE})


class TargetSide:
    """A Sink for the target's direction. ``rows_bytes`` is the budget per statement."""

    def __init__(self, pipeline: Pipeline, rows_bytes: int, clock: Callable[[], float]) -> None:
        self.last_words: str | None = None  # the message of a FATAL error, after which the target closes
        self._pipeline = pipeline
        self._rows_bytes = rows_bytes
        self._clock = clock
        self._events: list[Event] = []
        self._bulk: Bulk | None = None
        self._columns: list[Column] = []
        # Programs ask the same over and over: the last description, with what it came to.
        self._described: tuple[bytes, str, list[Column]] = (b"", "", [])
        self._notices = 0
        self._finished = 0.0
        self._lost = False
        self._messages: dict[int, Callable[[bytes], None]] = {
            ord("1"): self._parse_complete,
            ord("2"): self._bind_complete,
            ord("3"): self._close_complete,
            ord("t"): self._parameter_description,
            ord("T"): self._row_description,
            ord("n"): self._no_data,
            ord("C"): self._command_complete,
            ord("I"): self._empty_query,
            ord("s"): self._portal_suspended,
            ord("G"): self._copy_in,
            ord("H"): self._copy_out,
            ord("W"): self._copy_both,
            ord("V"): self._function_result,
            ord("Z"): self._ready,
            ord("E"): self._error,
            ord("N"): self._notice,
            ord("A"): self._notification,
            ord("S"): self._parameter_status,
        }

    def take_events(self) -> list[Event]:
        """The events of what was fed since the last call, to be recorded before it is forwarded."""
        events = self._events
        if events:
            self._events = []
        return events

    def control(self, kind: int, body: bytes, length: int, digest: str | None) -> None:
        message = self._messages.get(kind)
        if message is not None:
            message(body)

    def run(self, kind: int, view: memoryview, count: int) -> None:
        self._events += self._flowing().run(view, count)

    def piece(self, kind: int, view: memoryview, first: bool, last: bool) -> None:
        self._events += self._flowing().piece(view, first, last)

    # Steps.

    def _expect(self, *kinds: Kind) -> Step | None:
        step = self._pipeline.expect(*kinds)
        if step is None:
            self._tell_lost([kind.value for kind in kinds])
        return step

    def _parse_complete(self, body: bytes) -> None:
        if (step := self._expect(Kind.PARSE)) is not None:
            self._pipeline.pop()
            self._pipeline.confirm(step)

    def _bind_complete(self, body: bytes) -> None:
        if (step := self._expect(Kind.BIND)) is None:
            return
        self._pipeline.pop()
        portal = step.portal
        if portal is None:
            return
        true = self._pipeline.confirmed(portal.statement_name)
        if true is not portal.statement:
            self._correct(portal)

    def _correct(self, portal: Portal) -> None:
        """The name denoted another statement than the recording said."""
        true = self._pipeline.confirmed(portal.statement_name)
        portal.statement = true
        event: Event = {"kind": "correction", "id": portal.query, "name": portal.statement_name}
        if true is None:
            event["sql"] = None
        else:
            event.update(statement=true.number, sql=true.sql)
        self._events.append(event)

    def _close_complete(self, body: bytes) -> None:
        if (step := self._expect(Kind.CLOSE)) is not None:
            self._pipeline.pop()
            self._pipeline.confirm_closed(step)

    def _parameter_description(self, body: bytes) -> None:
        step = self._expect(Kind.DESCRIBE)
        if step is not None and step.statement is not None:
            reader = Reader(body, "parameter description", TargetProtocolError)
            count = reader.uint16()
            if reader.left >= 4 * count:
                step.statement.types = tuple(reader.uint32() for _ in range(count))

    def _row_description(self, body: bytes) -> None:
        step = self._expect(Kind.DESCRIBE, Kind.QUERY, Kind.EXECUTE)
        columns = self._parsed_columns(body)
        if step is None or step.kind is not Kind.DESCRIBE:
            self._columns = columns
            return
        self._pipeline.pop()
        if step.portal is not None:
            step.portal.columns = columns[:KEPT_COLUMNS]
        elif step.statement is not None:
            step.statement.columns = columns[:KEPT_COLUMNS]

    def _parsed_columns(self, body: bytes) -> list[Column]:
        """Nobody changes what is returned."""
        last, encoding, columns = self._described
        if body != last or encoding != self._pipeline.encoding:
            encoding = self._pipeline.encoding
            columns = parse_columns(body, encoding)
            self._described = (body, encoding, columns)
        return columns

    def _no_data(self, body: bytes) -> None:
        if self._expect(Kind.DESCRIBE) is not None:
            self._pipeline.pop()

    # Results.

    def _flowing(self) -> Bulk:
        """What the target's rows or copy data belong to."""
        bulk = self._bulk or self._open_rows()
        if bulk.source == "in":
            # The client's data is what flows: mixed with it, neither would be recorded as it was.
            raise TargetProtocolError("rows while the client copies in")
        return bulk

    def _open_rows(self) -> Bulk:
        """The first row of a result: find its columns and formats."""
        step = self._expect(Kind.EXECUTE, Kind.QUERY)
        columns: Sequence[Column] = self._columns
        formats: Sequence[int] | None = None
        if step is not None and step.kind is Kind.EXECUTE and (portal := step.portal) is not None:
            statement = portal.statement
            columns = portal.columns or (statement.columns if statement is not None else None) or ()
            formats = portal.formats
        self._bulk = Bulk(
            step.query if step is not None else None,
            "rows",
            self._rows_bytes,
            columns=columns,
            formats=formats,
            encoding=self._pipeline.encoding,
        )
        return self._bulk

    def _open_copy(self, source: Source) -> Bulk:
        step = self._expect(Kind.EXECUTE, Kind.QUERY)
        query = step.query if step is not None else None
        self._bulk = Bulk(query, source, self._rows_bytes, encoding=self._pipeline.encoding)
        return self._bulk

    def _copy_in(self, body: bytes) -> None:
        if self._bulk is not None and self._bulk.source == "in":
            raise TargetProtocolError("a copy begins within a copy")
        self._bulk = self._pipeline.begin_copy_in(self._open_copy("in"))

    def _copy_out(self, body: bytes) -> None:
        self._open_copy("out")

    def _copy_both(self, body: bytes) -> None:
        self._open_copy("both")
        self._pipeline.begin_copy_both()

    def _finish(self, step: Step | None, **fields: Any) -> None:
        """A ``result`` event: what a statement came to."""
        now = self._clock()
        event: Event = {"kind": "result", "id": None, **fields}
        if step is not None:
            event["id"] = step.portal.query if step.query is None and step.portal else step.query
            event["ms"] = round(max(now - max(step.at, self._finished), 0.0) * 1000, 3)
            if step.statement is not None:
                event["statement"] = step.statement.number
        if self._bulk is not None:
            event.update(self._bulk.summary())
        if self._notices:
            event["notices"] = self._notices
        self._events.append(event)
        self._finished = now
        self._notices = 0
        self._bulk = None
        self._columns = []

    def _command_complete(self, body: bytes) -> None:
        tag = decode_text(body.rstrip(b"\0"), "utf-8")
        step = self._expect(Kind.EXECUTE, Kind.QUERY)
        if self._bulk is not None and self._bulk.source == "in":
            self._pipeline.end_copy_in()
        self._finish(step, tag=tag)
        if step is not None and step.kind is Kind.EXECUTE:
            self._pipeline.pop()
        if tag in ("DEALLOCATE ALL", "DISCARD ALL"):
            self._pipeline.forget_all()
        elif tag in ("PREPARE", "DEALLOCATE"):
            self._pipeline.names_uncertain = True

    def _empty_query(self, body: bytes) -> None:
        step = self._expect(Kind.EXECUTE, Kind.QUERY)
        self._finish(step, tag="")
        if step is not None and step.kind is Kind.EXECUTE:
            self._pipeline.pop()

    def _portal_suspended(self, body: bytes) -> None:
        step = self._expect(Kind.EXECUTE)
        self._finish(step, tag="", suspended=True)
        if step is not None:
            self._pipeline.pop()

    def _function_result(self, body: bytes) -> None:
        self._finish(self._expect(Kind.FUNCTION), tag="")

    def _ready(self, body: bytes) -> None:
        self._pipeline.ready(idle=body == b"I")
        self._bulk = None
        if self._pipeline.lost:
            self._tell_lost([])

    def _tell_lost(self, expected: list[str]) -> None:
        """Said once: from here on results may not be matched with their queries."""
        if not self._lost:
            self._lost = True
            self._events.append({"kind": "unmatched", "expected": expected})

    # Anything at any time.

    def _error(self, body: bytes) -> None:
        step = self._pipeline.failing()
        fields = parse_error(body, self._pipeline.encoding)
        sensitive = step is not None and self._is_sensitive(step)
        fields = {
            name: text if name in ("code", "severity") else redact_message(text, sensitive=sensitive)
            for name, text in fields.items()
        }
        self._finish(step, error=fields)
        if fields.get("severity") in ("FATAL", "PANIC"):
            self.last_words = fields.get("message", "")
        if step is not None and step.kind in _IN_EXTENDED:
            skipped = self._pipeline.skip_to_sync()
            if skipped:
                self._events.append({"kind": "skipped", "ids": skipped})

    def _is_sensitive(self, step: Step) -> bool:
        runs = step.runs
        if runs is not None:
            return runs.sensitive
        return step.sensitive or (step.portal is not None and self._pipeline.forgot_sensitive)

    def _notice(self, body: bytes) -> None:
        self._notices += 1

    def _notification(self, body: bytes) -> None:
        reader = Reader(body, "notification", TargetProtocolError)
        pid = reader.uint32()
        channel, payload = (decode_text(reader.string(), self._pipeline.encoding) for _ in range(2))
        self._events.append({"kind": "notification", "pid": pid, "channel": channel, "payload": payload})

    def _parameter_status(self, body: bytes) -> None:
        reader = Reader(body, "parameter status", TargetProtocolError)
        name, value = (decode_text(reader.string(), "utf-8") for _ in range(2))
        self.setting(name, value)
        self._events.append({"kind": "setting", "name": name, "value": value})

    def setting(self, name: str, value: str) -> None:
        """A setting that changes how texts are read."""
        if name == "client_encoding":
            self._pipeline.encoding = python_encoding(value)
        elif name == "standard_conforming_strings":
            self._pipeline.backslashes = value == "off"
