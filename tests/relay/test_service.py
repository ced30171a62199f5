"""``pam-relay`` as the process that hosts run: enrol, run, status, revocation, drain."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys

import pytest

from pam_common import fast_ssh
from pam_common.errors import RefusedError
from pam_common.keys import new_session_id


def command(config, *words: str) -> list[str]:
    return [sys.executable, "-m", "pam_relay", "--config", str(config.path), *words]


def run(config, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(config, *words), capture_output=True, text=True, timeout=120)


@pytest.fixture
def process(world, config, platform, until_up, tmp_path):
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text("good\n")
    done = run(config, "enrol", "--token-file", str(token), "--name", "r1")
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "log").open("w")
    started = subprocess.Popen(command(config, "run"), stderr=log)
    world.address = config.listen
    until_up(started)
    yield started
    started.kill()
    started.wait(60)
    log.close()


def test_from_enrolment_to_drained_end(world, config, platform, process, wait_for, tmp_path) -> None:
    world.agent()
    session = new_session_id()
    client = world.client()
    stream = fast_ssh.open_direct(client, "dc1")
    revoked = fast_ssh.open_direct(world.client(session), "dc1")

    status = json.loads(run(config, "status", "--json").stdout)
    assert (status["relay"], status["sessions"], status["platform"]) == ("r1", 2, "ok")
    assert "agent dc1-a, 2 channels" in run(config, "status").stdout

    # A revocation arrives by the poll and cuts what is open.
    platform.serial, platform.revoked_sessions = 2, [session]
    with pytest.raises(ConnectionError):
        revoked.recv(10)

    # SIGTERM: nothing new, what is open goes on, and with its end the process ends.
    process.send_signal(signal.SIGTERM)
    wait_for(lambda: not reachable(config.listen))
    with pytest.raises(RefusedError, match="stopping"):
        fast_ssh.open_direct(client, "dc1")
    stream.sendall(b"last words")
    assert stream.recv(100) == b"last words"
    assert process.poll() is None
    stream.close()
    assert process.wait(60) == 0

    log = (tmp_path / "log").read_text()
    assert f"session={session}" in log
    assert "Traceback" not in log
    assert not re.search(r"\bgood\b", log)  # the token; a random id may hold these letters
    for line in log.splitlines():
        assert line.startswith("ts=")


def test_a_relay_starts_and_serves_while_its_platform_is_away(
    world, config, platform, process, until_up, wait_for
) -> None:
    process.terminate()
    assert process.wait(60) == 0
    assert not config.status_socket.exists()
    platform.down = True
    again = subprocess.Popen(command(config, "run"), stderr=subprocess.DEVNULL)
    try:
        until_up(again)
        world.agent()
        stream = fast_ssh.open_direct(world.client(), "dc1")
        stream.sendall(b"hello")
        assert stream.recv(100) == b"hello"
        stream.close()

        def said() -> str:
            done = run(config, "status", "--json")
            return str(json.loads(done.stdout)["platform"]) if done.returncode == 0 else ""

        wait_for(lambda: "away" in said())
    finally:
        again.terminate()
        assert again.wait(60) == 0


def test_commands_say_what_is_wrong(config, platform) -> None:
    done = run(config, "run")
    assert done.returncode == 1
    assert "not enrolled" in done.stderr
    assert "HINT: run `pam-relay enrol` first." in done.stderr
    assert run(config, "status").returncode == 69
    assert "not enrolled yet" in run(config, "check-config").stdout
    config.path.write_text("listen: 1\n")
    done = run(config, "check-config")
    assert done.returncode == 78
    assert "relay.yml:1" in done.stderr


def reachable(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=1).close()
    except OSError:
        return False
    return True


def test_the_token_may_come_by_standard_input(config, platform) -> None:
    words = command(config, "enrol", "--token-file", "-", "--name", "r1")
    empty = subprocess.run(words, input="x" * 4097, capture_output=True, text=True, timeout=120)
    assert empty.returncode == 1
    assert "holds no enrolment token" in empty.stderr
    done = subprocess.run(words, input="good\n", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
