"""What is recorded outlives a bad line, a lost store, a full disk, a wrong clock: each is told in words."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator

import psycopg
import pytest
from faults import FaultyLine, fill, small_disk
from load import Load, missing
from processes import Process, wait_for
from stack import BIN, Person, Stack
from stored import StoredRecordings, spooled

AGENT = "dc1-a"


@pytest.fixture
def rng() -> random.Random:
    seed = time.time_ns()
    print(f"seed {seed}")  # shown when the test fails
    return random.Random(seed)


@pytest.fixture(scope="module")
def stack(tmp_path_factory, postgres) -> Iterator[Stack]:
    """As always, but the agent reaches the platform over ``stack.line``."""
    folder = tmp_path_factory.mktemp("stack")
    with Stack(folder) as running, FaultyLine(running.port, random.Random()) as line:
        running.line = line  # type: ignore[attr-defined]
        running.agent_config["platform"] = line.url
        running.add_database(postgres)
        running.start()
        postgres.sql("create table kill9 (marker text)", "grant all on kill9 to public", database="app")
        yield running
        running.stop()


@pytest.fixture(autouse=True)
def fine_line(stack) -> Iterator[None]:
    yield
    if stack.line.mode != "fine":  # a test failed in the middle
        stack.line.mode = "fine"


def log_of(stack, name: str = AGENT) -> str:
    return stack.processes[name].log.read_text()


@contextlib.contextmanager
def new_lines(stack) -> Iterator[list[str]]:
    """The lines of the agent's log from here to the end of the block."""
    lines: list[str] = []
    before = len(log_of(stack))
    yield lines
    lines += log_of(stack)[before:].splitlines()


def routed(stack) -> bool:
    return bool(stack.status("pam-relay", "relay")["routes"])


def said(stack) -> dict:
    """What the agent says of itself, also while it is not well."""
    return stack.status("pam-agent", AGENT, well=False)


def uploads(stack) -> dict:
    return said(stack)["uploader"]


def restart(stack) -> None:
    stack.processes[AGENT].stop()
    stack.start_agent(AGENT)
    wait_for(lambda: routed(stack), "the agent to be back")


def works(person: Person) -> bool:
    words = ("connect", "demo-db/owner", "--", "psql", "-XAtc", "select 'works'")
    return person.run(*words, check=False).stdout.strip().endswith("works")


def test_an_upload_gets_through_a_bad_line(stack, alice, connect, rng) -> None:
    line: FaultyLine = stack.line
    markers = [f"<0-simple-{number}>" for number in range(60)]
    with new_lines(stack) as log:
        with connect(alice) as connected, connected.open() as connection:
            session = connected.session()["id"]
            line.mode = "503"
            for marker in markers:  # 6 MB that compress to half
                connection.execute(f"select '{marker}', '{secrets.token_hex(50_000)}'")
        restart(stack)  # the end of the session: nobody else can tell the agent now
        wait_for(lambda: "503" in uploads(stack)["trouble"], "the first failure")
        line.mode = "cut"
        # Up to a minute passes between two attempts of the uploader.
        wait_for(lambda: line.cuts >= 4 or not spooled(stack), "a line cut several times", timeout=240)
        line.mode = "slow"
        wait_for(lambda: not spooled(stack), "the upload", timeout=240)
        line.mode = "fine"
    assert any("recording not uploaded, will try again" in text and session in text for text in log)
    stack.platform("recordings", "verify")
    assert missing(markers, StoredRecordings(stack).events([session])) == []


def test_a_platform_restored_from_an_older_backup_is_noticed(stack, alice, connect, tmp_path) -> None:
    wait_for(lambda: not spooled(stack), "an empty spool")
    folder, backup = stack.folder / "platform", tmp_path / "backup"
    stack.processes["platform"].stop()
    shutil.copytree(folder, backup)
    stack.start_platform()
    assert works(alice)
    with connect(alice) as connected, connected.open() as connection:
        running, lost = (row["id"] for row in json.loads(alice.run("sessions", "ls", "--json").stdout)[:2])
        connection.execute("select '<0-simple-1>'")
        wait_for(lambda: not any(lost in name for name in spooled(stack)), "the acknowledgement", timeout=180)
        # Nobody knows of either session any more, but for the agent.
        stack.processes["platform"].stop()
        wait_for(
            lambda: bool(said(stack)["platform"]["trouble"]),
            "the agent to miss the platform",
        )
        shutil.rmtree(folder)
        shutil.copytree(backup, folder)
        stack.start_platform()
        name = f"{lost}.1.pamrec"
        wait_for(lambda: name in uploads(stack)["lost"], "the loss to be told", timeout=180)
        connection.execute("select '<0-simple-2>'")
    told = [text for text in log_of(stack).splitlines() if "platform has lost a recording" in text]
    assert [lost in text for text in told] == [True]
    browser = Person(stack, "root", stack.passwords["root"], tmp_path).web()
    audit = browser.get(f"{stack.url}/api/v1/audit", params={"limit": 50}, timeout=90).json()
    assert f"{lost}.1" in json.dumps(audit)
    # The one that was running is kept here, whole, for a person to look at.
    restart(stack)  # its end: the platform cannot tell the agent of a session that it does not know
    kept = stack.folder / AGENT / "spool" / "refused" / f"{running}.1.pamrec"
    wait_for(kept.exists, "the refused recording to be put aside")
    assert missing([f"<0-simple-{n}>" for n in (1, 2)], StoredRecordings(stack).read(kept)) == []
    kept.unlink()
    # Its agent is at work, and hears kills although the numbers of its inbox began anew.
    with connect(alice) as connected, connected.open() as connection:
        alice.run("sessions", "kill", connected.session()["id"])
        with pytest.raises(psycopg.Error):
            connection.execute("select pg_sleep(600)")


def test_foreign_files_in_the_spool_are_put_aside_with_words(stack, alice, tmp_path) -> None:
    wait_for(lambda: not spooled(stack), "an empty spool")
    stack.processes[AGENT].stop()
    spool = stack.folder / AGENT / "spool"
    unknown = "s-" + "a" * 26
    (spool / "active" / "core").write_bytes(b"\x7fELF")
    (spool / "active" / f"{unknown}.1.pamrec").write_bytes(b"PAMREC1\n\x00\x00")
    (spool / "active" / f"{unknown}.2.pamrec").symlink_to("/etc/shadow")
    (spool / "active" / f"{unknown}.3.pamrec").mkdir()
    (spool / "ready" / f"{unknown}.4.pamrec").write_bytes(secrets.token_bytes(5000))
    (spool / "ready" / "notes.txt").write_text("x")
    (spool / "receipts").write_bytes(secrets.token_bytes(5000))
    (spool / "elsewhere").mkdir()
    with new_lines(stack) as log:
        stack.start_agent(AGENT)
        wait_for(lambda: routed(stack), "the agent to be back")
        assert works(alice)
        wait_for(lambda: not list((spool / "ready").iterdir()), "the uploads")
        # Said of a file once it has been moved.
        refused = re.compile(f'event="platform refuses a recording".*{unknown}')
        wait_for(lambda: refused.search(log_of(stack)) is not None, "word of the refused one")
    quarantined = [text for text in log if "file put into quarantine" in text and "reason=" in text]
    assert len(quarantined) == 5
    assert len(list((spool / "quarantine").iterdir())) == 5
    assert [path.name for path in (spool / "refused").iterdir()] == [f"{unknown}.4.pamrec"]
    assert "Traceback" not in "\n".join(log)
    for name in ("quarantine", "refused"):
        shutil.rmtree(spool / name)
        (spool / name).mkdir(mode=0o700)


def test_a_spool_that_is_none_stops_the_start_with_words(stack) -> None:
    wait_for(lambda: not spooled(stack), "an empty spool")
    stack.processes[AGENT].stop()
    spool = stack.folder / AGENT / "spool"
    spool.rename(spool.with_name("kept"))
    try:
        spool.write_text("not a folder")
        done = run_agent(stack)
        assert done.returncode == 1
        assert f"the spool {spool} cannot be used" in done.stderr
        assert "Traceback" not in done.stderr
    finally:
        spool.unlink()
        spool.with_name("kept").rename(spool)
        stack.start_agent(AGENT)
        wait_for(lambda: routed(stack), "the agent to be back")


def run_agent(stack) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "pam-agent"), "--config", str(stack.folder / f"{AGENT}.yml"), "run"]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)


def test_a_second_agent_on_a_spool_is_refused_and_disturbs_nobody(stack, alice) -> None:
    done = run_agent(stack)
    assert done.returncode == 1
    assert "another agent process uses the spool" in done.stderr
    assert "state_dir" in done.stderr
    assert said(stack)["state"] == "running"
    assert works(alice)


@pytest.mark.parametrize("offset", ["+3600", "-3600"])
@pytest.mark.skipif(shutil.which("faketime") is None, reason="the Debian package faketime is not installed")
def test_an_agent_whose_clock_is_an_hour_off_records_with_the_platforms(
    stack, alice, connect, offset
) -> None:
    stack.processes[AGENT].stop()
    config = stack.folder / f"{AGENT}.yml"
    command = ["faketime", "-f", f"{offset}s", BIN / "pam-agent", "--config", config, "run"]
    # A wrong clock is one thing, waits by the monotonic one that never end another: no host has those.
    env = {"FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    agent = Process(AGENT, command, stack.folder / f"{AGENT}{offset}.log", env=env)
    stack.processes[AGENT] = agent
    try:
        wait_for(lambda: routed(stack), "the agent to be back")
        before = time.time()
        with connect(alice) as connected, connected.open() as connection:
            session = connected.session()["id"]
            connection.execute("select '<0-simple-1>'")
        wait_for(lambda: not spooled(stack), "the upload")
        stack.platform("recordings", "verify")
        (file,) = StoredRecordings(stack).files(session)
        assert before - 60 < StoredRecordings(stack).header(file)["created"] < time.time() + 60
        assert missing(["<0-simple-1>"], StoredRecordings(stack).events([session])) == []
        assert "clock" in agent.log.read_text()
    finally:
        agent.stop()
        stack.start_agent(AGENT)
        wait_for(lambda: routed(stack), "the agent to be back")


def work(connection: psycopg.Connection, seen: list[str]) -> None:
    for number in range(1000):
        marker = f"<0-simple-{number}>"
        connection.execute(f"select '{marker}', '{secrets.token_hex(2000)}'")
        seen.append(marker)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a tmpfs")
def test_a_full_disk_ends_sessions_with_words_loses_nothing_and_recovers(
    tmp_path_factory, postgres, connect
) -> None:
    folder = tmp_path_factory.mktemp("full")
    with small_disk(folder / AGENT / "spool", "2m") as spool, Stack(folder) as stack:
        stack.add_database(postgres, name="full-db")
        postgres.sql("grant all on kill9 to public", database="app")
        stack.start()
        alice = stack.person("alice")
        alice.login()
        with connect(alice, "full-db/owner") as connected:
            with connected.open() as connection, Load(connected.open) as load:
                fill(spool / "junk")
                with pytest.raises(psycopg.Error, match="recorded"):
                    work(connection, load.seen)
            session = connected.session()["id"]
        words = ("connect", "full-db/owner", "--", "psql", "-XAtc", "select 1")
        tries: list[str] = []

        def refused() -> bool:
            # What has been uploaded meanwhile has left room.
            fill(spool / f"junk-{len(tries)}")
            tried = alice.run(*words, check=False)
            tries.append(tried.stderr.lower())
            # Or it began in what became free just then, and failed in its middle.
            return tried.returncode != 0 and "cannot be recorded: no space left" in tries[-1]

        wait_for(refused, "a session to be refused in words", timeout=180)
        for junk in spool.glob("junk*"):
            junk.unlink()
        wait_for(lambda: spooled(stack) == [], "an empty spool", timeout=180)
        assert alice.run(*words).stdout.strip() == "1"
        stack.platform("recordings", "verify")
        assert missing(load.seen, StoredRecordings(stack).events([session])) == []
        assert "Traceback" not in log_of(stack)
