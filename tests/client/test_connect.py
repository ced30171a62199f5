"""``pam-client connect`` as a process: local program → listener → relay → agent, and how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from processes import free_port

STARTUP = bytes.fromhex("0000000d00030000") + b"user\0"  # enough to be taken for a startup packet

#: A program that uses its environment as psql would: connects, says a startup packet, prints the echo.
TALK = """
import os, socket, sys
s = socket.create_connection((os.environ["PGHOST"], int(os.environ["PGPORT"])))
s.sendall(bytes.fromhex(sys.argv[1]))
s.shutdown(socket.SHUT_WR)
print(s.makefile("rb").read().hex())
"""


@pytest.fixture
def stay(
    environment: dict[str, str], command: Callable[..., list[str]]
) -> Iterator[Callable[..., tuple[subprocess.Popen[str], int]]]:
    """Start ``connect`` without a COMMAND; gives the process and its port, once it listens."""
    started: list[subprocess.Popen[str]] = []

    def stay(*words: str) -> tuple[subprocess.Popen[str], int]:
        process = subprocess.Popen(
            command("connect", *words),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        usage = process.stdout.readline()
        port = re.search(r":(\d+)/", usage)
        return process, int(port[1]) if port else 0

    yield stay
    for process in started:
        process.kill()
        process.communicate(timeout=60)


def exchange(program: socket.socket) -> None:
    """Send what begins a connection and wait for all of its echo."""
    program.settimeout(60)
    program.sendall(STARTUP)
    heard = b""
    while len(heard) < len(STARTUP):
        heard += program.recv(len(STARTUP)) or pytest.fail("it ended")
    assert heard == STARTUP


def end(process: subprocess.Popen[str], number: int = signal.SIGINT) -> tuple[int, str]:
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    return process.returncode, said


def test_command_gets_its_environment_and_gives_its_exit_code(run: Any, connecting: Any, agency: Any) -> None:
    done = run("connect", "prod-db/readonly", "--", sys.executable, "-c", TALK, STARTUP.hex())
    assert (done.stdout.strip(), done.returncode) == (STARTUP.hex(), 0), done.stderr
    assert agency.ended == agency.sessions
    assert [grant.account for grant in agency.grants] == ["prod-db/readonly"]
    code = "import os; e = os.environ; print(e['PGUSER'], e['PGDATABASE'], e.get('PGPASSWORD')); exit(7)"
    done = run("connect", "prod-db/readonly", "--", sys.executable, "-c", code, PGPASSWORD="theirs")
    assert (done.stdout.strip(), done.returncode) == ("readonly app None", 7), done.stderr


def test_command_killed_by_a_signal(run: Any, connecting: Any) -> None:
    done = run(
        "connect", "prod-db/readonly", "--", sys.executable, "-c", "import os; os.kill(os.getpid(), 15)"
    )
    assert done.returncode == 128 + 15


def test_command_that_is_no_program_opens_no_session(run: Any, connecting: Any, agency: Any) -> None:
    done = run("connect", "prod-db/readonly", "--", "/etc/passwd")
    assert done.returncode == 126
    assert "error: cannot run /etc/passwd: permission denied" in done.stderr
    assert agency.sessions == []


def test_command_that_does_not_exist_opens_no_session(run: Any, connecting: Any, agency: Any) -> None:
    done = run("connect", "prod-db/readonly", "--", "no-such-program")
    assert done.returncode == 127
    assert done.stderr == "error: command not found: no-such-program\n"
    assert agency.sessions == []


def test_stays_until_interrupted_and_keeps_its_port(
    stay: Any, connecting: Any, agency: Any, home: Any, keep_port: Any
) -> None:
    keep_port("prod-db/readonly")
    process, port = stay("prod-db/readonly")
    with socket.create_connection(("127.0.0.1", port)) as program:
        exchange(program)
        code, said = end(process)
        assert program.recv(100) == b""  # a clean end
    assert code == 0, said
    assert agency.ended == agency.sessions
    process, again = stay("prod-db/readonly")
    assert again == port
    assert end(process, signal.SIGTERM)[0] == 0


@pytest.mark.parametrize("_time", range(4))  # it is a matter of luck which thread gets it
def test_is_interrupted_at_once_after_having_been_stopped(
    stay: Any, connecting: Any, agency: Any, wait_for: Any, _time: int
) -> None:
    """The kernel then may give the signal to another thread than the main one, which it does not wake."""
    process, _ = stay("prod-db/readonly")
    process.send_signal(signal.SIGSTOP)
    stat = Path(f"/proc/{process.pid}/stat")
    wait_for(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")
    process.send_signal(signal.SIGCONT)
    assert end(process, signal.SIGTERM)[0] == 0
    assert agency.ended == agency.sessions


def test_one_ssh_connection_for_all(stay: Any, connecting: Any, agency: Any) -> None:
    process, port = stay("prod-db/readonly")
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", port)) as program:
            exchange(program)
    assert len(agency.relays[0].transports) == 1
    assert len(agency.grants) == 3
    end(process)


def test_new_ssh_connection_after_a_lost_one(stay: Any, connecting: Any, agency: Any) -> None:
    process, port = stay("prod-db/readonly")
    with socket.create_connection(("127.0.0.1", port)) as program:
        exchange(program)
        agency.relays[0].cut()
        assert program.recv(100) == b""
    with socket.create_connection(("127.0.0.1", port)) as program:
        exchange(program)
    assert len(agency.relays[0].transports) == 2
    code, said = end(process)
    assert code == 0
    assert said.count("the connection through the relay was lost") == 1


def test_next_relay_when_one_is_down(run: Any, connecting: Any, agency: Any) -> None:
    agency.start_relay("r2")
    agency.relays[0].close()
    done = run("connect", "prod-db/readonly", "--", sys.executable, "-c", TALK, STARTUP.hex())
    assert done.stdout.strip() == STARTUP.hex(), done.stderr


def test_all_relays_down(run: Any, connecting: Any, agency: Any) -> None:
    agency.relays[0].close()
    done = run("connect", "prod-db/readonly", "--", sys.executable, "-c", "print('ran')")
    assert done.returncode == 69
    address = agency.relays[0].address()
    where = f"{address['host']}:{address['port']}"
    assert f"error: relay r1 does not answer at {where}: connection refused\nHINT: " in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert agency.ended == agency.sessions


def test_the_port_opens_only_once_a_relay_is_reached(
    command: Any, environment: dict[str, str], connecting: Any, agency: Any
) -> None:
    agency.relays[0].close()
    with socket.create_server(("127.0.0.1", 0)) as relay:
        address = {"name": "r1", "host": "127.0.0.1", "port": relay.getsockname()[1]}
        agency.relays[:] = [SimpleNamespace(address=lambda: address, close=lambda: None)]
        port = free_port()
        words = command("connect", "prod-db/readonly", "--port", str(port))
        with subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True) as process:
            reached, _ = relay.accept()  # and says nothing yet
            with socket.socket() as program:
                assert program.connect_ex(("127.0.0.1", port)) != 0
            reached.close()
            _, said = process.communicate(timeout=60)
    assert process.returncode == 69
    assert "relay" in said


def test_relay_of_a_foreign_ca_is_not_logged_in_to(run: Any, connecting: Any, agency: Any) -> None:
    """Abuse case 1: certificate trust confusion, seen from the client."""
    from pam_common.keys import SigningKey

    agency.relays[0].close()
    agency.relays.clear()
    relay = agency.start_relay("r1", SigningKey.generate())
    done = run("connect", "prod-db/readonly", "--", sys.executable, "-c", "print('ran')")
    assert done.returncode == 1
    assert done.stdout == ""
    assert not any(transport.is_authenticated() for transport in relay.transports)


def test_session_ended_elsewhere(stay: Any, connecting: Any, agency: Any) -> None:
    process, port = stay("prod-db/readonly")
    path = f"/api/v1/sessions/{agency.sessions[-1]}"
    connecting.answers["GET", path] = (200, {"state": "ended", "end_reason": "killed by root: \x1b[31mred"})
    with socket.create_connection(("127.0.0.1", port)) as program:
        exchange(program)
        agency.relays[0].cut()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 3
    assert "the session was ended: killed by root: \\x1b[31mred" in said


def test_granted_anew_when_the_first_connection_comes_late(stay: Any, connecting: Any, agency: Any) -> None:
    agency.grant_lifetime = 5  # less than the client's margin: as good as gone
    process, port = stay("prod-db/readonly")
    first = list(agency.sessions)
    agency.grant_lifetime = 120
    with socket.create_connection(("127.0.0.1", port)) as program:
        exchange(program)
    assert end(process)[0] == 0
    assert agency.grants[-1].session not in first
    assert set(agency.ended) == set(agency.sessions)


@pytest.mark.skipif(shutil.which("psql") is None, reason="psql is not installed")
class TestPsql:
    """What a real PostgreSQL program shows when its connection is refused on the way."""

    def psql(self, port: int, *options: str) -> str:
        url = f"postgresql://readonly@127.0.0.1:{port}/app"
        done = subprocess.run(
            ["psql", url, "-c", "select 1", *options],
            capture_output=True,
            text=True,
            timeout=60,
            env={"PATH": os.environ["PATH"]},
            check=False,
        )
        assert done.returncode == 2
        return done.stderr

    def test_relay_refuses(self, stay: Any, connecting: Any, agency: Any) -> None:
        agency.refuse_channels = "no agent of gateway dc1 is connected"
        process, port = stay("prod-db/readonly")
        for _ in range(2):
            told = self.psql(port)
            assert "FATAL:  the channel was refused: no agent of gateway dc1 is connected" in told
            assert "HINT:  the gateway's agents are down or restarting" in told
        code, said = end(process)
        assert code == 0
        assert said.count("no agent of gateway dc1 is connected") == 1
        assert "`pam-platform agent ls`" in said

    def test_another_reason_of_a_relay_has_no_hint_about_agents(
        self, stay: Any, connecting: Any, agency: Any
    ) -> None:
        agency.refuse_channels = "the session has too many channels"
        _, port = stay("prod-db/readonly")
        assert "HINT" not in self.psql(port)

    def test_agent_refuses_the_grant(self, stay: Any, connecting: Any, agency: Any) -> None:
        agency.refuse_grant = "the session was killed"
        _, port = stay("prod-db/readonly")
        # With SSLRequest first (psql's default), and without.
        assert "FATAL:  the session was killed" in self.psql(port)

    def test_agent_is_not_the_one_that_was_listed(self, stay: Any, connecting: Any, agency: Any) -> None:
        agency.listed = [("agent-1", bytes(32))]
        _, port = stay("prod-db/readonly")
        said = self.psql(port)
        assert "FATAL:  agent agent-1 was not active at this gateway when the session began" in said
        assert "HINT:" in said
        assert agency.grants == []

    def test_statement_about_another_key(self, stay: Any, connecting: Any, agency: Any) -> None:
        agency.statement_key = bytes([7]) * 32
        _, port = stay("prod-db/readonly")
        assert "holds another key" in self.psql(port)
        assert agency.grants == []

    def test_unix_socket_in_a_folder(self, stay: Any, connecting: Any, agency: Any, tmp_path: Path) -> None:
        folder = tmp_path / "pg"
        folder.mkdir(mode=0o700)
        agency.refuse_grant = "not today"
        process, _ = stay("prod-db/readonly", "--socket", str(folder))
        file = folder / ".s.PGSQL.5432"
        assert file.stat().st_mode & 0o777 == 0o600
        done = subprocess.run(
            ["psql", "-h", str(folder), "-U", "me", "-d", "app", "-c", "select 1"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert "FATAL:  not today" in done.stderr
        assert end(process)[0] == 0
        assert not file.exists()


def test_unix_socket_in_an_open_folder_is_refused(run: Any, connecting: Any, tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o755)
    done = run("connect", "prod-db/readonly", "--socket", str(folder), "--", "true")
    assert done.returncode == 1
    assert "is open to other users" in done.stderr


def test_a_web_page_opens_no_channel(stay: Any, connecting: Any, agency: Any) -> None:
    """Abuse case 14: cross-site requests and DNS rebinding reach the listener, and nothing behind it."""
    process, port = stay("prod-db/readonly")
    with socket.create_connection(("127.0.0.1", port)) as browser:
        browser.sendall(b"GET / HTTP/1.1\r\nHost: rebound.example\r\n\r\n")
        browser.settimeout(60)
        with contextlib.suppress(ConnectionResetError):
            assert browser.recv(100) == b""
    code, said = end(process)
    assert code == 0
    assert "what is not a psql connection" in said
    assert agency.grants == []


def test_status_shows_what_runs(stay: Any, run: Any, connecting: Any, agency: Any) -> None:
    connecting.answers["GET", "/api/v1/me"] = (200, {"name": "alice", "roles": ["auditor"]})
    process, port = stay("prod-db/readonly")
    shown = json.loads(run("status", "--json").stdout)
    assert shown["user"] == "alice"
    assert [(note["account"], note["port"]) for note in shown["connects"]] == [("prod-db/readonly", port)]
    process.kill()
    process.wait()
    assert json.loads(run("status", "--json").stdout)["connects"] == []


def test_terminal_shows_the_time_left(
    environment: dict[str, str], command: Callable[..., list[str]], connecting: Any, agency: Any
) -> None:
    words = command("connect", "prod-db/readonly")
    pid, fd = pty.fork()
    if pid == 0:
        os.execve(words[0], words, environment | {"TERM": "xterm", "COLUMNS": "120"})
    seen = b""
    try:
        while b"left  Ctrl-C ends" not in seen:
            seen += os.read(fd, 4096)
        os.write(fd, b"\x03")
        with contextlib.suppress(OSError):  # EIO at the terminal's end
            while data := os.read(fd, 4096):
                seen += data
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        os.close(fd)
    assert re.search(rb"prod-db/readonly  0 connections  \d+m \d\ds left", seen)
    assert b"ending prod-db/readonly" in seen
    assert agency.ended == agency.sessions


def test_session_time_is_over_and_no_other_is_begun(stay: Any, connecting: Any, agency: Any) -> None:
    agency.duration = agency.certificate_lifetime = agency.grant_lifetime = 9  # below the client's margin
    process, port = stay("prod-db/readonly")
    with socket.create_connection(("127.0.0.1", port)) as program:
        exchange(program)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 3
    assert "the session's time is over" in said
    assert len(agency.sessions) == 1
