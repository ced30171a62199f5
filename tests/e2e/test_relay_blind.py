"""The relay is blind: neither in what it carries nor in its memory is a word of a session.

Every text that goes through a session here is a random marker. The same looks find the markers in the
agent, and other things in the relay, so a look that finds nothing means something.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import sys
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hostile_relay import cut
from memory import Watch, contained, forms, in_memory
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


def work(connection: psycopg.Connection[Any], markers: Markers) -> None:
    """Every marker once through the session."""
    connection.execute(f"select 1 as one /* {markers.sql} */")
    connection.execute("select %s::text", (markers.parameter,))
    found = connection.execute("select text from held where kind = 'row'").fetchone()
    assert found == (markers.row,)
    with pytest.raises(psycopg.errors.InvalidTextRepresentation, match=markers.error):
        connection.execute("select concat('" + "','".join(markers.error) + "')::int")
    with connection.cursor() as cursor:
        with cursor.copy("copy sink from stdin") as copy:
            for number in range(ROWS):
                copy.write_row((f"{markers.copied_in}{number}",))
        with cursor.copy("copy (select text from held where kind = 'out') to stdout") as copy:
            assert sum(bytes(piece).count(markers.copied_out.encode()) for piece in copy) == ROWS


@contextlib.contextmanager
def at_work(connected, markers: Markers) -> Iterator[None]:
    """A connection that is busy with the markers all the time, until the block ends."""
    stop = threading.Event()
    errors: list[Exception] = []

    def run() -> None:
        try:
            with connected.open() as connection:
                while not stop.is_set():
                    work(connection, markers)
        except Exception as error:  # noqa: BLE001 - handed to the test's own thread
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(60)
    assert errors == []


def test_no_word_of_a_session_is_in_the_relays_memory(stack, alice, connect, markers) -> None:
    relay, agent = stack.processes["relay"].pid, stack.processes["dc1-a"].pid
    needles = markers.needles
    with connect(alice) as connected:
        session = connected.session()["id"]
        with at_work(connected, markers), Watch({"relay": lambda: in_memory(relay, needles)}) as watch:
            # The same look does find things: all markers where they may be, the session's id at the relay.
            seen: set[str] = set()

            def everything() -> bool:
                seen.update(name.split()[0] for name in in_memory(agent, needles))
                return seen == set(vars(markers))

            wait_for(everything, "all markers in the agent's memory", timeout=180)
            wait_for(lambda: watch.rounds >= 5, "some looks at the relay", timeout=180)
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
    with connect(alice) as connected:
        with connected.open() as connection:
            work(connection, markers)
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
