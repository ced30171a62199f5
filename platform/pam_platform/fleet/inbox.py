"""What agents must be told, and the long polls by which they hear it within a second.

Messages are numbered per agent under that agent's row lock, so a number is visible only after all lower
ones: a poll that has seen number 7 never misses 6. In each worker one thread looks at the database for
everybody who waits, since a kill may be made in another worker.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from django.db import close_old_connections, connection, transaction
from django.db.models import Exists, OuterRef
from django.utils import timezone

from pam_common.logging import get_logger, kv
from pam_platform import config
from pam_platform.access.models import Session
from pam_platform.fleet.models import Agent, InboxMessage

log = get_logger("platform.inbox")

#: How often the database is looked at while agents wait: one indexed query for all of them.
POLL_INTERVAL = 0.2
MAX_WAIT = 25
#: What an agent that may not wait is told to do: still within the second in which a kill arrives.
RETRY_MS = 500
#: Messages per answer; the rest comes with the next poll.
MAX_MESSAGES = 200
#: Longer than any session may last, so that what is forgotten concerns nothing that could still run.
RETENTION = timedelta(days=30)
#: ``last_seen`` is written at most this often: it answers "for longer than a minute?".
SEEN_INTERVAL = timedelta(seconds=10)


def post(
    agent: Agent, kind: str, *sessions: str, reason: str = "", details: dict[str, Any] | None = None
) -> None:
    """Queue a message, one for each of ``sessions`` if it is about such; they are seen once the surrounding
    transaction has committed."""
    with transaction.atomic():
        locked = Agent.objects.select_for_update().get(pk=agent.pk)
        for session in sessions or ("",):
            locked.inbox_number += 1
            InboxMessage.objects.create(
                agent=locked,
                number=locked.inbox_number,
                kind=kind,
                session=session,
                reason=reason[:200],
                details=details or {},
            )
        locked.save(update_fields=["inbox_number"])
        InboxMessage.objects.filter(agent=locked, created__lt=timezone.now() - RETENTION).delete()


def post_reload() -> None:
    """Tell every agent to renew what it shows and believes: relays or keys have changed."""
    for agent in Agent.objects.filter(state=Agent.State.ACTIVE).order_by("pk"):
        post(agent, "reload")


def mark_seen(agent: Agent) -> None:
    """Note that the agent is alive."""
    now = timezone.now()
    if agent.last_seen < now - SEEN_INTERVAL:
        agent.last_seen = now
        Agent.objects.filter(pk=agent.pk).update(last_seen=now)


@dataclass
class _Waiter:
    agent: int
    after: int
    wake: threading.Event = field(default_factory=threading.Event)


class Waiting:
    """The agents that wait in this worker, at most ``limit`` at a time, and the thread that wakes them."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._waiters: list[_Waiter] = []
        self._watching = False
        self._stopped = False

    def wait(self, agent: int, after: int, seconds: float) -> bool:
        """Wait until there may be news for ``agent``; False at once when too many wait already."""
        with self._place(agent, after) as waiter:
            if waiter is None:
                return False
            # A waiting thread needs no database connection, and PostgreSQL has not one for each.
            if not connection.in_atomic_block and connection.vendor != "sqlite":
                connection.close()
            waiter.wake.wait(seconds)
            return True

    def stop(self) -> None:
        """Wake everybody, and let nobody wait any more: the worker ends."""
        self._stopped = True
        # Without the lock, since this runs in a signal handler; a list may be copied while it changes.
        for waiter in list(self._waiters):
            waiter.wake.set()

    @contextmanager
    def _place(self, agent: int, after: int) -> Iterator[_Waiter | None]:
        waiter = _Waiter(agent, after)
        with self._lock:
            full = self._stopped or len(self._waiters) >= self.limit or not self._watched()
            if not full:
                self._waiters.append(waiter)
        try:
            yield None if full else waiter
        finally:
            with self._lock:
                if not full:
                    self._waiters.remove(waiter)

    def _watched(self) -> bool:
        """Have somebody look for news; False when no thread can be started now. The lock is held."""
        if not self._watching:
            try:
                threading.Thread(target=self._watch, name="inbox-watch", daemon=True).start()
            except RuntimeError as error:
                log.warning("inbox not watched", extra=kv(error=str(error)))
                return False
            self._watching = True
        return True

    def _watch(self) -> None:
        """Look for news until nobody waits."""
        try:
            while self._look():
                time.sleep(POLL_INTERVAL)
        finally:
            connection.close()

    def _look(self) -> bool:
        with self._lock:
            waiters = list(self._waiters)
            if not waiters:
                # Under the same lock as the check: whoever comes next starts a new watcher.
                self._watching = False
                return False
        try:
            close_old_connections()
            agents = Agent.objects.filter(pk__in={waiter.agent for waiter in waiters}, state="active")
            numbers = dict(agents.values_list("pk", "inbox_number"))
        except Exception as error:  # noqa: BLE001  # whatever it is, those who wait have nobody else who looks
            log.warning("inbox not readable", extra=kv(error=type(error).__name__))
            return True
        for waiter in waiters:
            # No longer active is news, too.
            if numbers.get(waiter.agent, waiter.after + 1) != waiter.after:
                waiter.wake.set()
        return True


_waiting: Waiting | None = None
_waiting_lock = threading.Lock()
_ending = False


def waiting() -> Waiting:
    """This worker's waiting agents: at most half of its threads, the rest is for everybody else."""
    global _waiting
    with _waiting_lock:
        if _waiting is None:
            _waiting = Waiting(max(1, config.current().threads // 2))
            if _ending:
                _waiting.stop()  # the worker's first one came too late
        return _waiting


def stop_waiting() -> None:
    """Let every waiting agent go, since the worker ends. Takes no lock: a signal handler calls it."""
    global _ending
    _ending = True  # before the look, as `waiting` looks at it after it has made one
    if _waiting is not None:
        _waiting.stop()


def poll(agent: Agent, after: int, wait: float) -> dict[str, Any]:
    """The answer to one poll. ``after`` -1, or a number this inbox has not reached, asks for the start."""
    mark_seen(agent)
    waited = True
    if after == agent.inbox_number and wait > 0:
        waited = waiting().wait(agent.pk, after, min(wait, MAX_WAIT))
        agent.refresh_from_db()
        mark_seen(agent)
    retry = 0 if waited else RETRY_MS
    if not 0 <= after <= agent.inbox_number:
        return {"cursor": agent.inbox_number, "messages": _unfinished(agent), "retry_ms": retry}
    rows = list(agent.messages.filter(number__gt=after)[:MAX_MESSAGES])
    cursor = rows[-1].number if rows else agent.inbox_number
    return {"cursor": cursor, "messages": [_shown(row) for row in rows], "retry_ms": retry}


def _unfinished(agent: Agent) -> list[dict[str, Any]]:
    """What an agent without a cursor must still hear: sessions that were ended and that nobody has closed.

    It was told of those in which it began a part, also when another agent has taken one over since.
    """
    unclosed = Session.objects.filter(pk=OuterRef("session"), closed=None, state="ended")
    rows = agent.messages.filter(Exists(unclosed), kind__in=("kill", "end"))
    return [_shown(row) for row in rows.order_by("-number")[:MAX_MESSAGES]]


def _shown(row: InboxMessage) -> dict[str, Any]:
    message = {"id": row.number, "kind": row.kind, **row.details}
    for name in ("session", "reason"):
        if value := getattr(row, name):
            message[name] = value
    return message
