"""What both directions of a connection know together: prepared statements, portals, answers to expect.

The extended protocol may be pipelined: a client sends many messages before the first answer. Each message
that will be answered puts a :class:`Step` into one queue; the target's side takes them off in order. After
an error the server skips everything up to the next Sync, and so does the queue.

Two views of the names exist. ``statements`` is what the client's messages say, at once; ``confirmed`` is
what the target has answered for. They differ when a pipelined Parse fails because its name is taken: then
a Bind recorded under the new text really runs the old one, and the recording gets a ``correction``.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from itertools import islice
from typing import TYPE_CHECKING, Final

from pam_agent.protocols.base import ClientProtocolError

if TYPE_CHECKING:
    from pam_agent.protocols.postgres.bulk import Bulk
    from pam_agent.protocols.postgres.codec import Column

#: Unanswered messages before the client is made to wait. Real pipelines hold hundreds; a server answers
#: 65536 messages with at least 320 kB, far more than it buffers, so waiting here always ends.
STEPS_LIMIT: Final = 65536
#: Prepared statements or portals open at a time: drivers keep 100 to 256. With CITED and KEPT_COLUMNS each
#: costs the agent 10 kB at the very most.
NAMES_LIMIT: Final = 4096
#: How far an answer is looked for: a copy swallows a few Syncs. A target that answers what nobody asked
#: must not make each of its five bytes cost a walk through all steps.
_LOOKAHEAD: Final = 256
#: Columns remembered of a prepared statement, for the names and types of its rows.
KEPT_COLUMNS: Final = 64


class Kind(Enum):
    """What a Step stands for."""

    QUERY = "query"
    PARSE = "parse"
    BIND = "bind"
    DESCRIBE = "describe"
    EXECUTE = "execute"
    CLOSE = "close"
    SYNC = "sync"
    FUNCTION = "function call"
    COPY_END = "end of copy"


#: The steps that a ReadyForQuery answers.
READY: Final = frozenset({Kind.QUERY, Kind.SYNC, Kind.FUNCTION})


@dataclass(slots=True)
class Statement:
    """A prepared statement. ``number`` counts the Parse messages of the connection; ``sql`` is redacted, and
    only its start for a long one (``recorded`` by a ``parse`` event of its own)."""

    number: int
    name: str
    sql: str
    sensitive: bool
    types: tuple[int, ...] = ()
    columns: list[Column] | None = None
    recorded: bool = False
    cut: dict[str, object] = field(default_factory=dict)


@dataclass(slots=True)
class Portal:
    """A bound statement. ``formats`` are the result format codes, None if they were not captured."""

    name: str
    statement_name: str
    statement: Statement | None
    params: list[str | None]
    cut: dict[str, object]
    formats: tuple[int, ...] | None
    columns: list[Column] | None = None
    recorded: bool = False
    query: int | None = None


@dataclass(slots=True)
class Step:
    """One message of the client that will be answered; ``at`` is when it was seen, in seconds."""

    kind: Kind
    at: float = 0.0
    query: int | None = None
    sensitive: bool = False
    statement: Statement | None = None
    portal: Portal | None = None
    name: str = ""

    @property
    def runs(self) -> Statement | None:
        """The prepared statement that this is about."""
        return self.portal.statement if self.portal is not None else self.statement


class Pipeline:
    """Shared by the two directions of one connection, each in one thread at a time.

    The client's only appends to ``_steps``, the target's only removes from it, so its front may be looked at
    and taken off without the lock.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._room = threading.Condition(self.lock)
        self._steps: deque[Step] = deque()
        self._skipping = False
        self._closed = False
        self._wanted = False  # somebody waits for room
        self.statements: dict[str, Statement] = {}
        self.portals: dict[str, Portal] = {}
        self._confirmed: dict[str, Statement] = {}
        self.copy_in: Bulk | None = None  # the copy whose data the client is sending
        self._copy_open = False
        self.encoding = "utf-8"
        self.backslashes = False  # standard_conforming_strings is off
        self.names_uncertain = False  # SQL PREPARE or DEALLOCATE changed names behind the protocol

    # The client's side.

    @property
    def has_room(self) -> bool:
        """Whether :meth:`wait_for_room` would return at once."""
        return len(self._steps) < STEPS_LIMIT

    def wait_for_room(self) -> None:
        """Block while too many messages are unanswered; returns at once when the connection ends."""
        if len(self._steps) < STEPS_LIMIT:
            return
        with self.lock:
            self._wanted = True
            self._room.wait_for(lambda: self._closed or len(self._steps) < STEPS_LIMIT // 2)
            self._wanted = False

    def close(self) -> None:
        """The connection ends: wake who waits."""
        with self.lock:
            self._closed = True
            self._room.notify_all()

    def push(self, step: Step) -> bool:
        """Expect an answer to a message; False if the server will ignore the message."""
        with self.lock:
            if step.kind is Kind.SYNC:
                if self._copy_open:
                    return False  # the server ignores Sync in copy-in mode
                self._skipping = False
            elif self._skipping:
                self._undo(step)
                return False
            elif step.kind is Kind.COPY_END:
                self._copy_open = False
                try:
                    last = self._steps[-1].kind
                except IndexError:  # even when it was there a moment ago
                    return False
                if last is Kind.COPY_END:
                    return False
            self._steps.append(step)
        return True

    def keep(self, statement: Statement) -> None:
        """Remember a statement under its name. Raises ClientProtocolError beyond NAMES_LIMIT."""
        with self.lock:
            if statement.name not in self.statements and len(self.statements) >= NAMES_LIMIT:
                raise ClientProtocolError("too many prepared statements", hint="close those not needed")
            self.statements[statement.name] = statement

    def open_portal(self, portal: Portal) -> None:
        with self.lock:
            if portal.name not in self.portals and len(self.portals) >= NAMES_LIMIT:
                raise ClientProtocolError("too many open portals", hint="close those not needed")
            self.portals[portal.name] = portal

    def forget(self, what: str, name: str) -> None:
        """The client closes a statement (``S``) or portal (``P``)."""
        with self.lock:
            if what == "P":
                self.portals.pop(name, None)
            else:
                self.statements.pop(name, None)

    # The target's side.

    def head(self) -> Step | None:
        return self._steps[0] if self._steps else None

    def expect(self, *kinds: Kind) -> Step | None:
        """The step now being answered, which is one of ``kinds``; steps before it were not answered (a
        Sync that a copy swallowed). None, and nothing dropped, if there is none."""
        steps = self._steps
        if steps and steps[0].kind in kinds:
            return steps[0]
        with self.lock:
            for index, step in enumerate(islice(steps, _LOOKAHEAD)):
                if step.kind in kinds:
                    for _ in range(index):
                        steps.popleft()
                    return step
        return None

    def pop(self) -> None:
        self._steps.popleft()
        if self._wanted and len(self._steps) < STEPS_LIMIT // 2:
            self._tell_room()

    def _tell_room(self) -> None:
        with self.lock:
            self._room.notify_all()

    def confirm(self, step: Step) -> None:
        """A ParseComplete: the name now denotes this statement for the target."""
        if step.statement is not None:
            with self.lock:
                self._confirmed[step.name] = step.statement

    def confirmed(self, name: str) -> Statement | None:
        return self._confirmed.get(name)

    def confirm_closed(self, step: Step) -> None:
        """A CloseComplete of a statement."""
        if step.portal is None:
            with self.lock:
                self._confirmed.pop(step.name, None)

    def forget_all(self) -> None:
        """DEALLOCATE ALL or DISCARD ALL was answered."""
        with self.lock:
            self._confirmed.clear()

    def ready(self, idle: bool) -> None:
        """A ReadyForQuery: everything up to its cause is answered. ``idle``: outside a transaction."""
        with self.lock:
            while self._steps and self._steps.popleft().kind not in READY:
                pass
            if idle and not self._steps:
                self.portals.clear()  # portals end with their transaction
            self.copy_in = None
            self._copy_open = False
            if self._wanted:
                self._room.notify_all()

    def skip_to_sync(self) -> list[int]:
        """An error in the extended protocol: the server ignores all before the next Sync.

        Returns the numbers of the queries behind the failed message that will not run.
        """
        skipped: list[int] = []
        with self.lock:
            failed = self._steps[0] if self._steps else None
            self.copy_in = None
            self._copy_open = False
            while self._steps:
                step = self._steps[0]
                if step.kind is Kind.SYNC:
                    break
                self._steps.popleft()
                self._undo(step)
                if step.query is not None and step is not failed:
                    skipped.append(step.query)
            else:
                self._skipping = True
            self._room.notify_all()
        return skipped

    def _undo(self, step: Step) -> None:
        """What a skipped message said about names did not happen."""
        if step.portal is not None:
            return
        before = self._confirmed.get(step.name)
        if step.kind is Kind.PARSE and self.statements.get(step.name) is step.statement:
            del self.statements[step.name]
        if before is not None and step.kind in (Kind.PARSE, Kind.CLOSE):
            self.statements.setdefault(step.name, before)

    def begin_copy_in(self, bulk: Bulk) -> None:
        """A CopyInResponse. The Syncs sent along with the Execute are read, and ignored, as copy data."""
        with self.lock:
            self.copy_in = bulk
            steps = self._steps
            while len(steps) > 1 and steps[1].kind is Kind.SYNC:
                del steps[1]
            self._copy_open = len(steps) < 2 or steps[1].kind is not Kind.COPY_END
