"""Linux servers as people use them: a real sshd, the real client programs, unchanged, through everything."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from processes import Process, free_port, listens, wait_for
from ssh_server import SshServer
from stack import BIN, Person, Stack

#: A tree and a file as large as people copy.
TREE_FILES = 10_000
LARGE_MIB = int(os.environ.get("PAM_TEST_SSH_MIB", "2048"))


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    folder = tmp_path_factory.mktemp("sshd")
    server = SshServer(folder, f"TrustedUserCAKeys {folder}/user_ca.pub", kinds=("ed25519", "rsa"))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a web server whose page says ``reached``."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "index.html").write_text("reached")
    handler = functools.partial(_QuietHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


class _QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, sshd: SshServer, page: int) -> Iterator[Stack]:
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
            {
                "name": "tunnels",
                **by_key,
                "ssh": {
                    "allow": ["local-forward", "remote-forward"],
                    "forward_to": [f"127.0.0.1:{page}"],
                    "remote_bind": ["127.0.0.1:*"],
                },
            },
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
        options = {"stdin": subprocess.DEVNULL, "text": True, "check": True, "timeout": 600, **options}
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
    wait_for(lambda: f"ID alice/{alice.newest()}" in sshd.log.read_text(), "the server's log line")


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
    files = [event for event in replay(alice, alice.newest()) if event["kind"] == "file"]
    put = next(event for event in files if event["op"] == "put")
    assert put["sha256"] == hashlib.sha256(data).hexdigest()
    assert put["bytes"] == len(data)


def test_a_tree_by_rsync(program: Any, tmp_path: Path) -> None:
    tree, copy = tmp_path / "tree", tmp_path / "copy"
    for number in range(TREE_FILES):
        file = tree / f"{number % 70}" / f"file-{number}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(os.urandom(100 + number % 300 * 17))
    program("rsync", "-a", f"{tree}/", f"web-02.pam:{copy}/")
    done = program("rsync", "-a", "--checksum", "--itemize-changes", f"{tree}/", f"web-02.pam:{copy}/")
    assert done.stdout == ""
    assert len([path for path in copy.rglob("*") if path.is_file()]) == TREE_FILES


@pytest.mark.parametrize("words", [("rsync", "--inplace", "-W"), ("scp",)], ids=["rsync", "scp"])
def test_a_large_file_by(words: tuple[str, ...], program: Any, config: Path, tmp_path: Path) -> None:
    source, there = tmp_path / "source", tmp_path / "there"
    block = os.urandom(1 << 20)
    with source.open("wb") as file:
        for number in range(LARGE_MIB):
            file.write(number.to_bytes(8) + block[8:])
    words = (*words, "-F", str(config)) if words[0] == "scp" else words
    program(*words, str(source), f"web-02.pam:{there}", timeout=800)
    sums = [_sha256(path) for path in (source, there)]
    source.unlink()
    there.unlink()
    assert sums[0] == sums[1]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
            thread.join(600)
        assert sorted(results) == sorted("x" * 100_000 + f"{number}\n" for number in range(20))
        assert len(json.loads(alice.run("sessions", "ls", "--json").stdout)) == before + 1
    finally:
        program("ssh", *control, "-O", "exit", "web-02.pam", check=False)


PLAYBOOK = """
- hosts: all
  gather_facts: true
  tasks:
    - name: A folder
      ansible.builtin.file: {path: "{{ there }}", state: directory, mode: "0750"}
    - name: A file from a template
      ansible.builtin.copy: {content: "{{ ansible_system }} täst", dest: "{{ there }}/file", mode: "0640"}
    - name: Read it back
      ansible.builtin.command: cat {{ there }}/file
      register: read
      changed_when: false
    - name: Compare
      ansible.builtin.assert: {that: "'täst' in read.stdout"}
"""


@pytest.mark.skipif(not (BIN / "ansible-playbook").exists(), reason="needs ansible-core")
def test_an_ansible_playbook(program: Any, config: Path, tmp_path: Path) -> None:
    (tmp_path / "play.yml").write_text(PLAYBOOK)
    (tmp_path / "remote").mkdir()

    def play() -> str:
        return program(
            *(str(BIN / "ansible-playbook"), "-i", "web-02.pam,", str(tmp_path / "play.yml")),
            *("-e", f"ansible_python_interpreter={sys.executable}", "-e", f"there={tmp_path}/there"),
            f"--ssh-common-args=-F {config}",
            env={
                "ANSIBLE_HOME": str(tmp_path),
                "ANSIBLE_REMOTE_TEMP": str(tmp_path / "remote"),
                "ANSIBLE_TIMEOUT": "120",  # for a login; its ten seconds are little on a machine under load
                # For the next task, not for a minute: the session ends with it.
                "ANSIBLE_SSH_ARGS": "-o ControlMaster=auto -o ControlPersist=2",
                # Short: a socket's path has little room.
                "ANSIBLE_SSH_CONTROL_PATH_DIR": f"/tmp/pam-cp-{os.getpid()}",
                "LC_ALL": "C.UTF-8",
            },
        ).stdout

    assert "changed=2 " in play()
    assert "changed=0 " in play()


def test_ports_are_forwarded_as_far_as_allowed(
    program: Any,
    config: Path,
    alice: Person,
    page: int,
    tmp_path: Path,
    pinned: None,
    replay: Callable[..., list[dict[str, Any]]],
) -> None:
    local, remote, dynamic = free_port(), free_port(), free_port()
    forwards = ("-L", f"{local}:127.0.0.1:{page}", "-R", f"{remote}:127.0.0.1:{page}", "-D", str(dynamic))
    strict = ("-o", "ExitOnForwardFailure=yes")
    ssh = Process(
        "ssh",
        ["ssh", "-N", "-F", str(config), *strict, *forwards, "tunnels.web-01.pam"],
        tmp_path / "ssh.log",
        env=alice.environment(),
    )
    try:
        wait_for(lambda: all(map(listens, (local, remote, dynamic))), "the forwards")
        assert program("curl", "-s", f"http://127.0.0.1:{local}/").stdout == "reached"
        assert program("curl", "-s", f"http://127.0.0.1:{remote}/").stdout == "reached"
        socks = ("curl", "-sZ", "--socks5-hostname", f"127.0.0.1:{dynamic}")
        assert program(*socks, *([f"http://127.0.0.1:{page}/"] * 5)).stdout == "reached" * 5
        assert program(*socks, "http://127.0.0.1:1/", check=False).returncode != 0
        assert "open failed" in ssh.tail()
    finally:
        ssh.stop()
    events = replay(alice, alice.newest())
    assert {(e["host"], e["port"]) for e in events if e["kind"] == "bind"} == {("localhost", remote)}
    ends = [e for e in events if e["kind"] == "forward" and e.get("down")]
    assert [e["dir"] for e in ends if e["port"] == page].count("local") == 6
    assert [e["dir"] for e in ends].count("remote") == 1
    refused = [e for e in events if e["kind"] == "forward" and e.get("ok") is False]
    assert [(e["host"], e["port"]) for e in refused] == [("127.0.0.1", 1)]


def test_what_is_not_allowed_is_said(program: Any, config: Path) -> None:
    """Neither forwarding nor the agent's socket is the account's."""
    done = program("ssh", "-F", str(config), "-A", "web-02.pam", "echo agent=$SSH_AUTH_SOCK")
    assert done.stdout == "agent=\n"
    strict = ("-o", "ExitOnForwardFailure=yes")
    done = program(
        "ssh", "-F", str(config), *strict, "-R", "0:127.0.0.1:1", "web-02.pam", "true", check=False
    )
    assert done.returncode == 255
