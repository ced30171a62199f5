"""Whatever ends a session ends it within a second, wherever its pump is blocked, and leaves nothing behind.

Each test brings one connection to every place in which an agent can be blocked, each in a session of its own,
then lets one act end them all.
"""

from __future__ import annotations

import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
import pytest
from patience import Metronome
from processes import wait_for
from stack import Stack
from stalling import Target, inodes_of_connections, open_connections
from stored import StoredRecordings, spooled

#: From the moment at which the platform has answered, or at which time is over.
SECONDS = 1.0
#: Time enough for all to be blocked, on a machine that is slow as well.
EXPIRY, IDLE = 60, 30
#: An agent that gives up a silent target later than that: what is tested is who else ends it.
PATIENT = """
from pam_agent.protocols.postgres import interceptor
interceptor.ANSWER_SECONDS = interceptor.LOGIN_SECONDS = 600.0
from pam_agent.__main__ import main
main()
"""
#: What an end by the clock may be too early by: the platform counts whole seconds.
EARLY = 0.5
SASL = b"SCRAM-SHA-256\0\0"
#: What a client is told; the platform's sentence, or the agent's own.
WORDS = {
    "kill": "killed by root: abuse",
    "expiry": "the session has expired: its time is over",
    "idle": "the session was idle for too long",
    "disabled": "the user was disabled",
    "policy": "policy no longer allows it",
    "revoked": "the agent is no longer part of its gateway",
    "gateway": "the agent is no longer part of its gateway",
}
#: What ``connect`` says of it; nothing to somebody whose login is no longer valid.
SAID = WORDS | {
    "expiry": "the session's time is over",
    "idle": "idle",
    "disabled": "",
    "revoked": "its agent was revoked",
    "gateway": "its agent was revoked",
}
#: The end of the recording where it is not ``killed``.
ENDS = {"expiry": "expired", "idle": "idle", "revoked": "revoked", "gateway": "revoked"}
LIMITS = {"expiry": {"max_duration": f"{EXPIRY}s"}, "idle": {"idle_limit": f"{IDLE}s"}}
BLOCK = b"y" * 8191 + b"\n"
#: More than can be copied before the time is over.
ENDLESS = (
    "copy (select repeat('x', 8191) from generate_series(1, 10000) a, generate_series(1, 10000) b) to stdout"
)


# -- the places ----------------------------------------------------------------------------------------


@dataclass
class Blocked:
    """One connection in one place; ``error`` is what its client was told in the end."""

    place: str
    target: Target
    connected: object
    work: Callable[[Blocked], None]
    session: str = ""
    error: psycopg.Error | None = None
    acted: float = 0.0  #: when the act that ends it was answered, or its time over
    closed: float = 0.0
    go_on: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        self.thread = threading.Thread(target=self._run, name=self.place, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.work(self)
        except psycopg.Error as error:
            self.error = error


def stalled_reader(blocked: Blocked) -> None:
    with blocked.connected.open() as connection, connection.cursor().copy(ENDLESS) as copy:
        next(iter(copy))
        blocked.go_on.wait(600)
        for _ in copy:
            pass


def silent_query(blocked: Blocked) -> None:
    with blocked.connected.open() as connection:
        connection.execute("select pg_sleep(600)")


def login(blocked: Blocked) -> None:
    blocked.connected.open().close()


def copy_in(blocked: Blocked) -> None:
    with blocked.connected.open() as connection:
        connection.execute("create temp table sink (line text)")
        with connection.cursor().copy("copy sink from stdin") as copy:
            while True:
                copy.write(BLOCK)


def copy_out(blocked: Blocked) -> None:
    with blocked.connected.open() as connection, connection.cursor().copy(ENDLESS) as copy:
        for _ in copy:
            pass


QUIET = {
    "stalled-reader": stalled_reader,
    "stalled-target": copy_in,
    "silent-query": silent_query,
    "silent-target": login,
    "tls-handshake": login,
    "authentication": login,
}
BUSY = {"copy-in": copy_in, "copy-out": copy_out}
#: Here no words come through: the client is in the middle of a message; or it is libpq, which drops what it
#: has read when the server is gone while it sends. ``connect`` says why on its stderr.
WORDLESS = {"stalled-reader", "copy-out", "stalled-target", "copy-in"}


@pytest.fixture(scope="module")
def targets(postgres) -> Iterator[dict[str, Target]]:
    """Where each place's resource leads."""
    sasl = b"R" + struct.pack(">II", 8 + len(SASL), 10) + SASL
    made = {name: Target(postgres.port) for name in ("stalled-reader", "silent-query", *BUSY)}
    made |= {
        "stalled-target": Target(postgres.port, most_up=1 << 20),
        "silent-target": Target(),
        "tls-handshake": Target(answers=[b"S"]),
        "authentication": Target(answers=[sasl]),
    }
    yield made
    for target in made.values():
        target.close()


@pytest.fixture(scope="module")
def stack(tmp_path_factory, postgres, targets) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("stack")
    with Stack(folder, agent_program=(sys.executable, "-c", PATIENT)) as running:
        for name, target in targets.items():
            mode = "require" if name == "tls-handshake" else "disable"
            running.add_database(postgres, name=name, port=target.port, tls={"mode": mode})
        running.start()
        yield running


@pytest.fixture(scope="module")
def root(stack):
    """The admin's browser, with a call of the API as a page's script would make it."""
    browser = stack.person("root").web()

    def call(method: str, path: str, **options):
        headers = {"X-CSRFToken": browser.cookies["csrftoken"], "Referer": stack.url}
        answer = browser.request(method, f"{stack.url}/api/v1/{path}", headers=headers, timeout=90, **options)
        assert answer.status_code == 200, answer.text
        return answer.json()

    return call


@pytest.fixture
def agent(stack) -> str:
    """The name of the one agent that serves now."""
    (name,) = stack.agents
    wait_for(
        lambda: [r["agent"] for r in stack.status("pam-relay", "relay")["routes"]] == [name], "its route"
    )
    return name


class Lost:
    """How much time the machine kept from us, by when: notes of what a Metronome says."""

    def __init__(self, beat: Metronome) -> None:
        self._beat = beat
        self._notes = [(time.time(), 0.0)]

    def note(self) -> None:
        self._notes.append((time.time(), self._beat.lost()))

    def between(self, first: float, last: float) -> float:
        before = max((lost for when, lost in self._notes if when <= first), default=0.0)
        return next((lost for when, lost in self._notes if when >= last), self._beat.lost()) - before


@pytest.fixture
def lost() -> Iterator[Lost]:
    with Metronome() as beat:
        yield Lost(beat)


@pytest.fixture
def blocked(stack, alice, connect, targets, root, lost) -> Iterator[Callable[[dict], list[Blocked]]]:
    """Bring a connection to each place; returns once all are blocked there, or under full load."""
    with ExitStack() as clients:

        def bring(places: dict) -> list[Blocked]:
            made = start_clients(
                places, lambda place: clients.enter_context(connect(alice, f"{place}/owner"))
            )
            for one in made:
                one.target.up = one.target.down = 0
                one.start()
            for one in made:
                wait_for(lambda one=one: is_there(one), f"{one.place} to be blocked")
            ids = {row["account"]: row["id"] for row in root("GET", "sessions?state=active")["sessions"]}
            for one in made:
                one.session = ids[f"{one.place}/owner"]
            return made

        def start_clients(places: dict, start: Callable) -> list[Blocked]:
            """Side by side, since each takes a second."""
            made: list[Blocked] = []
            starting = [
                threading.Thread(
                    target=lambda place=place, work=work: made.append(
                        Blocked(place, targets[place], start(place), work)
                    )
                )
                for place, work in places.items()
            ]
            for thread in starting:
                thread.start()
            for thread in starting:
                thread.join()
            assert len(made) == len(places)
            return made

        def is_there(one: Blocked) -> bool:
            lost.note()
            assert one.thread.is_alive(), f"{one.place}: {one.error}\n{stack.logs()}"
            if one.place in BUSY:
                return one.target.up + one.target.down > 8 << 20
            return one.target.quiet(0.7)

        yield bring


# -- the acts ------------------------------------------------------------------------------------------


def act(end: str, stack: Stack, root, agent: str, made: list[Blocked]) -> None:
    """Do what ends the sessions; notes when it was answered, or when time is over."""
    if end == "expiry":
        ends = {row["id"]: row["session_end"] for row in root("GET", "sessions?state=active")["sessions"]}
        for one in made:
            one.acted = ends[one.session]
        return
    if end == "idle":
        for one in made:
            one.acted = one.target.changed + IDLE
        return
    for one in made if end == "kill" else ():
        root("POST", f"sessions/{one.session}/kill", json={"reason": "abuse"})
        one.acted = time.time()
    if end == "disabled":
        root("POST", "users/alice/disable")
    elif end == "revoked":
        root("POST", f"agents/{agent}/revoke")
    elif end == "gateway":
        root("DELETE", "gateways/dc1")
    elif end == "policy":
        stack.policy = {"accounts": ["other/*"]}
        stack.apply()
    for one in made:
        one.acted = one.acted or time.time()


@pytest.fixture
def after(stack, alice, agent) -> Iterator[None]:
    """Undo what an act did."""
    yield
    # An agent that is no longer part of its gateway has no route.
    revoked = not stack.status("pam-relay", "relay")["routes"]
    if stack.policy or revoked:
        stack.policy = {}
        stack.apply()
    if revoked:
        stack.processes.pop(agent).stop()
        stack.agents = (f"dc1-{chr(ord(agent[-1]) + 1)}",)
        stack.start_agent(*stack.agents)
    if alice.run("ls", check=False).returncode:
        stack.platform("user", "enable", "alice")
        alice.login()


def watch_closing(made: list[Blocked], lost: Lost) -> threading.Thread:
    """Note when the last connection to each target is shut down by who dialled it."""

    def watch() -> None:
        give_up = time.time() + EXPIRY + 60
        while time.time() < give_up and not all(one.closed for one in made):
            for one in made:
                if not one.closed and not open_connections(one.target.port):
                    one.closed = time.time()
            lost.note()
            time.sleep(0.01)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


# -- what an agent holds -------------------------------------------------------------------------------


def held(stack: Stack, agent: str) -> tuple[int, int]:
    """Threads and descriptors of the agent. Connections to the platform are a pool, and no leak."""
    pid = stack.processes[agent].pid
    threads = len(list(Path(f"/proc/{pid}/task").iterdir()))
    pool = {f"socket:[{inode}]" for inode in inodes_of_connections(stack.port)}
    files = 0
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            files += str(link.readlink()) not in pool
        except FileNotFoundError:
            continue
    return threads, files


def recorded(stack: Stack, agent: str, sessions: list[str], end: str) -> None:
    """Every recording has this end and is right, on the platform (which has verified it on receipt) or, from
    an agent that may not upload any more, in its spool. Read by a reader that shares no code with ours."""
    stored = StoredRecordings(stack, agent)
    if end == "revoked":
        stored.folder = stack.folder / agent / "spool"
        wait_for(
            lambda: all(list(stored.folder.glob(f"ready/{one}.*")) for one in sessions), "finished parts"
        )
    else:
        wait_for(lambda: spooled(stack, agent) == [], "an empty spool")
    for session in sessions:
        ((events, ended),) = stored.parts(session)
        assert ended == end
        assert events[-1]["kind"] in ("end", "refused")


@pytest.mark.parametrize("end", list(WORDS))
@pytest.mark.usefixtures("after")
def test_every_end_cuts_within_a_second_wherever_it_blocks(end, stack, agent, root, blocked, lost) -> None:
    require_cut(end, QUIET, stack, agent, root, blocked, lost)


@pytest.mark.parametrize("end", ["kill", "expiry", "policy"])
@pytest.mark.usefixtures("after")
def test_every_kind_of_end_cuts_copies_under_full_load(end, stack, agent, root, blocked, lost) -> None:
    require_cut(end, BUSY, stack, agent, root, blocked, lost)


def require_cut(end: str, places: dict, stack: Stack, agent: str, root, blocked, lost: Lost) -> None:
    if end in LIMITS:
        stack.policy = LIMITS[end]
        stack.apply()
    before = held(stack, agent)
    made = blocked(places)
    watcher = watch_closing(made, lost)
    began = time.time()
    act(end, stack, root, agent, made)
    watcher.join()
    seconds = {one.place: round(one.closed - one.acted, 2) for one in made}
    # What counts as idle began when the target had heard the last, or somewhat later.
    waited = IDLE if end == "idle" else 0
    kept = {one.place: round(lost.between(one.acted - waited, one.closed), 2) for one in made}
    print(end, seconds, kept)
    for one in made:
        assert one.closed, f"{one.place}: not cut"
        assert seconds[one.place] - kept[one.place] <= SECONDS, (one.place, seconds, kept)
        if end in LIMITS:
            assert seconds[one.place] + kept[one.place] > -EARLY, (one.place, seconds, kept)
        else:
            # A command says that it is done when it ends, somewhat after it has committed.
            assert one.closed > began, (one.place, seconds, kept)
    for one in made:
        one.go_on.set()
        one.thread.join(60)
        assert not one.thread.is_alive(), f"{one.place}: the client hangs"
        assert one.error is not None, f"{one.place}: a clean end"
        if one.place not in WORDLESS:
            assert WORDS[end] in str(one.error), one.place
        wait_for(lambda one=one: SAID[end] in one.connected.process.log.read_text(), f"words for {one.place}")
    wait_for(lambda: not stack.status("pam-agent", agent, well=False)["sessions"], "the sessions to be gone")
    wait_for(
        lambda: all(now <= then for now, then in zip(held(stack, agent), before, strict=True)),
        f"no more than {before} threads and descriptors",
    )
    recorded(stack, agent, [one.session for one in made], ENDS.get(end, "killed"))
