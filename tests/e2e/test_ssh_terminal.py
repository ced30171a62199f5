"""A shell as a person uses it, in a real terminal on a real sshd; and the same screens from its recording."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import wait_for
from ssh_server import SshServer, keygen
from stack import Person, Stack
from tmux import Replayed, Tmux

#: Not in the recording, and unlike anything that is.
TYPED_SECRET = "xyzzy-plugh-27"
#: A screen is looked at in the middle of a time of twice this, and as much more as the clocks of terminal and
#: recording may differ, in which nothing moves.
STILL = 1.5

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("tmux", "vi", "top"))), reason="needs tmux, vim-tiny and procps"
)


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    server = SshServer(tmp_path_factory.mktemp("sshd"))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, sshd: SshServer) -> Iterator[Stack]:
    with Stack(tmp_path_factory.mktemp("stack")) as running:
        running.resources.append(
            {
                "name": "web-02",
                "protocol": "ssh",
                "gateway": "dc1",
                "host": "127.0.0.1",
                "port": sshd.port,
                "ssh": {"host_keys": sshd.host_keys},
                "accounts": [
                    {"name": "deploy", "user": sshd.user, "private_key": {"file": str(sshd.key)},
                     "ssh": {"allow": ["shell", "exec"], "env": ["LANG", "LC_*"]}}
                ],
            }
        )  # fmt: skip
        running.start()
        yield running


@pytest.fixture
def terminal(alice: Person) -> Iterator[Tmux]:
    """``pam-client connect web-02`` with a bash that shows ``demo> ``."""
    running = Tmux(alice.command("connect", "web-02"), alice.environment())
    try:
        # With quotes that the prompt has not: else what is typed would be taken for it.
        running.type("exec env PS1='demo''> ' HISTFILE= TERM=xterm-256color bash --norc --noprofile", "Enter")
        running.wait("\ndemo>\n")
        yield running
    finally:
        running.close()


def leave(terminal: Tmux) -> None:
    terminal.type("exit", "Enter")
    wait_for(terminal.ended, "the end of the shell")


def exported(person: Person, session: str, file: Path) -> Replayed:
    person.run("replay", session, "--export", "asciicast", "-o", str(file))
    return Replayed(file)


class Watched:
    """Screens of a terminal with the seconds since something was first seen on it."""

    def __init__(self, terminal: Tmux, anchor: str) -> None:
        self.anchor = anchor
        self.screens: list[tuple[float, list[str]]] = []
        self._terminal = terminal
        typed = time.monotonic()
        terminal.type(f"clear; echo {anchor[:3]}''{anchor[3:]}", "Enter")
        terminal.wait(anchor)
        self._began = time.monotonic()
        # It was put out at some time between the two.
        self._still = STILL + self._began - typed

    def look(self, text: str) -> None:
        """Take the screen once it holds ``text``, in the middle of a time in which it stays the same."""
        self._terminal.wait(text)

        def still() -> bool:
            before = self._terminal.screen()
            time.sleep(self._still)  # the time that is measured, not one to wait for anything
            middle, shown = time.monotonic(), self._terminal.screen()
            time.sleep(self._still)
            if not before == shown == self._terminal.screen():
                return False
            self.screens.append((middle - self._began, [line for line in shown if line]))
            return True

        wait_for(still, "a still screen", timeout=120)


def test_vi_top_jobs_and_a_replay_that_shows_the_same_at_the_same_times(
    terminal: Tmux, alice: Person, replay: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    file, job = tmp_path / "written-by-vi", tmp_path / "job"
    job.write_text("trap 'echo going on' CONT; echo begun; while true; do sleep 0.1; done")
    watched = Watched(terminal, "anchor-4711")
    terminal.type(f"vi -u NONE {file}", "Enter")
    terminal.wait("[New")  # what vi says, not the typed line with the file's name
    terminal.type("igrüße, 世界", "Enter", "second line", "Escape", "k")
    watched.look("second line")
    terminal.type(":wq", "Enter")
    text = "grüße, 世界\nsecond line\n".encode()
    wait_for(lambda: file.exists() and file.read_bytes() == text, "vi to write")
    terminal.wait("\ndemo>\n")
    terminal.type("clear; top -d 600", "Enter")
    watched.look("PID USER")
    terminal.type("q")
    terminal.wait("\ndemo>")  # top forgets what is typed while it ends
    terminal.type(f"clear; sh {job}", "Enter")
    terminal.wait("begun")
    terminal.press("C-z")
    terminal.wait("Stopped")
    terminal.type("jobs; fg", "Enter")
    terminal.wait("going on")
    terminal.press("C-c")
    terminal.type("echo code=$?", "Enter")
    terminal.wait("code=130")
    terminal.type("sleep 601 & kill %1; wait %1; echo gone=$?", "Enter")
    watched.look("gone=143")
    terminal.type(r"clear; printf 'one\ntwo\033[5;10Hfive\033[A up\033[31m red'; echo; echo last", "Enter")
    watched.look("last     five")
    terminal.type("clear; echo and now nothing", "Enter")
    watched.look("and now nothing\ndemo>")
    leave(terminal)
    session = alice.newest()
    replay(alice, session)
    shown = exported(alice, session, tmp_path / "shell.cast")
    began = shown.when(watched.anchor)
    assert len(watched.screens) == 5
    for at, screen in watched.screens:
        assert shown.screen(began + at) == screen


def test_a_terminal_that_changes_its_size(
    terminal: Tmux, alice: Person, replay: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    terminal.type("stty size; printf 'täst 世界 %s\\n' $((6*7))", "Enter")
    terminal.wait("30 100")
    terminal.wait("täst 世界 42")
    terminal.do("resize-window", "-x", "90", "-y", "25")

    def follows() -> bool:
        # Asked for again: OpenSSH can take note of SIGWINCH as late as with the next key.
        terminal.type("clear; stty size", "Enter")
        return "25 90" in "\n".join(terminal.screen())

    wait_for(follows, "the new size")
    leave(terminal)
    session = alice.newest()
    events = replay(alice, session)
    assert {"shell", "o", "resize", "exit"} <= {event["kind"] for event in events}
    shown = exported(alice, session, tmp_path / "shell.cast")
    assert ["r", "90x25"] in [[kind, data] for _, kind, data in shown.events]


def test_what_is_typed_unseen_is_not_recorded(
    terminal: Tmux, alice: Person, replay: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    """ssh-keygen asks as sudo does: by turning off the terminal's echo."""
    public = keygen(tmp_path / "locked", passphrase=TYPED_SECRET)
    terminal.type(f"ssh-keygen -yf {tmp_path / 'locked'}", "Enter")
    terminal.wait("Enter passphrase")
    terminal.type(TYPED_SECRET, "Enter")
    terminal.wait("ssh-ed25519 ")
    terminal.type("read -s -p 'un''seen: ' answer; echo count=$(echo got $answer | wc -c)", "Enter")
    terminal.wait("unseen:")  # the echo is off by then, and not before
    terminal.type(TYPED_SECRET, "Enter")
    length = len(f"got {TYPED_SECRET}\n")
    terminal.wait(f"count={length}")
    leave(terminal)
    events = replay(alice, alice.newest())
    assert public.split()[1][:40] in "".join(event["data"] for event in events if event["kind"] == "o")
    assert TYPED_SECRET not in json.dumps(events)


def test_a_killed_shell_has_its_exit_code_and_its_replay_stays_on_the_screen(
    alice: Person, replay: Callable[..., list[dict[str, Any]]]
) -> None:
    def in_terminal(*words: str) -> Tmux:
        command = shlex.join(alice.command(*words))
        return Tmux(["sh", "-c", f"{command}; echo code=$?; exec cat"], alice.environment())

    with contextlib.closing(in_terminal("connect", "web-02")) as running:
        running.type("echo sh''own", "Enter")
        running.wait("\nshown")
        session = alice.newest()
        alice.run("sessions", "kill", session)
        running.wait("code=3")
        assert "the session was ended: killed by alice" in "\n".join(running.screen())
    replay(alice, session)
    with contextlib.closing(in_terminal("replay", session)) as played:
        played.wait("code=0")
        screen = played.screen()
        assert "shown" in screen[: screen.index("the recording is verified")]


@pytest.mark.skipif(not shutil.which("asciinema"), reason="needs asciinema")
def test_asciinema_plays_it(
    terminal: Tmux, alice: Person, replay: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    terminal.type("echo to be $((40+2)) played", "Enter")
    terminal.wait("to be 42 played")
    leave(terminal)
    session = alice.newest()
    replay(alice, session)
    exported(alice, session, tmp_path / "shell.cast")
    played = subprocess.run(
        ["script", "-qec", f"asciinema play -s 100 {tmp_path}/shell.cast", "/dev/null"],
        env=alice.environment() | {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "to be 42 played" in played.stdout, played.stderr
