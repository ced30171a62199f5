"""The relay is blind: neither in what it carries nor in its memory is a word of a session.

Every text that goes through a session here is a random marker. The same looks find the markers in the
agent, and other things in the relay, so a look that finds nothing means something.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hostile_relay import cut
from memory import Needles, Watch, contained, forms, in_memory
from processes import wait_for

RELAY = Path(__file__).parents[1] / "support" / "hostile_relay.py"
#: Rows of each bulk transfer: some megabytes, so that buffers and windows are filled and used again.
ROWS = 20_000


def marker() -> str:
    return secrets.token_hex(16)


@dataclass
class Markers:
    """One random text for each way that text takes through a session."""

    sql: str = field(default_factory=marker)
    parameter: str = field(default_factory=marker)
    row: str = field(default_factory=marker)
    error: str = field(default_factory=marker)
    copied_in: str = field(default_factory=marker)
    copied_out: str = field(default_factory=marker)

    @property
    def needles(self) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        for name, text in vars(self).items():
            found |= forms(name, text)
        return found


@pytest.fixture
def markers(postgres) -> Markers:
    """Rows and copied texts are put into the database beside the session: no statement names them."""
    made = Markers()
    postgres.sql(
        "drop table if exists held, sink",
        f"create table held as select 'row' as kind, '{made.row}' as text",
        f"insert into held select 'out', '{made.copied_out}' || i from generate_series(1, {ROWS}) i",
        "create table sink (text text)",
        "grant all on held, sink to demo_db_rw",
        database="app",
    )
    return made


Step = Callable[[psycopg.Connection[Any], Markers], None]


def sql(connection: psycopg.Connection[Any], markers: Markers) -> None:
    connection.execute(f"select 1 as one /* {markers.sql} */")


def parameter(connection: psycopg.Connection[Any], markers: Markers) -> None:
    connection.execute("select %s::text", (markers.parameter,))


def row(connection: psycopg.Connection[Any], markers: Markers) -> None:
    found = connection.execute("select text from held where kind = 'row'").fetchone()
    assert found == (markers.row,)


def error(connection: psycopg.Connection[Any], markers: Markers) -> None:
    with pytest.raises(psycopg.errors.InvalidTextRepresentation, match=markers.error):
        connection.execute("select concat('" + "','".join(markers.error) + "')::int")


def copied_in(connection: psycopg.Connection[Any], markers: Markers) -> None:
    with connection.cursor() as cursor, cursor.copy("copy sink from stdin") as copy:
        for number in range(ROWS):
            copy.write_row((f"{markers.copied_in}{number}",))


def copied_out(connection: psycopg.Connection[Any], markers: Markers) -> None:
    statement = "copy (select text from held where kind = 'out') to stdout"
    with connection.cursor() as cursor, cursor.copy(statement) as copy:
        assert sum(bytes(piece).count(markers.copied_out.encode()) for piece in copy) == ROWS


#: By the name of its marker.
STEPS: dict[str, Step] = {step.__name__: step for step in (sql, parameter, row, error, copied_in, copied_out)}


def work(connection: psycopg.Connection[Any], markers: Markers) -> None:
    """Every marker once through the session."""
    for step in STEPS.values():
        step(connection, markers)


class AtWork:
    """A connection that does ``step`` again and again until the block ends."""

    def __init__(self, connected: Any, step: Step, markers: Markers) -> None:
        self.rounds = 0
        self._connected = connected
        self._step = step
        self._markers = markers
        self._stop = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> AtWork:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(60)
        self._check()

    def shows(self, pid: int, needles: Needles) -> bool:
        """Whether the memory of ``pid`` does, after the step was done once more."""
        # A look stops the process: without time for its work, nothing new could be found.
        before = self.rounds
        wait_for(lambda: self.rounds > before or self._error, "another round of the work", timeout=180)
        self._check()
        return bool(in_memory(pid, needles))

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            with self._connected.open() as connection:
                while not self._stop.is_set():
                    self._step(connection, self._markers)
                    self.rounds += 1
        except Exception as error:  # noqa: BLE001 - handed to the test's own thread
            self._error = error


def test_no_word_of_a_session_is_in_the_relays_memory(stack, alice, connect, markers) -> None:
    relay, agent = stack.processes["relay"].pid, stack.processes["dc1-a"].pid
    needles = markers.needles
    assert set(STEPS) == set(vars(markers))
    with connect(alice) as connected, Watch({"relay": lambda: in_memory(relay, needles)}) as watch:
        session = connected.session()["id"]
        # The same look does find things: each marker where it may be, the session's id at the relay.
        for name, step in STEPS.items():
            with AtWork(connected, step, markers) as busy:
                assert any(busy.shows(agent, forms(name, getattr(markers, name))) for _ in range(50)), name
        with AtWork(connected, work, markers):
            wanted = watch.rounds + 5
            wait_for(lambda: watch.rounds >= wanted, "some looks at the relay", timeout=180)
            assert "session raw" in in_memory(relay, forms("session", session))
    assert watch.found == {}
    assert in_memory(relay, needles) == set()


@pytest.fixture
def capture(stack, tmp_path) -> Iterator[Path]:
    """Where the relay, run by its operator's own program, keeps a copy of all that it carries."""
    folder = tmp_path / "capture"
    program = stack.relay_program
    stack.relay_program = (sys.executable, RELAY, folder)
    _restart_relay(stack)
    yield folder
    stack.relay_program = program
    _restart_relay(stack)


def _restart_relay(stack) -> None:
    stack.processes["relay"].stop()
    stack.start_relay()
    wait_for(lambda: bool(stack.status("pam-relay", "relay")["routes"]), "the agent's route", timeout=60)


def test_no_word_of_a_session_is_in_what_the_relay_carries(stack, capture, alice, connect, markers) -> None:
    log = stack.processes["relay"].log
    closed = re.compile(r'event="channel closed".* up=(\d+) down=(\d+) .*cut=False')
    # An earlier relay may have written to the same file.
    before = len(closed.findall(log.read_text()))
    with connect(alice) as connected, connected.open() as connection:
        work(connection, markers)
        # A half-close, not a Terminate: upon that the agent may end before the client's last frame is there.
        with socket.socket(fileno=os.dup(connection.fileno())) as ours:
            ours.shutdown(socket.SHUT_WR)
        wait_for(lambda: len(closed.findall(log.read_text())) > before, "the relay's end of the channel")
    up, down = ((capture / f"1.{way}").read_bytes() for way in ("up", "down"))
    # It is all there: as much as the relay counted, more than was copied, whole Noise messages.
    assert [str(len(up)), str(len(down))] == list(closed.findall(log.read_text())[-1])
    assert min(len(up), len(down)) > ROWS * len(markers.copied_in)
    for data in (up, down):
        messages, rest = cut(data)
        assert (len(messages) > 20, rest) == (True, b"")
        assert contained(data, markers.needles) == set()
        # No other way of writing it either: texts that repeat so much would show in any compression.
        assert len(zlib.compress(data)) > 0.99 * len(data)
