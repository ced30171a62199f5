"""SSH through the whole chain: the stock OpenSSH client, a real sshd, a session's life and recording."""

from __future__ import annotations

import contextlib
import json
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from memory import in_files
from patience import Metronome
from processes import Process, wait_for
from ssh_server import SshServer
from stack import BIN, Person, Stack


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    server = SshServer(tmp_path_factory.mktemp("sshd"))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, sshd: SshServer) -> Iterator[Stack]:
    with Stack(tmp_path_factory.mktemp("stack")) as running:
        account = {"user": sshd.user, "private_key": {"file": str(sshd.key)}}
        running.resources.append(
            {
                "name": "web-01",
                "protocol": "ssh",
                "gateway": "dc1",
                "host": "127.0.0.1",
                "port": sshd.port,
                "ssh": {"host_keys": sshd.host_keys},
                "accounts": [
                    {"name": "deploy", **account},
                    {"name": "files", **account, "ssh": {"allow": ["sftp"]}},
                ],
            }
        )
        running.start()
        yield running


@pytest.fixture(scope="module")
def alice(stack: Stack) -> Person:
    person = stack.person("alice")
    person.login()
    return person


def ssh(person: Person, *words: str, account: str = "web-01/deploy") -> list[str]:
    """The stock client with the settings that a person would have."""
    config = person.home / "ssh_config"
    if not config.exists():
        text = f"Host *\n  ProxyCommand {shlex.join([str(BIN / 'pam-client'), 'ssh-proxy'])} %n\n"
        text += "  HostKeyAlias dc1.pam\n  StrictHostKeyChecking yes\n  GlobalKnownHostsFile /dev/null\n"
        text += (
            f"  UserKnownHostsFile {person.home}/known_hosts_test\n  IdentityAgent none\n  BatchMode yes\n"
        )
        config.write_text(text)
        (person.home / "known_hosts_test").write_text(_authorities(person))
    return ["ssh", "-F", str(config), account, *words]


def _authorities(person: Person) -> str:
    """What the platform says of the interceptor-host CA, as lines of known_hosts."""
    person.run("resources", check=False)
    made = [path for path in person.home.rglob("*known_hosts*") if path.name != "known_hosts_test"]
    if not made:  # the proxy writes it before the first byte
        command = [str(BIN / "pam-client"), "ssh-proxy", "web-01/deploy"]
        subprocess.run(command, env=person.environment(), stdin=subprocess.DEVNULL, check=False, timeout=60)
        made = [path for path in person.home.rglob("*known_hosts*") if path.name != "known_hosts_test"]
    return made[0].read_text()


def run(person: Person, *words: str, account: str = "web-01/deploy", **options: Any) -> Any:
    options.setdefault("stdin", subprocess.DEVNULL)
    return subprocess.run(
        ssh(person, *words, account=account),
        env=person.environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


@contextlib.contextmanager
def asleep(person: Person, tmp_path: Path) -> Iterator[tuple[Process, str]]:
    """A command that does not end by itself, and its session."""
    command = ssh(person, "echo started; sleep 1000")
    process = Process("ssh", command, tmp_path / "ssh.log", env=person.environment())
    try:
        wait_for(lambda: "started" in process.tail(), "the command")
        yield process, person.newest()
    finally:
        process.stop()


def test_a_command_runs_and_is_recorded(alice: Person, replay: Callable[..., list[dict[str, Any]]]) -> None:
    done = run(alice, "echo marker-$((40+2)); exit 3")
    assert (done.stdout, done.returncode) == ("marker-42\n", 3), done.stderr
    events = replay(alice, alice.newest())
    kinds = [event["kind"] for event in events]
    assert kinds.index("ssh_login") < kinds.index("exec") < kinds.index("exit") < kinds.index("end")
    assert any(event["kind"] == "data" and "marker-42" in event["data"] for event in events)


def test_the_host_key_is_certified_for_the_session_only(alice: Person) -> None:
    done = subprocess.run(
        [*ssh(alice)[:3], "-v", "web-01/deploy", "true"],
        env=alice.environment(), capture_output=True, text=True, timeout=120, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert "matches the ED25519-CERT host certificate" in done.stderr


def test_an_account_for_files_runs_nothing(alice: Person) -> None:
    done = run(alice, "true", account="web-01/files")
    assert done.returncode == 255


def test_the_secret_of_the_account_is_nowhere_in_the_recording(
    alice: Person, sshd: SshServer, replay: Callable[..., list[dict[str, Any]]]
) -> None:
    assert run(alice, "true").returncode == 0
    text = json.dumps(replay(alice, alice.newest()))
    key = "".join(sshd.key.read_text().splitlines()[1:-1])
    assert "PRIVATE KEY" not in text
    assert key[40:80] not in text


def test_a_kill_cuts_within_a_second_and_says_so(alice: Person, tmp_path: Path) -> None:
    with asleep(alice, tmp_path) as (process, session):
        alice.run("sessions", "kill", session)
        with Metronome() as beat:
            acted = time.monotonic()
            wait_for(lambda: not process.running(), "the end of ssh")
            # One for the agent, one for ssh and its proxy under load.
            assert time.monotonic() - acted - beat.lost() < 2.0
        assert "killed" in process.tail()


@contextlib.contextmanager
def policy(stack: Stack, **limits: str) -> Iterator[None]:
    stack.policy |= limits
    stack.apply()
    try:
        yield
    finally:
        for name in limits:
            stack.policy.pop(name)
        stack.apply()


def test_the_idle_limit_cuts_within_a_second_and_says_so(stack: Stack, alice: Person, tmp_path: Path) -> None:
    with policy(stack, idle_limit="20s"), Metronome() as beat, asleep(alice, tmp_path) as (process, _):
        seen, lost = time.monotonic(), beat.lost()
        wait_for(lambda: not process.running(), "the end of ssh", timeout=120)
        assert time.monotonic() - seen - (beat.lost() - lost) < 20 + 2.0
        assert "idle" in process.tail()


def test_the_end_of_its_time_cuts_within_a_second_and_says_so(
    stack: Stack, alice: Person, tmp_path: Path
) -> None:
    with (
        policy(stack, max_duration="30s"),  # of which opening takes some on a machine under load
        Metronome() as beat,
        asleep(alice, tmp_path) as (process, session),
    ):
        row = next(
            row for row in json.loads(alice.run("sessions", "ls", "--json").stdout) if row["id"] == session
        )
        wait_for(lambda: not process.running(), "the end of ssh", timeout=120)
        late = time.time() - row["session_end"]
        assert late > -1.0
        assert late - beat.lost() < 2.0
        assert "its time is over" in process.tail()


@pytest.fixture
def settings(stack: Stack) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Gives web-01 other settings of SSH, until the end of the test."""
    resource = stack.resources[0]
    before = resource["ssh"]

    def change(settings: dict[str, Any]) -> None:
        resource["ssh"] = settings
        stack.apply()

    yield change
    change(before)


@pytest.fixture(scope="module")
def other_keys(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Host keys of another server."""
    other = SshServer(tmp_path_factory.mktemp("other"))
    other.stop()
    return other.host_keys


def test_a_changed_host_key_is_refused_in_the_users_terminal(
    stack: Stack, alice: Person, settings: Callable[..., None], other_keys: list[str]
) -> None:
    settings({"host_keys": other_keys})
    done = run(alice, "true")
    assert done.returncode == 255
    assert "another host key" in done.stderr
    assert "SHA256:" in done.stderr
    event = _alarm(stack, alice)
    assert "another host key than it should: SHA256:" in event["details"]["reason"]


def test_a_changed_host_key_of_a_jump_host_is_refused_like_the_targets(
    stack: Stack, alice: Person, sshd: SshServer, settings: Callable[..., None], other_keys: list[str]
) -> None:
    # It jumps to itself: the agent's file allows no other port.
    jump = {"host": "127.0.0.1", "port": sshd.port, "user": sshd.user, "private_key": {"file": str(sshd.key)}}
    settings({"host_keys": sshd.host_keys, "jump": {**jump, "host_keys": sshd.host_keys}})
    done = run(alice, "echo jumped")
    assert (done.stdout, done.returncode) == ("jumped\n", 0), done.stderr
    settings({"host_keys": sshd.host_keys, "jump": {**jump, "host_keys": other_keys}})
    done = run(alice, "true")
    words = f"the jump host 127.0.0.1:{sshd.port} shows another host key than it should"
    assert done.returncode == 255
    assert words in done.stderr
    assert _alarm(stack, alice)["details"]["reason"] == words


def _alarm(stack: Stack, person: Person) -> dict[str, Any]:
    """The one alarm about the person's newest session, as an auditor sees it."""
    session, auditor = person.newest(), stack.person("auditor").web()

    def found() -> list[dict[str, Any]]:
        events = auditor.get(f"{stack.url}/api/v1/audit", timeout=60).json()["events"]
        return [event for event in events if (event["action"], event["object"]) == ("session.alarm", session)]

    wait_for(lambda: bool(found()), "the event in the audit trail")
    (event,) = found()
    details = event["details"]
    assert (event["actor"], event["outcome"]) == ("agent dc1-a", "wrong target")
    assert (details["user"], details["account"]) == (person.name, "web-01/deploy")
    return event


def test_an_agent_that_is_killed_loses_nothing_that_was_seen(
    stack: Stack, alice: Person, tmp_path: Path, replay: Callable[..., list[dict[str, Any]]]
) -> None:
    with asleep(alice, tmp_path) as (process, session):
        stack.processes["dc1-a"].kill()
        stack.start_agent("dc1-a")
        wait_for(lambda: not process.running(), "the end of ssh")
    events = replay(alice, session, timeout=180)
    assert any(event["kind"] == "data" and "started" in event["data"] for event in events)


def test_nobody_leaves_a_key_behind(stack: Stack) -> None:
    """Neither the session's keys nor the account's are in any file of the agent."""
    assert in_files(stack.folder / "dc1-a", {"a key": b"OPENSSH PRIVATE KEY"}) == {}
