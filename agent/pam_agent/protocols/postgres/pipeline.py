"""What both directions of a connection know together: prepared statements, portals, answers to expect.

The extended protocol may be pipelined: a client sends many messages before the first answer. Each message
that will be answered puts a :class:`Step` into one queue; the target's side takes them off in order. After
an error the server skips everything up to the next Sync, and so does the queue.

Two views of the names exist. ``statements`` is what the client's messages say, at once; ``confirmed`` is
what the target has answered for. They differ when a pipelined Parse fails because its name is taken: then
a Bind recorded under the new text really runs the old one, and the recording gets a ``correction``.

In copy-in mode the server ignores a Sync; after an error it does not. Whether it took one that was sent
with the data depends on how far it had read, so such a Sync waits in the queue as one that is ``perhaps``
answered. It goes when the copy ends well, when a ReadyForQuery comes, or when what is behind it is answered.
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
    from collections.abc import Callable

    from pam_agent.protocols.postgres.bulk import Bulk
    from pam_agent.protocols.postgres.codec import Column

#: Unanswered messages before the client is made to wait. Real pipelines hold hundreds; a server answers
#: 65536 messages with at least 320 kB, far more than it buffers, so waiting here always ends.
STEPS_LIMIT: Final = 65536
#: Prepared statements or portals remembered at a time: drivers keep 100 to 256. With CITED and KEPT_COLUMNS
#: each costs the agent 10 kB at the very most. Beyond it the oldest statement is forgotten: the names of a
#: driver that drops them by SQL, which nobody reads here, would come to any number.
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
#: What says nothing of its own, and may lie about where a copy failed.
_BARE: Final = frozenset({Kind.SYNC, Kind.COPY_END})


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
    """One message of the client that will be answered; ``at`` is when it was seen, in seconds.

    ``perhaps``: a Sync (or what stands where one was) that a copy may have swallowed. ``ends``: how many ends
    of copies a COPY_END stands for. ``early``: copy data sent along with a query, before the target's answer.
    """

    kind: Kind
    at: float = 0.0
    query: int | None = None
    sensitive: bool = False
    statement: Statement | None = None
    portal: Portal | None = None
    name: str = ""
    perhaps: bool = False
    ends: int = 1
    early: Bulk | None = None

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
        self._copy_both = False  # replication: what the client sends are its own messages
        self._doubtful = False  # a copy failed, and the server skips or does not: it may have taken a Sync
        self.lost = False  # from here on answers may be matched with the wrong steps
        self.encoding = "utf-8"
        self.backslashes = False  # standard_conforming_strings is off
        self.names_uncertain = False  # SQL changed names behind the protocol, or some are forgotten
        self.forgot_sensitive = False  # among those was a statement whose values are hidden

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
                step.perhaps = self._copy_open
                self._skipping = self._doubtful = False
            elif self._skipping:
                self._undo(step)
                return False
            elif step.kind is Kind.COPY_END:
                if not self._end_of_copy():
                    return False
            elif self._doubtful:
                self.lost = True
            self._steps.append(step)
        return True

    def _end_of_copy(self) -> bool:
        """The client ends a copy; whether that needs a step of its own."""
        self._copy_open = False
        self.copy_in = None
        try:
            last = self._steps[-1]
        except IndexError:  # even when it was there a moment ago
            return False
        if last.kind is Kind.COPY_END:
            last.ends += 1
            return False
        return True

    def copy_data(self, asked: Step, make: Callable[[], Bulk]) -> Bulk | None:
        """Where copy data belongs that comes while no copy is known to be open: to the query ``asked`` last,
        if it is not answered yet. None: the server ignores it."""
        with self.lock:
            if self.copy_in is not None:
                return self.copy_in  # the target has asked for it, this moment
            if self._copy_both or not self._steps:
                return None
            if asked.early is None:
                if not self._waits(asked):
                    return None
                asked.early = make()
            return asked.early

    def _waits(self, asked: Step) -> bool:
        """Whether the query sent last is unanswered. By index: the other thread may take steps off the front.
        The walk is over what was sent since, and once for each query."""
        try:
            for back in range(1, len(self._steps) + 1):
                if self._steps[-back] is asked:
                    return True
        except IndexError:
            pass
        return False

    def keep(self, statement: Statement) -> None:
        """Remember a statement under its name, and beyond NAMES_LIMIT forget the oldest."""
        with self.lock:
            if statement.name not in self.statements and len(self.statements) >= NAMES_LIMIT:
                self._drop_oldest(self.statements)
            self.statements[statement.name] = statement

    def _drop_oldest(self, names: dict[str, Statement]) -> None:
        """An execution of it is recorded without a text, as one of a name that only SQL knows. The unnamed
        one is about to be used, however long ago it was first there."""
        oldest = next(name for name in names if name)
        self.forgot_sensitive |= names.pop(oldest).sensitive
        self.names_uncertain = True

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

    def failing(self) -> Step | None:
        """The step that an ErrorResponse is about: not one that is left over from a copy."""
        steps = self._steps
        if not steps:
            return None
        if steps[0].perhaps or steps[0].kind is Kind.COPY_END:
            with self.lock:
                self._drop_left_over()
        return steps[0] if steps else None

    def _drop_left_over(self) -> None:
        """Where the server perhaps took an earlier Sync, the ReadyForQuery of a later one was counted for it;
        and all of them have come, for the server answers in order."""
        steps = self._steps
        perhaps = False
        while steps and steps[0].kind in _BARE:
            perhaps |= steps[0].perhaps
            if not perhaps and steps[0].kind is Kind.SYNC:
                break
            steps.popleft()

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
                if len(self._confirmed) >= NAMES_LIMIT and step.name not in self._confirmed:
                    self._drop_oldest(self._confirmed)
                self._confirmed[step.name] = step.statement

    def confirmed(self, name: str) -> Statement | None:
        return self._confirmed.get(name)

    def confirm_closed(self, step: Step) -> None:
        """A CloseComplete of a statement."""
        if step.portal is None:
            with self.lock:
                self._confirmed.pop(step.name, None)

    def forget_all(self) -> None:
        """DEALLOCATE ALL or DISCARD ALL was answered: what was there before it is gone. What the client has
        parsed since, perhaps under the same name, is not confirmed yet and stays."""
        with self.lock:
            for name, statement in self._confirmed.items():
                if self.statements.get(name) is statement:
                    del self.statements[name]
            self._confirmed.clear()

    def ready(self, idle: bool) -> None:
        """A ReadyForQuery: everything up to its cause is answered. ``idle``: outside a transaction."""
        with self.lock:
            steps = self._steps
            perhaps = False
            while steps:
                step = steps.popleft()
                perhaps |= step.perhaps
                if step.kind in READY:
                    break
            if steps:
                self._after_ready(perhaps)
            if idle and not steps:
                self.portals.clear()  # portals end with their transaction
            self.copy_in = None
            self._copy_open = self._copy_both = self._skipping = self._doubtful = False
            if self._wanted:
                self._room.notify_all()

    def _after_ready(self, perhaps: bool) -> None:
        """``perhaps``: the step that was taken for the cause may be one that a copy swallowed. Then the cause
        was a Sync behind it, for which no answer is to come."""
        steps = self._steps
        while steps and steps[0].kind is Kind.COPY_END:
            steps.popleft()  # of a copy that failed, or never was
        if perhaps and steps and steps[0].kind is Kind.SYNC:
            steps[0].perhaps = True

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
            self._doubt()
            self._room.notify_all()
        return skipped

    def _doubt(self) -> None:
        """After an error in a copy, with no Sync behind it but those that it may have swallowed, the server
        either skips what comes next or does not."""
        if not (self._steps and self._steps[0].perhaps):
            return
        for step in self._steps:
            if step.kind not in _BARE:
                self.lost = True
                return
            if step.kind is Kind.SYNC and not step.perhaps:
                return
        self._doubtful = True

    def _undo(self, step: Step) -> None:
        """What a skipped message said about names did not happen."""
        if step.portal is not None:
            return
        before = self._confirmed.get(step.name)
        if step.kind is Kind.PARSE and self.statements.get(step.name) is step.statement:
            del self.statements[step.name]
        if before is not None and step.kind in (Kind.PARSE, Kind.CLOSE):
            self.statements.setdefault(step.name, before)

    def begin_copy_in(self, bulk: Bulk) -> Bulk:
        """A CopyInResponse; returns what the data belongs to: ``bulk``, or what came before the answer.

        The Syncs sent along with the Execute are read, and ignored, as copy data, unless it fails at once.
        """
        with self.lock:
            steps = self._steps
            if steps and (early := steps[0].early) is not None:
                steps[0].early = None
                early.early = False
                bulk = early
            # Marked already, they belong to a copy that has not ended well: not to be walked through for each
            # time that a target says it begins.
            again = len(steps) > 1 and steps[1].perhaps
            self._copy_open = again or not self._ended_already()
            self.copy_in = bulk if self._copy_open else None
            return bulk

    def _ended_already(self) -> bool:
        """Whether the client has sent all of the copy that begins; marks the Syncs among its data."""
        for step in islice(self._steps, 1, None):
            if step.kind is not Kind.SYNC:
                return step.kind is Kind.COPY_END
            step.perhaps = True
        return False

    def begin_copy_both(self) -> None:
        with self.lock:
            self._copy_both = True

    def end_copy_in(self) -> None:
        """A copy ended well: the server has read up to its end, and ignored the Syncs before that."""
        with self.lock:
            self.copy_in = None
            self._copy_open = False
            steps = self._steps
            while len(steps) > 1 and steps[1].perhaps:
                del steps[1]
            if len(steps) > 1 and steps[1].kind is Kind.COPY_END:
                steps[1].ends -= 1
                if not steps[1].ends:
                    del steps[1]
