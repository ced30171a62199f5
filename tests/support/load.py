"""Several connections at work at once, each noting what its party saw."""

from __future__ import annotations

import itertools
import secrets
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import psycopg
from processes import wait_for


@dataclass
class Load:
    """Statements of every kind on connections from ``connect``, until they fail or ``stop``.

    ``seen`` holds a marker per result that reached the client. Markers are unique, so that one is looked
    for by its text alone. What the target executed is in its table ``kill9``.
    """

    connect: Callable[[], psycopg.Connection[Any]]
    seen: list[str] = field(default_factory=list)

    def __enter__(self) -> Load:
        self._run = secrets.token_hex(4)
        self._stopping = threading.Event()
        self._started: set[str] = set()
        self._failed: dict[str, Exception] = {}
        jobs = (self._simple, self._simple, self._pipeline, self._copy_in, self._copy_out, self._insert)
        self._threads = [
            threading.Thread(target=self._work, args=(job, f"{job.__name__[1:]}{place}"), daemon=True)
            for place, job in enumerate(jobs)
        ]
        for thread in self._threads:
            thread.start()
        wait_for(
            lambda: self._failed or len(self._started) == len(jobs),
            "a result on every connection",
            timeout=120,
        )
        assert not self._failed, self._failed
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(120)
        assert not any(thread.is_alive() for thread in self._threads), "a connection hangs"

    def _work(self, job: Callable[[psycopg.Connection[Any], str], list[str]], name: str) -> None:
        try:
            with self.connect() as connection:
                for number in itertools.count():
                    if self._stopping.is_set():
                        return
                    self.seen += job(connection, f"<{self._run}-{name}-{number}>")
                    self._started.add(name)
        except psycopg.Error as error:
            if name not in self._started:
                self._failed[name] = error
            # Else the agent is gone: what was seen is seen.

    @staticmethod
    def _simple(connection: psycopg.Connection[Any], marker: str) -> list[str]:
        assert connection.execute(f"select '{marker}'").fetchone() == (marker,)
        return [marker]

    @staticmethod
    def _insert(connection: psycopg.Connection[Any], marker: str) -> list[str]:
        connection.execute(f"insert into kill9 values ('{marker}')")
        return []  # the target's table says whether it saw it

    @staticmethod
    def _pipeline(connection: psycopg.Connection[Any], marker: str) -> list[str]:
        seen = []
        with connection.pipeline():
            markers = [f"{marker}{place}" for place in range(5)]
            cursors = [connection.execute("select %s::text", (text,)) for text in markers]
            for cursor, text in zip(cursors, markers, strict=True):
                assert cursor.fetchone() == (text,)
                seen.append(text)
        return seen

    @staticmethod
    def _copy_in(connection: psycopg.Connection[Any], marker: str) -> list[str]:
        with connection.cursor().copy("copy kill9 from stdin") as copy:
            copy.write(f"{marker}\n")
        return [marker]

    @staticmethod
    def _copy_out(connection: psycopg.Connection[Any], marker: str) -> list[str]:
        with connection.cursor().copy(f"copy (select '{marker}') to stdout") as copy:
            assert b"".join(bytes(piece) for piece in copy) == f"{marker}\n".encode()
        return [marker]


def missing(markers: Iterable[str], events: list[dict[str, Any]]) -> list[str]:
    """The markers whose statement or whose data is in none of the ``events``."""
    asked = "\n".join(
        f"{event.get('sql', '')} {event.get('params', '')}" for event in events if event["kind"] == "query"
    )
    moved = "\n".join(
        f"{event.get('rows', '')} {event.get('data', '')}" for event in events if event["kind"] == "rows"
    )
    found = {kind: _markers(text) for kind, text in (("asked", asked), ("moved", moved))}
    lost = []
    for marker in markers:
        name = marker.split("-")[1]
        if not name.startswith("copy_in") and marker not in found["asked"]:
            lost.append(f"{marker}: no statement")
        if not name.startswith("insert") and marker not in found["moved"]:
            lost.append(f"{marker}: no data")
    return lost


def _markers(text: str) -> set[str]:
    """``<…>`` with the digit that a pipeline puts behind."""
    found = set()
    for piece in text.split("<")[1:]:
        marker, _, rest = piece.partition(">")
        found.add(f"<{marker}>{rest[:1]}" if "-pipeline" in marker else f"<{marker}>")
    return found
