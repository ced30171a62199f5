"""A relay that alters, drops, repeats, reorders, cuts, delays, replays and impersonates, between the real
client and the real agent. After every attack an honest connection works, through the same processes.

What counts is read off the wires: a tap before pam-client's port and one before PostgreSQL.
"""

from __future__ import annotations

import json
import struct
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
import requests
from hostile_relay import Plan
from patience import Metronome
from processes import Process, free_port, listens, wait_for
from stack import Person, Stack
from tap import Tap, Tapped

from pam_common.keys import SigningKey, b64encode
from pam_common.secure_channel import generate_x25519, x25519_public

RELAY = Path(__file__).parents[1] / "support" / "hostile_relay.py"
#: Statements of the talk that is attacked; the attack comes in their middle.
STATEMENTS = 30
#: Some bytes to copy: dozens of Noise messages, so that there is something left to reorder with.
BULK = "x" * 99 + "\n"
BULK_ROWS = 40_000

#: What a client says of an agent whose statement is another agent's, is signed by a stranger, is none.
WORDS = {
    "stolen": "holds another key",
    "forged": "statement",
    "none": "statement",
}

Work = Callable[[psycopg.Connection[Any]], None]


def talk(connection: psycopg.Connection[Any]) -> None:
    for number in range(STATEMENTS):
        connection.execute(f"insert into seen values ({number}) returning number")


def copy_out(connection: psycopg.Connection[Any]) -> None:
    query = f"copy (select repeat('x', 99) from generate_series(1, {BULK_ROWS})) to stdout"
    with connection.cursor() as cursor, cursor.copy(query) as copy:
        assert sum(len(piece) for piece in copy) == len(BULK) * BULK_ROWS


def copy_in(connection: psycopg.Connection[Any]) -> None:
    with connection.cursor() as cursor, cursor.copy("copy bulk from stdin") as copy:
        for _ in range(BULK_ROWS // 100):
            copy.write(BULK * 100)


#: (action, which byte of the message); seen by the receiver at once, or only when something follows.
AT_ONCE = [
    ("flip", 2),
    ("flip", -1),
    ("flip", -17),
    ("duplicate", 0),
    ("replay", 0),
    ("insert", 0),
    ("truncate", 0),
    ("end", 0),
    ("break", 0),
    ("reflect", 0),
    ("swap", 0),
]
IN_BULK = [("flip", 0), ("flip", 1), ("flip", 900), ("drop", 0), ("reorder", 0), ("truncate", 0), ("end", 0)]

DATA_ATTACKS = [
    *[(talk, Plan(action, way, 14, at)) for way in ("up", "down") for action, at in AT_ONCE],
    *[(copy_in, Plan(action, "up", 12, at)) for action, at in IN_BULK],
    *[(copy_out, Plan(action, "down", 12, at)) for action, at in IN_BULK],
]
HANDSHAKE_ATTACKS = [
    Plan("flip", "up", 0, 0),
    *[
        Plan(action, way, message, at)
        for way, message in (("up", 0), ("down", 0), ("up", 1))
        for action, at in AT_ONCE
        if (action, message) != ("replay", 0) and (action, way, message) != ("reflect", "up", 0)
    ],
]


def _name(value: object) -> str | None:
    if isinstance(value, Plan):
        return f"{value.action}-{value.direction}-{value.message}-at-{value.at}"
    return getattr(value, "__name__", None)


class Scene:
    """Everything between a program and PostgreSQL, with the relay in hostile hands."""

    def __init__(self, stack: Stack, folder: Path, target: Tap) -> None:
        self.stack = stack
        self.folder = folder
        self.target = target
        self.honest = 0  #: an earlier channel that was carried honestly

    def channels(self) -> int:
        return len(list(self.folder.glob("*.up")))

    def give(self, plan: Plan) -> None:
        """Have the next channel carry it out, with bytes of an honest one where it wants earlier ones."""
        replace(plan, earlier=self.honest).give(self.folder)

    def report(self) -> dict[str, Any]:
        """What the newest channel's attack came to."""
        file = self.folder / f"{self.channels()}.json"
        wait_for(lambda: file.exists() and "done" in json.loads(file.read_text()), "the attack")
        report: dict[str, Any] = json.loads(file.read_text())
        return report


@pytest.fixture(scope="module")
def scene(tmp_path_factory, postgres) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("hostile")
    target = Tap(postgres.port)
    program = (sys.executable, RELAY, folder)
    with Stack(tmp_path_factory.mktemp("stack"), relay_program=program) as stack:
        stack.add_database(postgres, port=target.port)
        postgres.sql(
            "create table seen (number int)",
            "create table bulk (line text)",
            "grant all on seen, bulk to demo_db_rw",
            database="app",
        )
        stack.start()
        stack.person("alice").login()
        yield Scene(stack, folder, target)
    target.close()


@pytest.fixture(scope="module")
def stack(scene: Scene) -> Stack:
    return scene.stack


@pytest.fixture(scope="module")
def alice(stack: Stack):
    return stack.person("alice")


@pytest.fixture(scope="module")
def client(scene: Scene, alice, tmp_path_factory) -> Iterator[Tap]:
    """One pam-client for all attacks, with a tap before its port."""
    port = free_port()
    command = alice.command("-v", "connect", "demo-db/owner", "--port", str(port))
    log = tmp_path_factory.mktemp("client") / "client.log"
    process = Process("client", command, log, env=alice.environment())
    process.ready_when(lambda: listens(port))
    tap = Tap(port)
    yield tap
    tap.close()
    assert process.running()
    process.stop(number=2)
    assert "Traceback" not in log.read_text()


@pytest.fixture(autouse=True)
def survivors(scene: Scene) -> Iterator[None]:
    """The same agent and relay are there afterwards, and met nothing they had not thought of."""
    before = {name: scene.stack.processes[name].pid for name in ("dc1-a", "relay")}
    yield
    for name, pid in before.items():
        process = scene.stack.processes[name]
        assert (process.running(), process.pid) == (True, pid)
        log = process.log.read_text()
        assert "Traceback" not in log


def open_through(tap: Tap) -> psycopg.Connection[Any]:
    conninfo = f"host=127.0.0.1 port={tap.port} dbname=app user=me sslmode=disable gssencmode=disable"
    return psycopg.connect(conninfo, autocommit=True)


@pytest.fixture
def honest(scene: Scene, client: Tap) -> Iterator[None]:
    """An honest connection before the first attack, to take bytes from, and one after each."""
    if not scene.honest:
        with open_through(client) as connection:
            scene.honest = scene.channels()
            talk(connection)
    yield
    with open_through(client) as connection:
        assert connection.execute("select 'honest'").fetchone() == ("honest",)


@pytest.mark.parametrize(("work", "plan"), DATA_ATTACKS, ids=_name)
def test_an_attack_on_the_data_ends_the_connection_and_delivers_nothing_altered(
    scene, client, honest, postgres, work: Work, plan: Plan
) -> None:
    postgres.sql("truncate seen, bulk", database="app")
    scene.give(plan)
    connection = open_through(client)
    with pytest.raises(psycopg.OperationalError):
        work(connection)
    connection.close()
    assert scene.report() == {"done": True}
    program, target = client.connections[-1], scene.target.connections[-1]
    assert program.ended.wait(60)
    assert target.ended.wait(60)
    # What was still executed when it was cut would be found by the next test.
    busy = "select count(*) from pg_stat_activity where state = 'active' and query like 'insert into %'"
    wait_for(lambda: postgres.sql(busy) == "0", "the end of what was executed")
    delivered_up, delivered_down = check_delivered(program, target)
    assert (delivered_up if plan.direction == "up" else delivered_down) > 100
    numbers = postgres.sql("select number from seen order by number", database="app").split()
    assert numbers == [str(number) for number in range(len(numbers))]
    assert postgres.sql("select count(*) from bulk", database="app") == "0"


@pytest.mark.parametrize("plan", HANDSHAKE_ATTACKS, ids=_name)
def test_an_attack_on_the_handshake_leads_nowhere(scene, client, honest, postgres, plan: Plan) -> None:
    postgres.sql("truncate seen", database="app")
    before = len(scene.target.connections)
    scene.give(plan)
    with pytest.raises(psycopg.OperationalError), open_through(client) as connection:
        talk(connection)
    assert scene.report() == {"done": True}
    if plan.action == "duplicate" and plan.message + (plan.direction == "down") == 1:
        # The first copy is the message itself: only what came second is refused.
        wait_for(lambda: client.connections[-1].ended.is_set(), "the end of the connection")
    else:
        assert len(scene.target.connections) == before
    assert postgres.sql("select count(*) from seen", database="app") == "0"


def test_a_stalled_handshake_ends_in_time(scene, client, honest) -> None:
    before = len(scene.target.connections)
    scene.give(Plan("stall", "up", 1))
    log, words = scene.stack.processes["dc1-a"].log, "the handshake took longer than 10 s"
    ended = log.read_text().count(words)
    with Metronome() as beat:
        began = time.monotonic()
        with pytest.raises(psycopg.OperationalError):
            open_through(client)
        assert time.monotonic() - began - beat.lost() < 15
    wait_for(lambda: log.read_text().count(words) > ended, "the agent's limit")
    assert len(scene.target.connections) == before


@pytest.mark.parametrize("plan", [Plan("delay", way, number) for way in ("up", "down") for number in (0, 14)])
def test_a_delay_changes_nothing(scene, client, honest, postgres, plan: Plan) -> None:
    postgres.sql("truncate seen", database="app")
    scene.give(plan)
    with open_through(client) as connection:
        talk(connection)
    assert scene.report() == {"done": True}
    assert postgres.sql("select count(*) from seen", database="app") == str(STATEMENTS)


def test_a_whole_connection_sent_again_is_not_understood(scene, client, honest, postgres) -> None:
    postgres.sql("truncate seen", database="app")
    before = len(scene.target.connections)
    scene.give(Plan("again"))
    with pytest.raises(psycopg.OperationalError):
        open_through(client)
    report = scene.report()
    assert report["answered"] == 1  # anyone may begin a handshake …
    assert "more" not in report or report["more"] == 0  # … and only who holds the keys ends it
    assert len(scene.target.connections) == before
    assert postgres.sql("select count(*) from seen", database="app") == "0"


@pytest.mark.parametrize("token", ["stolen", "forged", "none"])
def test_a_relay_that_answers_as_the_agent_learns_nothing(scene, client, honest, token: str) -> None:
    scene.give(Plan("as-agent", how=token))
    with pytest.raises(psycopg.OperationalError) as told:
        open_through(client)
    assert WORDS[token] in str(told.value)
    report = scene.report()
    assert "grant" not in report
    assert "data" not in report
    assert "closed the stream during the handshake" in report["failed"]
    assert ("statement" in report) is (token != "none")


@pytest.mark.parametrize("token", ["stolen", "forged", "none"])
def test_a_relay_that_asks_as_a_client_reaches_nothing(scene, client, honest, alice, token: str) -> None:
    before = len(scene.target.connections)
    scene.give(Plan("as-client", how=token, token="" if token == "none" else real_grant(alice)))
    with pytest.raises(psycopg.OperationalError):
        open_through(client)
    report = scene.report()
    assert "answer" not in report
    assert report["failed"].startswith("RefusedError: the grant")
    assert len(scene.target.connections) == before


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (Plan("flip", "down", 6, -1), "the stream was altered, or bytes of it were lost or repeated"),
        (Plan("flip", "up", 6, -1), "the connection through the relay was lost"),
        (Plan("end", "down", 6), "the connection through the relay was lost"),
        (Plan("flip", "down", 0), "the handshake with the agent of gateway dc1 failed"),
        (Plan("as-agent", how="stolen"), WORDS["stolen"]),
        (Plan("break", "down", 0), "the stream to the agent of gateway dc1 broke during the handshake: the"),
    ],
    ids=_name,
)
def test_the_user_of_psql_is_told(scene, alice, tmp_path, plan: Plan, words: str) -> None:
    script = tmp_path / "script.sql"
    script.write_text("select 1;\n" * 20)
    scene.give(plan)
    psql = ["psql", "-X", "-o", "/dev/null", "-v", "ON_ERROR_STOP=1", "-f", str(script)]
    done = alice.run("connect", "demo-db/owner", "--", *psql, check=False)
    assert done.returncode == 2
    assert "psql:" in done.stderr
    assert words in done.stderr, done.stderr
    if (plan.action, plan.direction) == ("flip", "up"):  # for the operator: the agent found it
        log = scene.stack.processes["dc1-a"].log
        # Written when all of the connection is over, somewhat after the client was cut.
        wait_for(lambda: "the stream was altered" in log.read_text(), "the agent's word of it")


# --- what arrived --------------------------------------------------------------------------------------


def check_delivered(program: Tapped, target: Tapped) -> tuple[int, int]:
    """Assert that each end got a prefix of what the other end sent; how many bytes up and down.

    The logins differ, of course, so what is compared begins behind them: up behind the start-up packet
    and the agent's answers to the target's challenge, down behind the first ReadyForQuery.
    """
    sent_up = bytes(program.up)[_uint32(program.up, 0) :]
    got_up = bytes(target.up)[_uint32(target.up, 0) :]
    while got_up[:1] == b"p":
        got_up = got_up[1 + _uint32(got_up, 1) :]
    assert sent_up.startswith(got_up)
    sent_down, got_down = _behind_login(bytes(target.down)), _behind_login(bytes(program.down))
    # The agent's last words, between two messages: why this is the end.
    whole, _ = _messages(got_down)
    if whole and whole[-1][:1] == b"E" and b"SFATAL\0" in whole[-1]:
        got_down = got_down[: len(got_down) - len(whole[-1])]
    assert sent_down.startswith(got_down)
    return len(got_up), len(got_down)


def _behind_login(data: bytes) -> bytes:
    messages, _ = _messages(data)
    login = [*(message[:1] for message in messages)].index(b"Z")
    return data[sum(map(len, messages[: login + 1])) :]


def _messages(data: bytes) -> tuple[list[bytes], bytes]:
    """PostgreSQL's messages (type, length, body) and the incomplete rest."""
    found = []
    at = 0
    while at + 5 <= len(data) and at + 1 + (length := _uint32(data, at + 1)) <= len(data):
        found.append(data[at : at + 1 + length])
        at += 1 + length
    return found, data[at:]


def _uint32(data: bytes | bytearray, at: int) -> int:
    number: int = struct.unpack_from("!I", data, at)[0]
    return number


def real_grant(alice: Person) -> str:
    """A grant of alice's own, stolen from her machine without the key it is for."""
    alice.run("ls")  # gets another access token if that of her login is too old by now
    tokens = json.loads((alice.home / "tokens.json").read_text())
    wish = {
        "resource": "demo-db",
        "account": "owner",
        "ssh_key": b64encode(SigningKey.generate().public),
        "noise_key": b64encode(x25519_public(generate_x25519())),
    }
    answer = requests.post(
        f"{alice.stack.url}/api/v1/connect",
        json=wish,
        headers={"Authorization": f"Bearer {tokens[alice.stack.url]['access']}"},
        timeout=90,
    )
    assert answer.status_code == 200, answer.text
    return str(answer.json()["grant"])
