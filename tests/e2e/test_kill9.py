"""`kill -9` of the agent at any moment: what a party saw is in a recording that the platform has.

The stored files are read by a reader that shares no code with the Recorder.
"""

from __future__ import annotations

import random
import time

import pytest
from load import Load, missing
from processes import wait_for
from stored import StoredRecordings, spooled

KILLS = 20
#: Kills of one client's session: each connection after a kill opens the session anew, in another part.
KILLS_PER_SESSION = 5


@pytest.fixture(scope="module")
def table(stack, postgres) -> None:
    postgres.sql("create table kill9 (marker text)", "grant all on kill9 to demo_db_rw", database="app")


@pytest.fixture
def rng() -> random.Random:
    seed = time.time_ns()
    print(f"seed {seed}")  # shown when the test fails
    return random.Random(seed)


def executed(postgres) -> list[str]:
    """What the target saw: the markers that it inserted by statements."""
    markers = postgres.sql("select marker from kill9 where marker like '%insert%'", database="app")
    return markers.splitlines()


def require_recorded(stack, sessions: list[str], markers: list[str]) -> None:
    assert len(set(markers)) == len(markers) > 0
    wait_for(lambda: spooled(stack) == [], "an empty spool", timeout=240)
    stack.platform("recordings", "verify")  # fails unless every recording is right
    events = StoredRecordings(stack).events(sessions)
    assert missing(markers, events) == []
    # The check itself: one event less is noticed.
    marker = next(marker for marker in markers if "simple" in marker)
    fewer = [event for event in events if marker not in event.get("sql", "")]
    assert missing(markers, fewer) == [f"{marker}: no statement"]


@pytest.mark.timeout(1200)
def test_20_kills_lose_nothing_that_client_or_target_saw(stack, alice, connect, postgres, table, rng) -> None:
    seen: list[str] = []
    sessions: list[str] = []
    for _ in range(KILLS // KILLS_PER_SESSION):
        with connect(alice) as connected:
            for _ in range(KILLS_PER_SESSION):
                with Load(connected.open) as load:
                    time.sleep(rng.uniform(0, 0.5))
                    stack.processes["dc1-a"].kill()
                seen += load.seen
                stack.restart_agent("dc1-a")
            sessions.append(connected.session()["id"])
    require_recorded(stack, sessions, [*seen, *executed(postgres)])
    ends = [end for session in sessions for _, end in StoredRecordings(stack).parts(session)]
    assert ends.count("crash") == KILLS


def test_kills_while_the_platform_is_away_lose_nothing(stack, alice, connect, postgres, table, rng) -> None:
    before = set(executed(postgres))
    with connect(alice) as connected:
        connected.open().close()  # the platform lets the session begin, then goes
        session = connected.session()["id"]
        stack.processes["platform"].kill()
        try:
            with Load(connected.open) as load:
                time.sleep(rng.uniform(0, 0.5))
                stack.processes["dc1-a"].kill()
            stack.restart_agent("dc1-a")  # without a platform: it finishes the part
            wait_for(lambda: [name.split("/")[0] for name in spooled(stack)] == ["ready"], "a finished part")
            stack.processes["dc1-a"].kill()
        finally:
            stack.start_platform()
        stack.restart_agent("dc1-a")
    require_recorded(stack, [session], [*load.seen, *(set(executed(postgres)) - before)])
