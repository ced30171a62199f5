"""A COMMAND runs as under a shell: signals, exit codes, environment."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pam_client import child
from pam_client.child import CommandNotExecutableError, CommandNotFoundError
from pam_client.launch import LAUNCHES, POSTGRES, Place, launch_for
from pam_common.errors import PamError

#: With SIGHUP as it is by default, even where the tests run under nohup.
WRAPPER = """
import signal, sys
from pam_client import child
signal.signal(signal.SIGHUP, signal.SIG_DFL)
code = child.run(sys.argv[1:], __import__("os").environ)
print("wrapper ends with", code, flush=True)
sys.exit(code)
"""
#: Says that it is ready, then tells of the signal it gets and ends with 42.
TELL = """
import signal, sys, time
def got(number, frame):
    print("child got", signal.Signals(number).name, flush=True)
    sys.exit(42)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, got)
print("ready", flush=True)
while True:
    time.sleep(0.1)  # not pause(), which a signal that came just before does not end
"""


def read_until(fd: int, text: str) -> str:
    seen = ""
    while text not in seen:
        with contextlib.suppress(OSError):  # EIO: the terminal's last user has gone
            data = os.read(fd, 4096)
            if data:
                seen += data.decode()
                continue
        raise AssertionError(f"{text!r} did not come: {seen!r}")
    return seen


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """The wrapper with TELL, in the foreground of a terminal of their own: (pid, terminal)."""
    pid, fd = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", WRAPPER, sys.executable, "-c", TELL])
    yield pid, fd
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)
    os.close(fd)


def test_ctrl_c_goes_to_the_command_once(terminal: tuple[int, int]) -> None:
    pid, fd = terminal
    read_until(fd, "ready")
    os.write(fd, b"\x03")
    said = read_until(fd, "wrapper ends with 42")
    assert said.count("child got SIGINT") == 1
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 42


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_sent_to_the_wrapper_alone_are_passed_on(number: signal.Signals) -> None:
    # A session of its own: no terminal that would deliver SIGINT to both.
    process = subprocess.Popen(
        [sys.executable, "-c", WRAPPER, sys.executable, "-c", TELL],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert said == f"child got {number.name}\nwrapper ends with 42\n"
    assert process.returncode == 42


def test_ignored_signals_stay_ignored() -> None:
    code = "import signal; print(repr(signal.getsignal(signal.SIGHUP)))"
    wrapper = WRAPPER.replace("signal.signal(signal.SIGHUP, signal.SIG_DFL)\n", "")
    done = subprocess.run(
        ["nohup", sys.executable, "-c", wrapper, sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "SIG_IGN" in done.stdout


def test_dispositions_are_restored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert child.run([sys.executable, "-c", "import signal; print(signal.getsignal(signal.SIGINT))"], {}) == 0
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_cannot_be_run() -> None:
    with pytest.raises(CommandNotFoundError) as caught:
        child.find(["no-such-program"])
    assert caught.value.exit_code == 127
    with pytest.raises(CommandNotExecutableError) as refused:
        child.run(["/"], {})
    assert refused.value.exit_code == 126


def test_what_is_there_and_is_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a shell says it, and before a session is opened for it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "notes").touch(0o600)
    for name in ("/etc/passwd", "/", str(tmp_path / "notes"), "notes"):
        with pytest.raises(CommandNotExecutableError, match="permission denied") as refused:
            child.find([name])
        assert refused.value.exit_code == 126
    for name in (str(tmp_path / "none"), "none", ""):
        with pytest.raises(CommandNotFoundError):
            child.find([name])
    (tmp_path / "folder").mkdir()
    with pytest.raises(CommandNotFoundError):
        child.find(["folder"])


class TestLaunch:
    place = Place("127.0.0.1", 42001, "readonly", "app")

    def test_environment_of_a_postgres_program(self) -> None:
        inherited = {
            "PATH": "/bin",
            "PGPASSWORD": "theirs",
            "PGSERVICE": "other",
            "PGHOSTADDR": "10.0.0.9",
            "PGSSLROOTCERT": "system",
            "PGOPTIONS": "-c statement_timeout=5s",
            "PGHOST": "elsewhere",
        }
        assert POSTGRES.environment(self.place, inherited) == {
            "PATH": "/bin",
            "PGOPTIONS": "-c statement_timeout=5s",
            "PGHOST": "127.0.0.1",
            "PGPORT": "42001",
            "PGUSER": "readonly",
            "PGDATABASE": "app",
            "PGSSLMODE": "disable",
            "PGGSSENCMODE": "disable",
        }

    def test_no_database_is_not_the_callers(self) -> None:
        place = Place("127.0.0.1", 42001, "readonly", None)
        assert "PGDATABASE" not in POSTGRES.environment(place, {"PGDATABASE": "theirs"})

    @pytest.mark.parametrize(
        ("place", "usage"),
        [
            (place, "psql postgresql://readonly@127.0.0.1:42001/app"),
            (Place("127.0.0.1", 1, "a b", "x/?y"), "psql postgresql://a%20b@127.0.0.1:1/x%2F%3Fy"),
            (Place("/run/my pg", 5432, "me", "it's"), "psql -h '/run/my pg' -p 5432 -U me 'it'\\''s'"),
            (Place("/run/pg", 5432, "me", None), "psql -h /run/pg -p 5432 -U me DATABASE"),
        ],
    )
    def test_usage_line(self, place: Place, usage: str) -> None:
        assert POSTGRES.usage(place) == usage

    @pytest.mark.parametrize("name", ["host=10.0.0.9", "postgresql://10.0.0.9/app", "a=b"])
    def test_database_that_would_lead_elsewhere(self, name: str) -> None:
        """Abuse cases 8 and 25: pgbench and vacuumdb read PGDATABASE, psql its argument as such."""
        with pytest.raises(PamError, match="connection string"):
            POSTGRES.environment(Place("127.0.0.1", 42001, "readonly", name), {})
        with pytest.raises(PamError, match="connection string"):
            POSTGRES.usage(Place("/run/pg", 5432, "me", name))

    def test_socket_names(self) -> None:
        assert POSTGRES.socket_port(POSTGRES.socket_name(5432)) == 5432
        for name in ("x.sock", ".s.PGSQL.", ".s.PGSQL.0", ".s.PGSQL.x", ".s.PGSQL.70000"):
            assert POSTGRES.socket_port(name) is None

    def test_unknown_protocol(self) -> None:
        assert {"postgres", "ssh"} <= set(LAUNCHES)
        with pytest.raises(PamError, match='does not know the protocol "gopher"'):
            launch_for("gopher")
