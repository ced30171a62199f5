"""What the client's messages ask for, as events; recorded before they are forwarded to the target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from pam_agent.protocols.base import ClientProtocolError, Event
from pam_agent.protocols.postgres.bulk import Bulk
from pam_agent.protocols.postgres.codec import Reader
from pam_agent.protocols.postgres.pipeline import Kind, Pipeline, Portal, Statement, Step
from pam_agent.protocols.postgres.redact import MASK, is_sensitive, is_suspect, redact_sql, redact_value
from pam_agent.protocols.postgres.values import (
    BINARY,
    PLAIN_TYPES,
    decode_text,
    decode_value,
    format_of,
)

#: A statement up to this many characters is repeated in full by each execution's event, so that the event
#: explains itself; a longer one is told once, when it is parsed, and then cited by number and start.
REPEATED: Final = 2048
CITED: Final = 256
#: Characters of text in one event. Each becomes at most 12 bytes of JSON, and an event's line has 1 MiB.
TEXT_PART: Final = 48 << 10
#: PostgreSQL looks at so many bytes of a statement's or portal's name, and so must whoever follows it.
_NAME: Final = 63

_Message = Callable[[bytes, int, str | None], None]


class ClientSide:
    """A Sink for the client's direction. ``clock`` gives seconds; ``rows_bytes`` is the budget per statement
    for copy data that comes before the target has asked for it."""

    def __init__(self, pipeline: Pipeline, clock: Callable[[], float], rows_bytes: int = 0) -> None:
        self.terminated = False
        self._pipeline = pipeline
        self._clock = clock
        self._rows_bytes = rows_bytes
        self._asked: Step | None = None  # the last query: copy data may follow it at once
        self._events: list[Event] = []
        self._queries = 0
        self._parsed = 0
        self._unrecorded: list[Statement | Portal] = []
        self._messages: dict[int, _Message] = {
            ord("Q"): self._query,
            ord("P"): self._parse,
            ord("B"): self._bind,
            ord("E"): self._execute,
            ord("D"): self._describe,
            ord("C"): self._close,
            ord("S"): self._sync,
            ord("F"): self._function,
            ord("X"): self._terminate,
            ord("c"): self._copy_end,
            ord("f"): self._copy_end,
        }

    def take_events(self) -> list[Event]:
        """The events of what was fed since the last call, to be recorded before it is forwarded."""
        for item in self._unrecorded:
            if not item.recorded:
                self._record_preparation(item)
        self._unrecorded.clear()
        events = self._events
        if events:
            self._events = []
        return events

    def control(self, kind: int, body: bytes, length: int, digest: str | None) -> None:
        if self.terminated:
            raise ClientProtocolError("message after Terminate")
        message = self._messages.get(kind)
        if message is not None:
            message(body, length, digest)

    def run(self, kind: int, view: memoryview, count: int) -> None:
        copy = self._pipeline.copy_in or self._early()
        if copy is not None:
            self._events += copy.run(view, count)

    def piece(self, kind: int, view: memoryview, first: bool, last: bool) -> None:
        copy = self._pipeline.copy_in or self._early()
        if copy is not None:
            self._events += copy.piece(view, first, last)

    def _early(self) -> Bulk | None:
        """For copy data that the target has not asked for, or not yet: a client need not wait for that, and
        the target, which need not answer before it has the data, cannot be waited for here."""
        asked = self._asked
        if asked is None:
            return None
        copy = self._pipeline.copy_data(asked, lambda: self._early_bulk(asked))
        if copy is None:
            self._asked = None  # answered: the server ignores the data
        return copy

    def _early_bulk(self, asked: Step) -> Bulk:
        return Bulk(asked.query, "in", self._rows_bytes, encoding=self._pipeline.encoding, early=True)

    def _text(self, data: bytes) -> tuple[str, bool]:
        """A statement redacted, and whether it was sensitive."""
        text = decode_text(data, self._pipeline.encoding)
        if not is_suspect(text):
            return text, False
        # Cut in the middle of a literal it still redacts: an unended literal reaches to the end.
        return redact_sql(text, backslashes=self._pipeline.backslashes), is_sensitive(text)

    def _tell(self, event: Event, sql: str) -> None:
        """Add an event and its statement, whose text may need several events."""
        event["sql"] = sql[:TEXT_PART]
        self._events.append(event)
        if len(sql) <= TEXT_PART:
            return
        for start in range(TEXT_PART, len(sql), TEXT_PART):
            self._events.append({"kind": "more", "sql": sql[start : start + TEXT_PART]})

    def _next_query(self) -> int:
        self._queries += 1
        return self._queries

    def _query(self, body: bytes, length: int, digest: str | None) -> None:
        if digest is None:
            if body.find(b"\0") != length - 1:
                raise ClientProtocolError("query message does not end with its first zero byte")
            body = body[:-1]
        sql, sensitive = self._text(body)
        number = self._next_query()
        event: Event = {"kind": "query", "id": number, "mode": "simple", **_cut(length, digest)}
        self._tell(event, sql)
        step = Step(Kind.QUERY, self._clock(), number, sensitive)
        self._push_query(step, event)

    def _push_query(self, step: Step, event: Event) -> None:
        if self._pipeline.push(step):
            self._asked = step
        else:
            self._asked = None
            event["skipped"] = True  # an error came before; the server ignores this

    def _parse(self, body: bytes, length: int, digest: str | None) -> None:
        reader = Reader(body, "parse", ClientProtocolError)
        name = reader.string()
        types: tuple[int, ...] = ()
        if digest is None:
            source = reader.string()
            types = tuple(reader.uint32() for _ in range(reader.uint16()))
            if reader.left:
                raise ClientProtocolError("parse message has bytes after its end")
        else:
            source = reader.take(reader.left).split(b"\0")[0]
        sql, sensitive = self._text(source)
        self._parsed += 1
        statement = Statement(self._parsed, self._name(name), sql, sensitive, types)
        statement.cut = _cut(length, digest)
        self._pipeline.keep(statement)
        if len(sql) <= REPEATED:
            self._unrecorded.append(statement)
        else:
            self._record_statement(statement)
            statement.sql = sql[:CITED]
            statement.cut = {"truncated": True}
        step = Step(Kind.PARSE, self._clock(), statement=statement, name=statement.name)
        self._pipeline.push(step)

    def _record_statement(self, statement: Statement) -> None:
        statement.recorded = True
        event: Event = {"kind": "parse", "statement": statement.number, "name": statement.name}
        event.update(statement.cut)
        self._tell(event, statement.sql)

    def _name(self, data: bytes) -> str:
        if not data:
            return ""
        # Backslashes doubled, so that no name can look like the escape for a byte of another.
        return decode_text(data[:_NAME].replace(b"\\", b"\\\\"), self._pipeline.encoding)

    def _bind(self, body: bytes, length: int, digest: str | None) -> None:
        reader = Reader(body, "bind", ClientProtocolError)
        name, statement_name = self._name(reader.string()), self._name(reader.string())
        statement = self._pipeline.statements.get(statement_name)
        formats = [reader.uint16() for _ in range(reader.uint16())]
        if digest is None:
            values = [_parameter(reader) for _ in range(reader.uint16())]
            results: tuple[int, ...] | None = tuple(reader.uint16() for _ in range(reader.uint16()))
            if reader.left:
                raise ClientProtocolError("bind message has bytes after its end")
        else:
            values, results = _cut_parameters(reader), None
        types = statement.types if statement is not None else ()
        sensitive = statement.sensitive if statement is not None else self._pipeline.forgot_sensitive
        params = [self._value(value, index, formats, types, sensitive) for index, value in enumerate(values)]
        portal = Portal(name, statement_name, statement, params, _cut(length, digest), results)
        self._pipeline.open_portal(portal)
        self._unrecorded.append(portal)
        self._pipeline.push(Step(Kind.BIND, self._clock(), portal=portal, name=name))

    def _value(
        self, data: bytes | None, index: int, formats: list[int], types: tuple[int, ...], sensitive: bool
    ) -> str | None:
        if data is None:
            return None
        type_ = types[index] if index < len(types) else 0
        format_ = format_of(formats, index)
        if sensitive and (format_ != BINARY or type_ not in PLAIN_TYPES):
            return MASK  # any other type may hold a text: char(n), json, an extension's or a domain
        return redact_value(decode_value(data, type_, format_, self._pipeline.encoding) or "")

    def _execute(self, body: bytes, length: int, digest: str | None) -> None:
        reader = Reader(body, "execute", ClientProtocolError)
        name = self._name(reader.string())
        most = reader.int32()
        portal = self._pipeline.portals.get(name)
        number = self._next_query()
        event: Event = {"kind": "query", "id": number, "mode": "extended"}
        step = Step(Kind.EXECUTE, self._clock(), query=number, portal=portal, name=name)
        if portal is None:
            event.update(sql=None, portal=name)  # a cursor that SQL declared
        elif portal.query is not None:
            event.update(continues=portal.query, portal=name)
        else:
            portal.query = number
            event.update(self._bound(portal))
        if most > 0:
            event["max_rows"] = most
        self._events.append(event)
        self._push_query(step, event)

    def _bound(self, portal: Portal) -> Event:
        """The fields that say what a portal runs, and with which values."""
        portal.recorded = True
        event: Event = {}
        statement = portal.statement
        if statement is None:
            event.update(sql=None, name=portal.statement_name)  # SQL's PREPARE made it
        else:
            event.update(sql=statement.sql, statement=statement.number, **statement.cut)
            if statement.name:
                event["name"] = statement.name
                if self._pipeline.names_uncertain:
                    event["uncertain"] = True
            statement.recorded = True
        if portal.name:
            event["portal"] = portal.name
        if portal.params:
            event["params"] = portal.params
            portal.params = []  # told; not to be kept for as long as the portal lives
        if portal.cut:
            event["params_cut"] = portal.cut
        return event

    def _record_preparation(self, item: Statement | Portal) -> None:
        """A Parse or Bind whose Execute did not come along with it."""
        if isinstance(item, Portal):
            self._events.append({"kind": "bind", **self._bound(item)})
        else:
            self._record_statement(item)

    def _describe(self, body: bytes, length: int, digest: str | None) -> None:
        what, name = self._target(body, "describe")
        step = Step(Kind.DESCRIBE, name=name)
        if what == "P":
            step.portal = self._pipeline.portals.get(name)
        else:
            step.statement = self._pipeline.statements.get(name)
        self._pipeline.push(step)

    def _close(self, body: bytes, length: int, digest: str | None) -> None:
        what, name = self._target(body, "close")
        portal = self._pipeline.portals.get(name) if what == "P" else None
        self._pipeline.push(Step(Kind.CLOSE, name="" if what == "P" else name, portal=portal))
        self._pipeline.forget(what, name)

    def _target(self, body: bytes, what: str) -> tuple[str, str]:
        reader = Reader(body, what, ClientProtocolError)
        kind = reader.take(1).decode("latin-1")
        if kind not in ("S", "P"):
            raise ClientProtocolError(f"{what} message names neither a statement nor a portal")
        return kind, self._name(reader.string())

    def _sync(self, body: bytes, length: int, digest: str | None) -> None:
        self._pipeline.push(Step(Kind.SYNC, self._clock()))

    def _function(self, body: bytes, length: int, digest: str | None) -> None:
        """A FunctionCall: old, but libpq's large objects (lo_read, lo_write) are made of it."""
        reader = Reader(body, "function call", ClientProtocolError)
        function = reader.uint32()
        formats = [reader.uint16() for _ in range(reader.uint16())]
        values = (
            [_parameter(reader) for _ in range(reader.uint16())]
            if digest is None
            else _cut_parameters(reader)
        )
        params = [self._value(value, index, formats, (), False) for index, value in enumerate(values)]
        number = self._next_query()
        event: Event = {"kind": "query", "id": number, "mode": "function", "function": function}
        event.update(params=params, **_cut(length, digest))
        self._events.append(event)
        self._pipeline.push(Step(Kind.FUNCTION, self._clock(), query=number))

    def _terminate(self, body: bytes, length: int, digest: str | None) -> None:
        self.terminated = True

    def _copy_end(self, body: bytes, length: int, digest: str | None) -> None:
        self._pipeline.push(Step(Kind.COPY_END))


def _cut(length: int, digest: str | None) -> dict[str, object]:
    """How long a message is of which only the start is recorded, and the SHA-256 of its whole body."""
    return {} if digest is None else {"truncated": True, "message_bytes": length, "message_sha256": digest}


def _parameter(reader: Reader) -> bytes | None:
    size = reader.int32()
    return None if size < 0 else reader.take(size)


def _cut_parameters(reader: Reader) -> list[bytes | None]:
    """Those parameters of a cut message that are there, the last one perhaps in part."""
    values: list[bytes | None] = []
    if reader.left < 2:
        return values
    for _ in range(reader.uint16()):
        if reader.left < 4:
            break
        size = reader.int32()
        values.append(None if size < 0 else reader.take(min(size, reader.left)))
    return values
