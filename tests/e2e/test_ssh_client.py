"""Linux servers as people use them: a real sshd, the real client programs, unchanged, through everything."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyte
import pytest
from processes import free_port, wait_for
from ssh_server import SshServer
from stack import BIN, Person, Stack

#: Not in the recording, and unlike anything that is.
TYPED_SECRET = "xyzzy-plugh-27"


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    folder = tmp_path_factory.mktemp("sshd")
    server = SshServer(folder, f"TrustedUserCAKeys {folder}/user_ca.pub", kinds=("ed25519", "rsa"))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, sshd: SshServer) -> Iterator[Stack]:
    """The server as web-01, of which nobody knows the host keys yet."""
    with Stack(tmp_path_factory.mktemp("stack")) as running:
        place = {"protocol": "ssh", "gateway": "dc1", "host": "127.0.0.1", "port": sshd.port}
        by_key = {"user": sshd.user, "private_key": {"file": str(sshd.key)}}
        by_certificate = {"user": sshd.user, "certificate": {"principals": [sshd.user]}}
        accounts = [
            {
                "name": "deploy",
                **by_key,
                "ssh": {"allow": ["shell", "exec", "sftp"], "env": ["LANG", "LC_*"]},
            },
            {"name": "cert", **by_certificate},
        ]
        running.resources.append({"name": "web-01", **place, "accounts": accounts})
        single = [{"name": "deploy", **by_key}]
        running.resources.append(
            {"name": "web-02", **place, "ssh": {"host_keys": sshd.host_keys[:1]}, "accounts": single}
        )
        running.start()
        (sshd.folder / "user_ca.pub").write_text(running.platform("resource", "user-ca", "dc1"))
        yield running


@pytest.fixture(scope="module")
def alice(stack: Stack) -> Person:
    person = stack.person("alice")
    person.login()
    return person


@pytest.fixture(scope="module")
def config(alice: Person) -> Path:
    """What ``ssh-config --write`` wrote."""
    assert "Include" in alice.run("ssh-config", "--write").stdout
    return alice.home / "ssh/config"


@pytest.fixture
def program(alice: Person, config: Path) -> Callable[..., Any]:
    """Runs one of OpenSSH's programs, or one that calls ssh, to its end."""

    def run(*words: str, **options: Any) -> Any:
        options = {"stdin": subprocess.DEVNULL, "text": True, "check": True, "timeout": 150, **options}
        if "input" in options:
            options.pop("stdin")
        env = alice.environment() | {"GIT_SSH_COMMAND": f"ssh -F {config}", "RSYNC_RSH": f"ssh -F {config}"}
        try:
            return subprocess.run(
                list(words), env=env | options.pop("env", {}), capture_output=True, **options
            )
        except subprocess.CalledProcessError as error:
            raise AssertionError(f"{error}\n{error.stdout}\n{error.stderr}\n{alice.stack.logs()}") from None

    return run


def newest(person: Person) -> str:
    return str(json.loads(person.run("sessions", "ls", "--json").stdout)[0]["id"])


# --- who the server is ---------------------------------------------------------------------------------


def test_nobody_gets_in_before_the_keys_are_accepted(stack: Stack, alice: Person, sshd: SshServer) -> None:
    done = alice.run("connect", "web-01/deploy", "--", "echo reached", check=False)
    assert done.returncode != 0
    assert "no host key of web-01 is known" in done.stderr
    assert "pam-platform resource scan web-01" in done.stderr
    listed = [_fingerprint(sshd, kind) for kind in ("ed25519", "rsa")]
    shown = json.loads(stack.platform("resource", "scan", "web-01", "--json"))
    assert {key["fingerprint"] for key in shown["keys"]} == set(listed)
    assert alice.run("connect", "web-01/deploy", "--", "true", check=False).returncode != 0
    words = [word for one in listed for word in ("--accept", one)]
    assert "2 host keys of web-01 pinned" in stack.platform("resource", "scan", "web-01", *words)
    done = alice.run("connect", "web-01/deploy", "--", "echo reached")
    assert done.stdout == "reached\n"


def _fingerprint(sshd: SshServer, kind: str) -> str:
    words = ["ssh-keygen", "-lf", str(sshd.folder / f"host_{kind}.pub")]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[1]


@pytest.fixture(scope="module")
def pinned(stack: Stack, sshd: SshServer) -> None:
    stack.platform("resource", "scan", "web-01", "--accept", _fingerprint(sshd, "ed25519"))


# --- pam-client's own commands -------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 1, 130, 255])
def test_exit_codes(alice: Person, code: int) -> None:
    assert alice.run("connect", "web-02", "--", f"exit {code}", check=False).returncode == code


@pytest.mark.parametrize("own", [False, True], ids=["ssh", "without ssh"])
def test_streams_are_carried_as_they_are(alice: Person, tmp_path: Path, own: bool) -> None:
    data = bytes(range(256)) * 8192
    env = alice.environment() | ({"PATH": str(tmp_path)} if own else {})
    done = subprocess.run(
        alice.command("connect", "web-02", "--", "cat; echo told >&2; exit 3"),
        env=env,
        input=data,
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (3, b"told\n"), alice.stack.logs()
    assert done.stdout == data


def test_a_login_by_a_certificate_of_the_session(alice: Person, sshd: SshServer, pinned: None) -> None:
    done = alice.run("connect", "web-01/cert", "--", "echo certified")
    assert done.stdout == "certified\n"
    # The server's own log names the person and the session.
    wait_for(lambda: f"ID alice/{newest(alice)}" in sshd.log.read_text(), "the server's log line")


def test_a_listener_for_programs_that_need_a_port(alice: Person) -> None:
    process = alice.start("connect", "web-02", "--port", str(free_port()), stdout=subprocess.PIPE)
    try:
        assert process.stdout
        usage = shlex.split(process.stdout.readline())
        done = subprocess.run([*usage, "echo", "by port"], capture_output=True, timeout=120, check=False)
        assert done.stdout == b"by port\n", done.stderr
    finally:
        process.terminate()
        process.wait(60)


class Tmux:
    """pam-client in a real terminal emulator of 100 by 30."""

    def __init__(self, person: Person, *words: str) -> None:
        self.socket = f"pam-{os.getpid()}-{time.monotonic_ns()}"
        self.person = person
        self.do("new-session", "-d", "-x", "100", "-y", "30", shlex.join(person.command(*words)))

    def do(self, *words: str) -> str:
        command = ["tmux", "-L", self.socket, "-f", "/dev/null", *words]
        env = self.person.environment() | {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=60)
        return done.stdout

    def type(self, text: str, *keys: str) -> None:
        self.do("send-keys", "-l", text)
        if keys:
            self.do("send-keys", *keys)

    def screen(self) -> list[str]:
        return [line.rstrip() for line in self.do("capture-pane", "-p").splitlines()]

    def answer(self, command: str) -> str:
        """The screen a moment after the command."""
        self.type(command, "Enter")
        time.sleep(0.5)
        return "\n".join(self.screen())

    def wait(self, text: str) -> None:
        wait_for(lambda: text in "\n".join(self.screen()), f"{text!r} on the screen", timeout=120)

    def close(self) -> None:
        self.do("kill-server")


@pytest.mark.skipif(not shutil.which("tmux"), reason="needs tmux")
def test_a_shell_in_a_terminal_and_its_replay(
    alice: Person, replay: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    terminal = Tmux(alice, "connect", "web-02")
    try:
        terminal.type("exec env PS1='demo> ' sh", "Enter")
        terminal.wait("demo> ")
        terminal.type("stty size; printf '\\033[31mtäst 世界\\033[0m %s\\n' $((6*7))", "Enter")
        terminal.wait("30 100")
        terminal.wait("täst 世界 42")
        terminal.do("resize-window", "-x", "90", "-y", "25")
        # More than once: OpenSSH can take note of SIGWINCH as late as with the next key.
        wait_for(lambda: "25 90" in terminal.answer("stty size"), "the new size", timeout=60)
        terminal.type("sleep 600", "Enter")
        terminal.wait("sleep 600")
        terminal.do("send-keys", "C-c")
        terminal.type("stty -echo; echo ask; read answer; stty echo; echo got $answer | wc -c", "Enter")
        terminal.wait("ask")
        terminal.type(TYPED_SECRET, "Enter")
        terminal.wait(str(len(f"got {TYPED_SECRET}\n")))
        terminal.type("clear; printf 'one\\ntwo\\033[5;10Hfive\\033[A up'; echo; echo last", "Enter")
        terminal.wait("last     five\ndemo>")
        seen = terminal.screen()
        terminal.type("exit", "Enter")
        wait_for(lambda: not terminal.do("list-sessions"), "the end of the shell", timeout=60)
    finally:
        terminal.close()
    session = newest(alice)
    events = replay(alice, session)
    assert {"shell", "o", "resize", "exit"} <= {event["kind"] for event in events}
    assert TYPED_SECRET not in json.dumps(events)
    file = tmp_path / "shell.cast"
    alice.run("replay", session, "--export", "asciicast", "-o", str(file))
    assert _screen_of(file, seen) == [line for line in seen if line]


def _screen_of(file: Path, seen: list[str]) -> list[str]:
    """The screen at the moment when it last held what the original showed at the end, in an emulator."""
    header, *events = [json.loads(line) for line in file.read_text().splitlines()]
    screen = pyte.Screen(header["width"], header["height"])
    stream = pyte.Stream(screen)
    found: list[str] = []
    for _, kind, data in events:
        if kind == "r":
            columns, rows = map(int, data.split("x"))
            screen.resize(rows, columns)
        elif kind == "o":
            stream.feed(data)
        # Wide characters take two cells, of which the emulator leaves the second one empty.
        shown = [line.rstrip() for line in screen.display if line.strip()]
        if shown == [line for line in seen if line]:
            found = shown
    return found or [line.rstrip() for line in screen.display if line.strip()]


# --- plain programs ------------------------------------------------------------------------------------


def test_plain_ssh(program: Any, config: Path, alice: Person, pinned: None) -> None:
    for name in ("web-02.pam", "deploy.web-02.pam", "deploy.web-01.pam", "cert.web-01.pam"):
        done = program("ssh", "-F", str(config), name, "cat; exit 0", input=name)
        assert (done.stdout, done.stderr) == (name, "")


def test_files_by_scp_and_sftp(
    program: Any, config: Path, alice: Person, tmp_path: Path, replay: Callable[..., list[dict[str, Any]]]
) -> None:
    source, data = tmp_path / "source", os.urandom(3_000_000)
    source.write_bytes(data)
    for protocol in ("-O", "-s"):
        there, back = tmp_path / f"there{protocol}", tmp_path / f"back{protocol}"
        program("scp", protocol, "-F", str(config), str(source), f"web-02.pam:{there}")
        assert there.read_bytes() == data
        program("scp", protocol, "-F", str(config), f"web-02.pam:{there}", str(back))
        assert back.read_bytes() == data
    batch = f"put {source} {tmp_path}/by-sftp\nrename {tmp_path}/by-sftp {tmp_path}/renamed\nls {tmp_path}\n"
    done = program("sftp", "-F", str(config), "-b", "-", "web-02.pam", input=batch)
    assert "renamed" in done.stdout
    assert (tmp_path / "renamed").read_bytes() == data
    files = [event for event in replay(alice, newest(alice)) if event["kind"] == "file"]
    put = next(event for event in files if event["op"] == "put")
    assert put["sha256"] == hashlib.sha256(data).hexdigest()
    assert put["bytes"] == len(data)


def test_a_tree_by_rsync(program: Any, tmp_path: Path) -> None:
    tree, copy = tmp_path / "tree", tmp_path / "copy"
    for number in range(300):
        file = tree / f"{number % 7}" / f"file-{number}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(os.urandom(100 + number * 17))
    program("rsync", "-a", f"{tree}/", f"web-02.pam:{copy}/")
    done = program("rsync", "-a", "--checksum", "--itemize-changes", f"{tree}/", f"web-02.pam:{copy}/")
    assert done.stdout == ""
    assert len([path for path in copy.rglob("*") if path.is_file()]) == 300


def test_git_clones_and_pushes(program: Any, tmp_path: Path) -> None:
    bare, clone = tmp_path / "bare.git", tmp_path / "clone"
    program("git", "init", "-q", "--bare", str(bare))
    program("git", "clone", "-q", f"web-02.pam:{bare}", str(clone))
    (clone / "file").write_text("pushed")
    who = ("-c", "user.name=alice", "-c", "user.email=alice@example.com")
    program("git", "-C", str(clone), "add", "file")
    program("git", "-C", str(clone), *who, "commit", "-q", "-m", "a file")
    program("git", "-C", str(clone), "push", "-q", "origin", "HEAD:main")
    assert program("git", "-C", str(bare), "show", "main:file").stdout == "pushed"


def test_many_channels_of_one_session(program: Any, config: Path, alice: Person) -> None:
    before = len(json.loads(alice.run("sessions", "ls", "--json").stdout))
    # Short: a socket's path has little room, and %C alone takes forty characters.
    control = ["-o", f"ControlPath=/tmp/pam-{os.getpid()}-%C"[:60], "-F", str(config)]
    master = ["-o", "ControlMaster=yes", "-o", "ControlPersist=yes", "-N", "-f"]
    # Without pipes: the master stays, and would keep them open.
    subprocess.run(
        ["ssh", *control, *master, "web-02.pam"],
        env=alice.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=120,
        check=True,
    )
    try:
        results: list[str] = []

        def call(number: int) -> None:
            done = program("ssh", *control, "web-02.pam", f"cat; echo {number}", input="x" * 100_000)
            results.append(done.stdout)

        threads = [threading.Thread(target=call, args=(number,)) for number in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(150)
        assert sorted(results) == sorted("x" * 100_000 + f"{number}\n" for number in range(20))
        assert len(json.loads(alice.run("sessions", "ls", "--json").stdout)) == before + 1
    finally:
        program("ssh", *control, "-O", "exit", "web-02.pam", check=False)


@pytest.mark.skipif(not (BIN / "ansible").exists(), reason="needs ansible-core")
def test_ansible_pings(program: Any, config: Path, tmp_path: Path) -> None:
    done = program(
        str(BIN / "ansible"),
        *("all", "-i", "web-02.pam,", "-m", "ansible.builtin.ping"),
        *("-e", f"ansible_python_interpreter={sys.executable}"),
        f"--ssh-common-args=-F {config}",
        env={"ANSIBLE_HOME": str(tmp_path), "ANSIBLE_REMOTE_TEMP": str(tmp_path / "remote")},
    )
    assert '"ping": "pong"' in done.stdout


def test_what_is_not_allowed_is_said(program: Any, config: Path) -> None:
    """Neither forwarding nor the agent's socket is the account's."""
    done = program("ssh", "-F", str(config), "-A", "web-02.pam", "echo agent=$SSH_AUTH_SOCK")
    assert done.stdout == "agent=\n"
    strict = ("-o", "ExitOnForwardFailure=yes")
    done = program(
        "ssh", "-F", str(config), *strict, "-R", "0:127.0.0.1:1", "web-02.pam", "true", check=False
    )
    assert done.returncode == 255
