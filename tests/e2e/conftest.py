"""One whole product per test module, each part a real process, with a real PostgreSQL behind it."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from postgres_server import PostgresServer
from principals import World, inhabited
from processes import Process, free_port, listens, wait_for
from stack import Person, Stack
from web_servers import WebServers


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    server = PostgresServer()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, postgres: PostgresServer) -> Iterator[Stack]:
    with Stack(tmp_path_factory.mktemp("stack")) as running:
        running.add_database(postgres)
        running.start()
        yield running


@pytest.fixture(scope="module")
def alice(stack: Stack) -> Person:
    person = stack.person("alice")
    person.login()
    return person


@pytest.fixture(scope="session", params=["sqlite", "postgres"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A platform alone, on each database, with one of everybody who may talk to it."""
    with inhabited(tmp_path_factory.mktemp("world"), request.param) as found:
        yield found


@pytest.fixture(scope="module")
def web_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebServers]:
    """Web applications behind nginx."""
    made = WebServers(tmp_path_factory.mktemp("servers") / "web")
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def web_stack(tmp_path_factory: pytest.TempPathFactory, web_servers: WebServers) -> Iterator[Stack]:
    with Stack(tmp_path_factory.mktemp("stack")) as running:
        web_servers.add_to(running)
        running.start()
        yield running


@pytest.fixture(scope="module")
def web_alice(web_stack: Stack) -> Person:
    person = web_stack.person("alice")
    person.login()
    return person


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real Chromium."""
    from chromium import chromium

    with chromium() as found:
        yield found


@pytest.fixture
def context(browser: Any) -> Iterator[Any]:
    """A profile of its own in that browser."""
    from chromium import PATIENCE_MS

    made = browser.new_context()
    made.set_default_timeout(PATIENCE_MS)
    yield made
    made.close()


@pytest.fixture
def opened(web_alice: Person, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens accounts as ``pam-client connect`` does; ended after the test."""
    from chromium import Opened

    running: list[Opened] = []

    def opened(account: str, *options: str) -> Opened:
        running.append(Opened(web_alice, account, tmp_path / f"browser-{len(running)}", *options))
        return running[-1]

    yield opened
    for one in running:
        one.stop()


@dataclass
class Connected:
    """A running ``pam-client connect`` with a fixed port."""

    person: Person
    process: Process
    port: int

    @property
    def conninfo(self) -> str:
        return f"host=127.0.0.1 port={self.port} dbname=app user=me sslmode=disable gssencmode=disable"

    def open(self, **options: Any) -> psycopg.Connection[Any]:
        return psycopg.connect(self.conninfo, autocommit=True, **options)

    def environment(self) -> dict[str, str]:
        return {
            **self.person.environment(),
            "PGHOST": "127.0.0.1",
            "PGPORT": str(self.port),
            "PGUSER": "me",
            "PGDATABASE": "app",
            "PGSSLMODE": "disable",
        }

    def session(self) -> dict[str, Any]:
        """The newest session of the person, as the platform has it."""
        return sessions(self.person)[0]


Connect = Callable[..., contextlib.AbstractContextManager[Connected]]


@pytest.fixture
def connect(tmp_path: Path) -> Connect:
    """``with connect(person, "demo-db/owner") as connected: …``"""

    @contextlib.contextmanager
    def connect(person: Person, account: str = "demo-db/owner") -> Iterator[Connected]:
        port = free_port()
        command = person.command("connect", account, "--port", str(port))
        process = Process("client", command, tmp_path / f"client-{port}.log", env=person.environment())
        try:
            process.ready_when(lambda: listens(port))
            yield Connected(person, process, port)
        finally:
            process.stop(number=2)

    return connect


def sessions(person: Person, *options: str) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = json.loads(person.run("sessions", "ls", "--json", *options).stdout)
    return listed


@pytest.fixture
def replay() -> Callable[..., list[dict[str, Any]]]:
    """The verified events of a session, once its recording is complete on the platform."""

    def events(person: Person, session: str, *, timeout: float = 120) -> list[dict[str, Any]]:
        def complete() -> bool:
            found = [row for row in sessions(person) if row["id"] == session]
            return bool(found) and found[0]["recording"] == "complete"

        try:
            wait_for(complete, f"the recording of {session}", timeout=timeout)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{sessions(person)[:3]}\n{person.stack.logs()}") from None
        shown = person.run("replay", session, "--json", "--verify").stdout
        return [json.loads(line) for line in shown.splitlines() if line.strip()]

    return events


@pytest.fixture
def tool(postgres: PostgresServer) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run one of PostgreSQL's own programs with the environment of a connection."""

    def run(env: dict[str, str], program: str, *words: str, timeout: float = 600) -> Any:
        done = subprocess.run(
            [str(postgres.bin / program), *words],
            env=env,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    return run
