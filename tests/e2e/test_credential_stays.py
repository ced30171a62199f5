"""The credential stays in the agent: nobody else's memory, no file, log, argument, environment, recording,
column, page or answer has the password that the agent logs in with, in any way of writing it.

All passwords of this module share a random middle, so that one look finds any of them.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import json
import os
import re
import secrets
import sqlite3
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import psycopg
import pytest
import requests
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from memory import Watch, clients, contained, forms, in_arguments, in_files, in_memory
from postgres_server import NOBODY, PostgresServer
from processes import Process, free_port, listens, wait_for
from psycopg import sql
from stack import Person, Stack

CORE = secrets.token_hex(16)
#: What each way of writing it changes: quotes, backslash, a letter outside ASCII, characters of URLs.
HARD = '"\\é +/&%'
#: {account: how pg_hba.conf wants its password}; that of "wrong" is none that the database knows.
METHODS = {"scram": "scram-sha-256", "md5": "md5", "plain": "password", "wrong": "scram-sha-256"}
PASSWORDS = {name: f"{name}{HARD}{CORE}{HARD}{secrets.token_hex(4)}" for name in METHODS}
QUICK = forms("core", CORE)
#: How often everything is looked at while a session works.
ROUNDS = 5
#: Also each whole password, and what is as good as one: PostgreSQL's md5 verifier.
NEEDLES = {
    **QUICK,
    **{key: value for name, text in PASSWORDS.items() for key, value in forms(name, text).items()},
    **forms("verifier", hashlib.md5(f"{PASSWORDS['md5']}cred_md5".encode()).hexdigest()),
}


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    """One with TLS, without which the agent sends no password in clear, and a role for each method."""
    server = PostgresServer(debian=True)
    try:
        data = server.folder / "data"
        certificate, key = self_signed()
        (data / "server.crt").write_bytes(certificate)
        (data / "server.key").touch(mode=0o600)
        (data / "server.key").write_bytes(key)
        if os.geteuid() == 0:
            os.chown(data / "server.key", NOBODY, NOBODY)
        hba = data / "pg_hba.conf"
        lines = [f"hostssl all cred_{name} 127.0.0.1/32 {method}" for name, method in METHODS.items()]
        hba.write_text("\n".join([*lines, hba.read_text()]))
        server.sql("create database app", "alter system set ssl = on", "select pg_reload_conf()")
        # The server reads its configuration anew a moment after it was asked to.
        wait_for(lambda: server.sql("show ssl") == "on", "TLS")
        make_roles(server)
        yield server
    finally:
        server.stop()


def make_roles(server: PostgresServer) -> None:
    # Not by psql: its command line would show the passwords.
    info = f"host=127.0.0.1 port={server.port} dbname=app user=postgres password={server.password}"
    with psycopg.connect(info) as connection:
        for name, method in METHODS.items():
            word = "nothing of the kind" if name == "wrong" else PASSWORDS[name]
            stored = "md5" if method == "md5" else "scram-sha-256"
            connection.execute(sql.SQL("set password_encryption = {}").format(stored))
            create = sql.SQL("create role {} login password {}")
            connection.execute(create.format(sql.Identifier(f"cred_{name}"), sql.Literal(word)))


def self_signed() -> tuple[bytes, bytes]:
    """A certificate for 127.0.0.1 that is its own authority, and its key, in PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "db.test")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return certificate.public_bytes(pem), key.private_bytes(pem, *plain)


def add_accounts(stack: Stack, server: PostgresServer) -> None:
    folder = stack.folder / "secrets"
    folder.mkdir(mode=0o700, exist_ok=True)
    for name, password in PASSWORDS.items():
        (folder / name).touch(mode=0o600)
        (folder / name).write_text(password)
    ca = stack.folder / "ca.pem"
    ca.write_bytes((server.folder / "data" / "server.crt").read_bytes())
    accounts = [
        {
            "name": name,
            "user": f"cred_{name}",
            "password": {"file": str(folder / name)},
            "databases": ["app"],
        }
        for name in METHODS
    ]
    where = {"gateway": "dc1", "host": "127.0.0.1", "port": server.port}
    tls = {"mode": "verify-full", "ca": {"file": str(ca)}}
    stack.resources.append({"name": "db", "protocol": "postgres", **where, "tls": tls, "accounts": accounts})


@pytest.fixture(scope="module")
def stack(tmp_path_factory, postgres) -> Iterator[Stack]:
    talkative = {"log_level": "debug"}
    folder = tmp_path_factory.mktemp("stack")
    with Stack(folder, agent_config=talkative, relay_config=talkative) as running:
        add_accounts(running, postgres)
        running.start()
        yield running


# --- what happens, watched all the time ---------------------------------------------------------------


@dataclass
class Story:
    """What was seen while sessions of every kind ran, all of them over by now."""

    watch: Watch
    shown: dict[str, str]  #: what people were shown, by what they did
    agent_during: set[str]
    sessions: list[str]


@pytest.fixture(scope="module")
def story(stack: Stack, alice: Person, tmp_path_factory) -> Story:
    relay = stack.processes["relay"].pid
    shown: dict[str, str] = {}
    inputs = stack.folder / "secrets"
    looks = {
        "relay": lambda: in_memory(relay, QUICK),
        "clients": lambda: {name for pid in clients(alice.home) for name in in_memory(pid, QUICK)},
        "arguments": lambda: in_arguments(QUICK),
        "files": lambda: in_files(stack.folder, QUICK, without=(inputs,)),
    }
    with Watch(looks, pause=0.7) as watch:
        log = tmp_path_factory.mktemp("client") / "client.log"
        during = killed_session(stack, alice, log, watch)
        shown["killed"] = log.read_text()
        for account in METHODS:
            query = ["psql", "-XAt", "-c", "select current_user", "-c", "select nonsense"]
            done = alice.run("-vv", "connect", f"db/{account}", "--", *query, check=False)
            shown[account] = done.stdout + done.stderr
        shown["environment"] = alice.run("connect", "db/scram", "--", "env").stdout
    listed = json.loads(alice.run("sessions", "ls", "--json").stdout)
    return Story(watch, shown, during, [row["id"] for row in listed])


def killed_session(stack: Stack, alice: Person, log: Path, watch: Watch) -> set[str]:
    """A session that is killed while it is at work; what its agent's memory had meanwhile."""
    begun = watch.rounds
    port = free_port()
    command = alice.command("-vv", "connect", "db/scram", "--port", str(port))
    client = Process("client", command, log, env=alice.environment())
    try:
        client.ready_when(lambda: listens(port))
        info = f"host=127.0.0.1 port={port} dbname=app user=me sslmode=disable"
        with psycopg.connect(info, autocommit=True) as connection:
            for number in range(200):
                connection.execute("select %s::text", (f"row {number}",))
            wait_for(
                lambda: connection.execute("select 1") and watch.rounds >= begun + ROUNDS,
                "looks at a session that works",
                timeout=400,  # each reads all that there is, on a machine that may do so slowly
            )
            during = in_memory(stack.processes["dc1-a"].pid, QUICK)
            session = json.loads(alice.run("sessions", "ls", "--json").stdout)[0]["id"]
            kill = threading.Timer(0.5, lambda: alice.run("sessions", "kill", session))
            kill.start()
            with pytest.raises(psycopg.OperationalError):
                connection.execute("select pg_sleep(600)")
            kill.join()
            # Of the agent's own words a machine that stands still may swallow the last.
            wait_for(lambda: "killed by alice" in log.read_text(), "the client to say why")
    finally:
        client.stop(number=2)
    return during


# --- what was seen ------------------------------------------------------------------------------------


def test_the_sessions_were_what_they_should_be(story) -> None:
    for account in ("scram", "md5", "plain"):
        assert f"cred_{account}" in story.shown[account]
        assert 'column "nonsense" does not exist' in story.shown[account]
    assert "the target refused the account's credential" in story.shown["wrong"]
    assert "PGPORT=" in story.shown["environment"]
    assert len(story.sessions) == 6


def test_the_agent_has_it_and_nobody_else_ever_does(story) -> None:
    assert "core raw" in story.agent_during  # the same look finds it where it must be
    assert story.watch.rounds >= ROUNDS
    assert story.watch.found == {}


def test_nobody_is_shown_it(story) -> None:
    assert {what for what, text in story.shown.items() if contained(text.encode(), NEEDLES)} == set()


def test_no_file_has_it_but_the_operators_own(story, stack) -> None:
    found = in_files(stack.folder, NEEDLES)
    inputs = {str(stack.folder / "secrets" / name) for name in METHODS}
    assert set(found) == inputs
    logs = [path.name for path in stack.folder.glob("*.log")]
    assert {"platform.log", "relay.log", "dc1-a.log"} <= set(logs)


def test_no_recording_has_it(story, stack, alice) -> None:
    browser = alice.web()

    def complete() -> bool:
        listed = json.loads(alice.run("sessions", "ls", "--json").stdout)
        return all(row["recording"] in ("complete", "none") for row in listed)

    wait_for(complete, "the recordings", timeout=120)
    events = 0
    for session in story.sessions:
        api = f"{stack.url}/api/v1/sessions/{session}"
        for path in ("events", "parts/1/raw"):
            answer = browser.get(f"{api}/{path}", timeout=90)
            assert contained(answer.content, NEEDLES) == set()
            events += answer.content.count(b'"kind"')
    assert events > 200


def test_no_column_of_the_platforms_database_has_it(story, stack) -> None:
    files = [path for path in (stack.folder / "platform").rglob("*.sqlite3*") if path.is_file()]
    assert files
    values = 0
    for file in files:
        if file.suffix != ".sqlite3":
            continue  # the write-ahead log is looked at with the files
        with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as database:
            names = [row[0] for row in database.execute("select name from sqlite_master where type='table'")]
            for name in names:
                for row in database.execute(f'select * from "{name}"'):
                    for value in row:
                        values += 1
                        data = value if isinstance(value, bytes) else str(value).encode()
                        assert contained(data, NEEDLES) == set(), name
    assert values > 1000


@pytest.mark.parametrize("name", ["root", "alice", "auditor"])
def test_no_page_and_no_answer_has_it(story, stack, name: str) -> None:
    browser = stack.person(name).web()
    pages = {f"{stack.url}/", *api_addresses(browser, stack, story.sessions)}
    seen: set[str] = set()
    while pages and len(seen) < 150:
        page = pages.pop()
        seen.add(page)
        answer = browser.get(page, timeout=90)
        assert answer.status_code < 500, page
        assert contained(answer.content, NEEDLES) == set(), page
        if "html" in answer.headers.get("Content-Type", ""):
            links = {urljoin(page, link) for link in re.findall(r'href="([^"#]+)"', answer.text)}
            same = {link for link in links if urlsplit(link).netloc == urlsplit(stack.url).netloc}
            pages |= {link for link in same if "logout" not in link} - seen
    assert len(seen) > 20


def api_addresses(browser: requests.Session, stack: Stack, sessions: list[str]) -> set[str]:
    """Everything that the API's own description says can be got."""
    described: dict[str, Any] = browser.get(f"{stack.url}/api/v1/openapi.json", timeout=90).json()
    found = set()
    for path, methods in described["paths"].items():
        if "get" in methods and "/agent/inbox" not in path:  # that one waits
            for session in sessions[:2]:
                found.add(stack.url + path.format(session=session, number=1, part=1))
    assert len(found) > 10
    return found


def test_no_column_has_it_when_the_platform_is_on_postgresql(postgres, tmp_path_factory) -> None:
    postgres.sql("create role pam login password 'pam-store'", "create database pam owner pam")
    folder = tmp_path_factory.mktemp("on-postgresql")
    password = folder / "db-password"
    password.touch(mode=0o600)
    password.write_text("pam-store")
    url = f"postgresql://pam@127.0.0.1:{postgres.port}/pam"
    with Stack(folder, database_url={"url": url, "password_file": str(password)}) as stack:
        add_accounts(stack, postgres)
        stack.start_platform()
    dump = subprocess.run(
        [postgres.bin / "pg_dump", "--inserts"],
        env=postgres.environment(database="pam"),
        capture_output=True,
        check=True,
    ).stdout
    assert b"cred_scram" in dump
    assert contained(dump, NEEDLES) == set()
