"""The write of a chunk to the spool returns before the bytes of its events go on, seen by strace.

And what is true when the agent dies exactly between the two.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator

import psycopg
import pytest
from load import missing
from processes import wait_for
from stored import StoredRecordings, spooled
from syscalls import SENDING, Call, Places, Strace, may_attach, parse, sends, unrecorded

STATEMENTS = 30
#: Random hex digits of a statement and of a result, and what they cannot be compressed below.
UP_DIGITS, UP = 600, 290
DOWN_DIGITS, DOWN = 60 * 32, 900

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="strace attaches to running processes as root only"),
]


@pytest.fixture(scope="module", autouse=True)
def table(stack, postgres) -> None:
    assert may_attach(), "strace cannot attach"
    postgres.sql("create table kill9 (marker text)", "grant all on kill9 to demo_db_rw", database="app")


def ask(connection: psycopg.Connection, number: int = 0) -> None:
    """One statement with a result, both incompressible; by the simple and the extended protocol in turn."""
    digits = "select string_agg(md5(random()::text), '') from generate_series(1, 60) where "
    noise = secrets.token_hex(UP_DIGITS // 2)
    if number % 2:
        cursor = connection.execute(digits + "%s <> ''", (noise,))
    else:
        cursor = connection.execute(digits + f"'{noise}' <> ''")
    assert len(cursor.fetchone()[0]) == DOWN_DIGITS


def places(stack, postgres) -> Places:
    # ``active`` only: the status of the agent is written elsewhere.
    target, relay = f"->127.0.0.1:{postgres.port}]", f"->127.0.0.1:{stack.relay_port}]"
    return Places(str(stack.folder / "dc1-a" / "spool" / "active"), target, relay)


def test_the_spool_has_each_chunk_before_anybody_has_its_bytes(
    stack, alice, connect, postgres, tmp_path
) -> None:
    where = places(stack, postgres)
    with connect(alice) as connected, connected.open(prepare_threshold=None) as connection:
        with Strace(stack.processes["dc1-a"].pid, tmp_path / "trace") as strace:
            for number in range(STATEMENTS):
                ask(connection, number)
            calls = stopped(strace, where.relay, DOWN, STATEMENTS)
        lines = strace.lines()
    assert len(list(sends(calls, where.target, UP))) == STATEMENTS
    assert len(list(sends(calls, where.relay, DOWN))) == STATEMENTS
    assert unrecorded(calls, where, up=UP, down=DOWN) == []
    # The same trace, doctored: each send in turn before the write that it waited for.
    for place, least in ((where.target, UP), (where.relay, DOWN)):
        for send in sends(calls, place, least):
            doctored = parse(moved_before(lines, send, writes_before(calls, send, where.spool)))
            assert unrecorded(doctored, where, up=UP, down=DOWN) != []


def stopped(strace: Strace, where: str, least: int, count: int) -> list[Call]:
    """All calls, with so many sends to ``where``. The client may have the last answer before strace has seen
    its send return, and of a call that has not returned it says nothing more when it is told to end."""
    wait_for(lambda: len(list(sends(strace.calls(), where, least))) >= count, "the last send's return")
    return strace.stop()


def writes_before(calls: list[Call], send: Call, spool: str) -> Call:
    """The last write to the spool before ``send``."""
    return [
        call for call in calls if spool in call.where and call.name in SENDING and call.begin < send.begin
    ][-1]


def moved_before(lines: list[str], send: Call, write: Call) -> list[str]:
    """The trace as if ``send`` had begun and returned before ``write``."""
    own = {send.begin, send.end}
    sent = [lines[number] for number in sorted(own)]
    rest = [line for number, line in enumerate(lines) if number not in own]
    return [*rest[: write.begin], *sent, *rest[write.begin :]]


SPOOL, TARGET, RELAY = (
    "write(9</spool/active/s.1.pamrec>",
    "sendto(15<TCP:[127.0.0.1:9->127.0.0.1:5432]>",
    "sendto(7<TCP:[127.0.0.1:8->127.0.0.1:2222]>",
)
STATED = Places("/spool/active", "->127.0.0.1:5432]", "->127.0.0.1:2222]")
GOOD = f"""\
11 1700000000.000001 {SPOOL}, "x"..., 400) = 400
11 1700000000.000002 {TARGET}, "Q"..., 700, 0, NULL, 0) = 700
12 1700000000.000003 recvfrom(15<TCP:[127.0.0.1:9->127.0.0.1:5432]>, "D"..., 262144, 0, NULL, NULL) = 2000
13 1700000000.000003 {RELAY}, "a"..., 52, 0, NULL, 0) = 52
12 1700000000.000004 {SPOOL}, "x"..., 1000 <unfinished ...>
13 1700000000.000005 recvfrom(7<TCP:[127.0.0.1:8->127.0.0.1:2222]>,  <unfinished ...>
12 1700000000.000006 <... write resumed>) = 1000
12 1700000000.000007 {RELAY}, "x"..., 2100, 0, NULL, 0) = 2100
"""


def problems(trace: str) -> list[str]:
    return unrecorded(parse(trace.splitlines()), STATED, up=300, down=900)


def swapped(first: int, second: int) -> str:
    lines = GOOD.splitlines()
    lines[first], lines[second] = lines[second], lines[first]
    return "\n".join(lines)


def test_the_checker_accepts_the_right_order() -> None:
    assert problems(GOOD) == []
    assert [(call.name, call.size) for call in parse(GOOD.splitlines())][-1] == ("sendto", 2100)


@pytest.mark.parametrize(
    ("trace", "what"),
    [
        (swapped(0, 1), "target"),
        (swapped(6, 7), "relay"),  # the write had begun, but not returned
        (
            GOOD.replace(f'{SPOOL}, "x"..., 400) = 400', f'{SPOOL}, "x"..., 400) = -1 ENOSPC (No space)'),
            "target",
        ),
        (GOOD.replace("= 1000", "= 100"), "relay"),  # too small to hold the result
        (GOOD.replace("/spool/active/s.1.pamrec", "/tmp/log"), "target"),
        ("\n".join(GOOD.splitlines()[1:]), "target"),
    ],
)
def test_the_checker_finds_a_wrong_order(trace: str, what: str) -> None:
    found = problems(trace)
    assert found
    assert f"sent to the {what} before" in found[0]


@contextlib.contextmanager
def killed_at(stack, postgres, connected, tmp_path, which: str, call: str) -> Iterator[Callable[[str], None]]:
    """A connection whose thread dies when it enters ``call`` for what goes to ``which`` next (target, relay).
    The block gets a function that executes a statement and expects it to fail."""
    where = places(stack, postgres)
    agent = stack.processes["dc1-a"]
    with connected.open() as connection:
        with Strace(agent.pid, tmp_path / "look") as strace:
            ask(connection)
            calls = stopped(strace, where.relay, DOWN, 1)
        (up,), (down,) = sends(calls, where.target, UP), sends(calls, where.relay, DOWN)
        assert up.thread == down.thread, "both are small, so the thread that reads the tunnel does them"
        send, count = (up, 1) if which == "target" else (down, 2)  # the target's comes first
        name = "write" if call == "write" else send.name
        # Its own: an earlier session's may not be finished yet.
        (spool,) = stack.folder.glob(f"dc1-a/spool/active/{connected.session()['id']}.*")
        path = str(spool) if call == "write" else ""
        inject = f"{name}:signal=SIGKILL:when={count}"

        def execute(sql: str) -> None:
            with pytest.raises(psycopg.Error):
                connection.execute(sql)

        with Strace(send.thread, tmp_path / "kill", follow=False, inject=inject, path=path) as killer:
            yield execute
            wait_for(lambda: not agent.running(), "the agent to be killed")
            wait_for(lambda: not killer.running(), "strace to end")
            assert killer.lines()[-1].endswith("= ?"), "it was not killed in the call"


@pytest.mark.parametrize(
    ("which", "call", "executed", "stated", "answered"),
    [
        ("target", "write", False, False, False),
        ("target", "send", False, True, False),
        ("relay", "write", True, True, False),
        ("relay", "send", True, True, True),
    ],
)
def test_a_kill_between_write_and_send(
    stack, alice, connect, postgres, tmp_path, which, call, executed, stated, answered
) -> None:
    marker = f"<{secrets.token_hex(4)}-simple0-1>"
    with connect(alice) as connected:
        with killed_at(stack, postgres, connected, tmp_path, which, call) as execute:
            execute(f"insert into kill9 values ('{marker}') returning marker")
        session = connected.session()["id"]
    stack.start_agent("dc1-a")
    wait_for(lambda: stack.status("pam-relay", "relay")["routes"], "the agent to be back")
    wait_for(lambda: spooled(stack) == [], "an empty spool")
    # What nobody saw may be missing; what the target saw is stated, what was about to be seen is there.
    count = postgres.sql(f"select count(*) from kill9 where marker = '{marker}'", database="app")
    assert count == str(int(executed))
    stack.platform("recordings", "verify")
    lost = missing([marker], StoredRecordings(stack).events([session]))
    assert (f"{marker}: no statement" not in lost) == stated
    assert (f"{marker}: no data" not in lost) == answered
