"""Abuse of what is kept: recordings of others, recordings that were changed, secrets on a disk."""

from __future__ import annotations

import contextlib
import itertools
import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def bob(stack):
    person = stack.person("bob")
    person.login()
    return person


@pytest.fixture(scope="module")
def session(stack, alice) -> str:
    """A session of alice's."""
    alice.run("connect", "demo-db/owner", "--", "psql", "-Xc", "select 'only for alice'")
    found: list[dict[str, Any]] = json.loads(alice.run("sessions", "ls", "--json").stdout)
    return str(found[0]["id"])


def test_abuse_18_recordings_are_not_for_those_without_the_right(stack, alice, bob, session, replay) -> None:
    assert any("only for alice" in event.get("sql", "") for event in replay(alice, session))
    done = bob.run("replay", session, check=False)
    assert done.returncode == 1
    assert "error: " in done.stderr
    assert "only for alice" not in done.stdout
    browser = bob.web()
    for path in (
        f"sessions/{session}",
        *(f"sessions/{session}/{end}" for end in ("events", "verify", "parts/1/raw")),
    ):
        answer = browser.get(f"{stack.url}/api/v1/{path}", timeout=90)
        assert answer.status_code == 404, path
        assert "only for alice" not in answer.text
    assert browser.get(f"{stack.url}/sessions/{session}", timeout=90).status_code in (403, 404)


def test_abuse_18_a_recording_that_was_changed_is_said_to_be(stack, alice, session, replay) -> None:
    replay(alice, session)
    (file,) = (stack.folder / "platform" / "recordings").glob(f"*/{session}.*")
    whole = file.read_bytes()
    broken = {
        "altered": whole[:-200] + bytes([whole[-200] ^ 1]) + whole[-199:],
        "truncated": whole[:-300],
        "unsigned": whole[: whole.rindex(b"{")],
    }
    try:
        for what, content in broken.items():
            file.write_bytes(content)
            done = alice.run("replay", session, "--verify", check=False)
            assert done.returncode == 4, what
            assert "THE RECORDING IS NOT VERIFIED" in done.stdout, what
            with pytest.raises(RuntimeError, match=session):
                stack.platform("recordings", "verify")
    finally:
        file.write_bytes(whole)
    stack.platform("recordings", "verify")


def test_abuse_19_no_secret_is_left_on_a_disk_or_in_a_process(stack, alice, connect, replay) -> None:
    """The account's password, of which the test's own secrets folder holds the only copy."""
    passwords = [path.read_bytes() for path in (stack.folder / "secrets").glob("demo-db-*")]
    assert len(passwords) == 2
    with connect(alice) as connected, connected.open() as connection:
        connection.execute("select 1")
        for path in itertools.chain(files(stack.folder), memory_outside(stack, connected)):
            content = b""
            with contextlib.suppress(FileNotFoundError):  # moved on or deleted meanwhile
                content = path.read_bytes()
            assert not any(password in content for password in passwords), path


def files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and path.parent.name != "secrets")


def memory_outside(stack, connected) -> Iterator[Path]:
    """What other processes of the machine may see of ours."""
    for process in (*stack.processes.values(), connected.process):
        for name in ("cmdline", "environ"):
            yield Path(f"/proc/{process.pid}/{name}")


def test_abuse_19_no_daemon_leaves_a_core(stack) -> None:
    for process in stack.processes.values():
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        (line,) = [line for line in limits.splitlines() if line.startswith("Max core file size")]
        assert line.split()[4:6] == ["0", "0"], process.name


def test_abuse_19_everything_kept_is_for_its_owner_alone(stack) -> None:
    for name in ("platform", "relay", *stack.agents):
        for path in (stack.folder / name).rglob("*"):
            try:
                mode = path.lstat().st_mode
            except FileNotFoundError:  # moved on or deleted meanwhile
                continue
            assert not mode & 0o077 or stat.S_ISLNK(mode), f"{path}: {mode:o}"
