"""SSH through pam-client: the system's ssh, a client of our own, ssh-proxy and ssh-config; with real keys."""

from __future__ import annotations

import codecs
import contextlib
import os
import pty
import select
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import little_sshd
import pytest
from processes import free_port

from pam_client.launch import Place
from pam_client.ssh import config, known_hosts, options, terminal
from pam_client.ssh.refusal import MAX_IDENTIFICATION, SshRefusal, starts_ssh
from pam_common.errors import PamError, ProtocolError, UnavailableError
from pam_common.keys import SigningKey, VerifyKeys
from pam_common.ssh_certs import CertificateKey, make_host_certificate

pytestmark = pytest.mark.skipif(not shutil.which("ssh"), reason="needs OpenSSH's client")


def host_key(ca: SigningKey, name: str = "dc1.pam") -> CertificateKey:
    key, now = SigningKey.generate(), int(time.time())
    line = make_host_certificate(
        ca, key.public, key_id="s", principals=[name], valid_after=now - 300, valid_before=now + 600
    )
    return CertificateKey(key.seed(), line)


@pytest.fixture
def server(agency: Any, connecting: Any) -> Any:
    """The account web-01/deploy, answered by an SSH server."""
    agency.protocol = "ssh"
    agency.serve = lambda channel: little_sshd.serve(channel, host_key(agency.interceptor_ca))
    connecting.answers["GET", "/api/v1/resources"] = (
        200,
        {
            "resources": [
                {
                    "name": "web-01",
                    "protocol": "ssh",
                    "gateway": "dc1",
                    "accounts": [{"name": "deploy"}],
                },
                {
                    "name": "web-02",
                    "protocol": "ssh",
                    "gateway": "dc2",
                    "accounts": [{"name": "deploy"}, {"name": "root"}],
                },
                {"name": "prod-db", "protocol": "postgres", "gateway": "dc1", "accounts": [{"name": "ro"}]},
            ],
            "interceptor_host_ca": VerifyKeys.of(agency.interceptor_ca.public).to_json(),
        },
    )
    return agency


@pytest.fixture(params=["ssh", "our own client"])
def client(request: pytest.FixtureRequest, environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """The environment of a machine with, or without, OpenSSH."""
    if request.param == "ssh":
        return environment
    empty = tmp_path / "bin"
    empty.mkdir()
    return environment | {"PATH": str(empty)}


def connect(command: Any, env: dict[str, str], *words: str, data: bytes = b"") -> Any:
    return subprocess.run(
        command("connect", "web-01/deploy", *words),
        env=env,
        input=data,
        capture_output=True,
        timeout=60,
        check=False,
    )


# --- commands ------------------------------------------------------------------------------------------


def test_a_command_has_its_streams_and_exit_code(server: Any, command: Any, client: dict[str, str]) -> None:
    data = bytes(range(256)) * 1000
    done = connect(command, client, "--", "cat; echo wrong >&2; exit 42", data=data)
    assert done.stdout == data
    assert done.stderr == b"wrong\n"
    assert done.returncode == 42
    assert server.ended == server.sessions


@pytest.mark.parametrize("code", [0, 1, 130, 255])
def test_exit_codes(server: Any, command: Any, environment: dict[str, str], code: int) -> None:
    assert connect(command, environment, "--", f"exit {code}").returncode == code


def test_a_command_that_is_not_here_may_be_there(
    server: Any, command: Any, environment: dict[str, str]
) -> None:
    done = connect(command, environment, "--", "no-such-program-anywhere")
    assert done.returncode == 127
    assert b"not found" in done.stderr
    assert len(server.sessions) == 1


def test_a_command_that_is_no_program_here_may_be_one_there(
    server: Any, command: Any, environment: dict[str, str]
) -> None:
    done = connect(command, environment, "--", "/etc/passwd")
    assert done.returncode == 126
    assert len(server.sessions) == 1


def test_a_command_and_a_port_exclude_each_other(server: Any, call: Any) -> None:
    done = call("connect", "web-01/deploy", "--port", "40000", "--", "true")
    assert done.returncode == 2
    assert "runs on the server" in done.stderr


# --- shells --------------------------------------------------------------------------------------------


class Terminal:
    """pam-client in a terminal of 100 by 30."""

    def __init__(self, words: list[str], env: dict[str, str]) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            termios.tcsetwinsize(0, (30, 100))  # before the program can look
            os.execvpe(words[0], words, env)
        self.seen = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()  # a read may end within a character

    def comes(self, text: str, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while text not in self.seen:
            if time.monotonic() > end:
                return False
            if select.select([self.fd], [], [], 0.1)[0]:
                self.seen += self._decoder.decode(os.read(self.fd, 4096))
        return True

    def wait(self, text: str) -> None:
        assert self.comes(text, 60), self.seen

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def close(self) -> int:
        try:
            while data := os.read(self.fd, 4096):
                self.seen += self._decoder.decode(data)
        except OSError:
            pass
        os.close(self.fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_a_shell(server: Any, command: Any, client: dict[str, str]) -> None:
    screen = Terminal(command("connect", "web-01/deploy"), client | {"TERM": "xterm"})
    screen.wait("$ ")
    screen.type("stty size; echo täst-$((6*7))\r")
    screen.wait("30 100")
    screen.wait("täst-42")
    termios.tcsetwinsize(screen.fd, (40, 120))
    for _ in range(30):  # a SIGWINCH that comes just before ssh waits is seen with what is typed next only
        screen.type("stty size\r")
        if screen.comes("40 120", 2):
            break
    screen.wait("40 120")
    screen.type("echo begun-$((6*7)); sleep 60\r")
    screen.wait("begun-42")  # what is only echoed was not read by the shell yet, which would forget the ^C
    screen.type("\x03exit 7\r")
    assert screen.close() == 7
    assert "authenticity" not in screen.seen
    assert server.ended == server.sessions


def answer(connecting: Any, server: Any, *states: dict[str, Any]) -> None:
    """What the platform says of the session, the last of it for ever."""
    left = list(states)

    def say(_form: object) -> tuple[int, dict[str, Any]]:
        return 200, {"id": server.sessions[-1], **(left.pop(0) if len(left) > 1 else left[0])}

    connecting.answers["GET", f"/api/v1/sessions/{server.sessions[-1]}"] = say


ACTIVE, KILLED = {"state": "active"}, {"state": "ended", "end_reason": "killed by root"}


@pytest.mark.parametrize("states", [[KILLED], [ACTIVE, ACTIVE, KILLED]], ids=["at once", "a moment later"])
def test_a_shell_whose_session_is_ended_by_others(
    server: Any, connecting: Any, command: Any, client: dict[str, str], states: list[dict[str, Any]]
) -> None:
    """The agent's word of it may reach the platform after ssh has ended."""
    screen = Terminal(command("connect", "web-01/deploy"), client | {"TERM": "xterm"})
    screen.wait("$ ")
    answer(connecting, server, *states)
    server.relays[0].cut()
    assert screen.close() == 3
    assert "the session was ended: killed by root" in screen.seen


def test_a_shell_whose_time_is_over(
    server: Any, connecting: Any, command: Any, client: dict[str, str]
) -> None:
    server.duration = 5
    screen = Terminal(command("connect", "web-01/deploy"), client | {"TERM": "xterm"})
    screen.wait("$ ")
    answer(connecting, server, ACTIVE)
    time.sleep(5)  # the session's whole time
    server.relays[0].cut()
    assert screen.close() == 3
    assert "the session's time is over" in screen.seen


def test_a_shell_that_was_only_cut_or_ends_so_itself(
    server: Any, command: Any, client: dict[str, str]
) -> None:
    for last in (lambda screen: server.relays[0].cut(), lambda screen: screen.type("exit 255\r")):
        screen = Terminal(command("connect", "web-01/deploy"), client | {"TERM": "xterm"})
        screen.wait("$ ")
        last(screen)
        assert screen.close() == 255
        assert "was ended" not in screen.seen


def test_a_command_whose_session_is_ended_keeps_its_exit_code(
    server: Any, connecting: Any, command: Any, environment: dict[str, str]
) -> None:
    words = command("connect", "web-01/deploy", "-t", "--", "echo be''gun; sleep 60")
    screen = Terminal(words, environment | {"TERM": "xterm"})
    screen.wait("begun")
    answer(connecting, server, KILLED)
    server.relays[0].cut()
    assert screen.close() == 255


def test_a_command_with_a_terminal(server: Any, command: Any, client: dict[str, str]) -> None:
    words = command("connect", "web-01/deploy", "-t", "--", "test -t 0 && stty size")
    screen = Terminal(words, client | {"TERM": "xterm"})
    screen.wait("30 100")
    assert screen.close() == 0


# --- whom to believe -----------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["another CA", "another gateway"])
def test_a_server_that_is_not_the_gateways_is_refused(
    server: Any, command: Any, client: dict[str, str], wrong: str
) -> None:
    key = (
        host_key(SigningKey.generate())
        if wrong == "another CA"
        else host_key(server.interceptor_ca, "dc2.pam")
    )
    server.serve = lambda channel: little_sshd.serve(channel, key)
    done = connect(command, client, "--", "echo reached")
    assert done.returncode != 0
    assert b"reached" not in done.stdout
    assert b"host key verification failed" in done.stderr.lower()


def test_a_server_that_says_nothing_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "LOGIN_TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = Place(*silent.getsockname()[:2], "deploy", None, "dc1", "web-01/deploy", tmp_path / "none")
        with pytest.raises(UnavailableError, match="the SSH connection failed"):
            terminal.run(place, ["true"], False)


def test_a_login_that_is_asked_for_is_not_given(server: Any, command: Any, client: dict[str, str]) -> None:
    server.serve = lambda channel: little_sshd.serve(channel, host_key(server.interceptor_ca), login=False)
    done = connect(command, client, "--", "echo reached")
    assert done.returncode != 0
    assert b"reached" not in done.stdout


def test_the_known_hosts_file_is_private_and_for_one_platform(tmp_path: Path) -> None:
    from pam_client.home import Home

    home, ca = Home(tmp_path / "home"), SigningKey.generate()
    file = known_hosts.write(home, "https://pam.test", VerifyKeys.of(ca.public))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.read_text().startswith("@cert-authority *.pam ssh-ed25519 AAAA")
    assert known_hosts.read(file).to_json() == VerifyKeys.of(ca.public).to_json()
    before = file.stat().st_ino
    assert known_hosts.write(home, "https://pam.test", VerifyKeys.of(ca.public)) == file
    assert file.stat().st_ino == before
    assert known_hosts.write(home, "https://other.test", VerifyKeys.of(ca.public)) != file
    with pytest.raises(PamError, match="names no CA"):
        known_hosts.write(home, "https://pam.test", VerifyKeys.of())


# --- refusals ------------------------------------------------------------------------------------------


def test_a_refusal_reaches_ssh(server: Any, command: Any, environment: dict[str, str]) -> None:
    server.refuse_grant = "the agent is out of office"
    done = connect(command, environment, "--", "echo reached")
    assert done.returncode == 255
    assert b"the agent is out of office" in done.stderr
    assert b"Received disconnect" in done.stderr


def test_a_refusal_in_its_own_form() -> None:
    refusal = SshRefusal("no\nroom", "wait")
    assert refusal.feed(b"SSH-2.0-Op") == b""
    answer = refusal.feed(b"enSSH\r\nand more")
    assert refusal.done
    assert answer.startswith(b"SSH-2.0-pam\r\n")
    packet = answer.removeprefix(b"SSH-2.0-pam\r\n")
    assert len(packet) % 8 == 0
    assert int.from_bytes(packet[:4], "big") == len(packet) - 4
    assert packet[4] >= 4
    assert b"no?room HINT: wait" in packet
    assert refusal.feed(b"x") == b""
    assert len(SshRefusal("x" * 5000).feed(b"SSH-2.0-OpenSSH\r\n")) < 1100


def test_what_says_no_identification_is_left() -> None:
    refusal = SshRefusal("no")
    assert refusal.feed(b"x" * MAX_IDENTIFICATION) == b""
    assert not refusal.done
    assert refusal.feed(b"x") == b""
    assert refusal.done
    assert not starts_ssh(b"GET ")


# --- ssh-proxy -----------------------------------------------------------------------------------------


@pytest.fixture
def ssh(server: Any, home: Any, environment: dict[str, str], command: Any, run: Any) -> Any:
    """Plain ssh with the file that ssh-config writes; ``HOME`` is an empty folder."""
    done = run("ssh-config", "--write")
    assert done.returncode == 0, done.stderr
    file = home.folder / "ssh/config"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600

    def do(*words: str, **extra: Any) -> Any:
        return subprocess.run(
            ["ssh", "-F", str(file), *words],
            env=environment,
            capture_output=True,
            timeout=60,
            check=False,
            **extra,
        )

    return do


@pytest.mark.parametrize("name", ["web-01.pam", "deploy.web-01.pam"])
def test_plain_ssh(ssh: Any, server: Any, name: str, wait_for: Any) -> None:
    data = os.urandom(300_000)
    done = ssh(name, "cat; exit 3", input=data)
    assert (done.returncode, done.stdout, done.stderr) == (3, data, b"")
    wait_for(lambda: server.ended == server.sessions)


def test_many_calls_share_one_session(ssh: Any, server: Any, tmp_path: Path, wait_for: Any) -> None:
    control = ["-o", f"ControlPath={tmp_path}/c", "-o", "ControlMaster=auto", "-o", "ControlPersist=60"]
    for number in range(4):
        assert ssh(*control, "web-01.pam", f"echo {number}").stdout == b"%d\n" % number
    assert len(server.sessions) == 1
    ssh(*control, "-O", "exit", "web-01.pam")
    wait_for(lambda: server.ended == server.sessions)


def test_ssh_proxy_says_why_not(server: Any, connecting: Any, run: Any) -> None:
    hint = {"detail": "no policy lets alice use web-01", "hint": "pam-client ls shows what you may use."}
    connecting.answers["POST", "/api/v1/connect"] = (403, hint)
    done = run("ssh-proxy", "web-01/deploy")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "no policy lets alice use web-01" in done.stderr
    assert "HINT: " in done.stderr


def test_ssh_proxy_is_for_ssh(server: Any, run: Any) -> None:
    server.protocol = "postgres"
    done = run("ssh-proxy", "prod-db/ro")
    assert done.returncode == 1
    assert "prod-db/ro is not an SSH server" in done.stderr
    assert server.ended == server.sessions


def test_ssh_proxy_ends_with_its_input(server: Any, run: Any) -> None:
    """A stream that says nothing more: the server's identification comes, and then the end."""
    done = run("ssh-proxy", "web-01/deploy")  # stdin is /dev/null
    assert done.returncode == 0
    assert done.stdout.startswith("SSH-2.0-")
    assert server.ended == server.sessions


def test_ssh_proxy_ends_its_session_when_it_is_told_to(
    server: Any, command: Any, environment: dict[str, str], wait_for: Any
) -> None:
    process = subprocess.Popen(
        command("ssh-proxy", "web-01/deploy"), env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout
        assert process.stdout.readline().startswith(b"SSH-2.0-")
        process.terminate()
        assert process.wait(60) == 0
        assert server.ended == server.sessions
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        assert process.stdin
        process.stdin.close()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_ssh_proxy_ends_its_session_although_ssh_has_gone_before(
    number: signal.Signals, server: Any, connecting: Any, command: Any, environment: dict[str, str]
) -> None:
    """ssh hangs up when it is done: in the middle of a connect, or when the end is being told already."""
    process: list[subprocess.Popen[bytes]] = []

    def ended(_form: object) -> tuple[int, dict[str, Any]]:
        process[0].send_signal(signal.SIGHUP)
        server.ended.append(server.sessions[-1])
        return 200, {}

    def session(_form: object) -> tuple[int, dict[str, Any]]:
        status, answer = server.connect(_form)
        connecting.answers["POST", f"/api/v1/sessions/{server.sessions[-1]}/end"] = ended
        return status, answer

    connecting.answers["POST", "/api/v1/connect"] = session
    process.append(
        subprocess.Popen(
            command("ssh-proxy", "web-01/deploy"),
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
    )
    with process[0] as running:
        assert running.stdout
        assert running.stdout.readline().startswith(b"SSH-2.0-")
        running.send_signal(number)
        assert running.wait(60) == 0
        assert server.ended == server.sessions


# --- a UNIX socket instead of a port -------------------------------------------------------------------


def test_where_ports_are_not_safe_a_socket_is_spliced(
    server: Any, command: Any, environment: dict[str, str], tmp_path: Path
) -> None:
    process = subprocess.Popen(
        command("connect", "web-01/deploy", "--socket", str(tmp_path / "s") + "/"),
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout
        usage = shlex.split(process.stdout.readline())
        assert usage[0] == "ssh"
        done = subprocess.run(
            [*usage, "echo spliced"], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.stdout == "spliced\n", done.stderr
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()


def test_a_socket_that_is_not_there(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pam_client.ssh.splice", str(tmp_path / "none")],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert b"error: " in done.stderr


# --- ssh-config ----------------------------------------------------------------------------------------


def shown(tmp_path: Path, text: str, name: str) -> dict[str, str]:
    """What ``ssh -G`` makes of a configuration."""
    file = tmp_path / "config"
    file.write_text(text)
    done = subprocess.run(
        ["ssh", "-F", str(file), "-G", name], capture_output=True, text=True, timeout=60, check=True
    )
    return dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)


def test_every_account_has_an_entry(server: Any, call: Any, tmp_path: Path) -> None:
    text = call("ssh-config").stdout
    assert "prod-db" not in text
    for name, account in (
        ("web-01.pam", "web-01/deploy"),
        ("deploy.web-01.pam", "web-01/deploy"),
        ("root.web-02.pam", "web-02/root"),
    ):
        found = shown(tmp_path, text, name)
        assert found["hostkeyalias"] == ("dc1.pam" if "web-01" in name else "dc2.pam")
        assert found["proxycommand"].endswith(f"ssh-proxy {account}")
        assert found["stricthostkeychecking"] in ("yes", "true")
        assert found["forwardagent"] == "no"
    assert "proxycommand" not in shown(tmp_path, text, "web-02.pam"), "it has two accounts"
    assert shown(tmp_path, text, "example.com")["stricthostkeychecking"] == "ask", "others are left alone"


def test_odd_folders_are_quoted(tmp_path: Path) -> None:
    odd = tmp_path / "a b;'c %h $(touch x)".replace("$", "S")
    odd.mkdir()
    trust = odd / "known_hosts"
    trust.touch()
    program = ["env", f"PAM_CLIENT_HOME={odd}", str(odd / "pam-client")]
    resources = [{"name": "web-01", "gateway": "dc1", "accounts": [{"name": "deploy"}]}]
    text = config.render(resources, trust, program)
    found = shown(tmp_path, text, "web-01.pam")
    assert shlex.split(found["proxycommand"].replace("%%", "%")) == [*program, "ssh-proxy", "web-01/deploy"]
    assert str(odd) in found["userknownhostsfile"].replace("%%", "%")


@pytest.mark.parametrize("name", ["a\nProxyCommand evil", "*", "a b", "-oProxyCommand=x", "", None, "A"])
def test_a_name_that_is_none_is_refused(name: Any) -> None:
    for resource in (
        {"name": name, "gateway": "dc1", "accounts": [{"name": "deploy"}]},
        {"name": "web-01", "gateway": name, "accounts": [{"name": "deploy"}]},
        {"name": "web-01", "gateway": "dc1", "accounts": [{"name": name}]},
    ):
        with pytest.raises(ProtocolError):
            config.render([resource], Path("/k"), ["pam-client"])


@pytest.mark.parametrize("path", ['/a"b', "/a\nb", "/a\\b", "/a${HOME}"])
def test_a_folder_that_ssh_cannot_be_told_is_refused(path: str) -> None:
    with pytest.raises(PamError, match="cannot be told of a file"):
        options.quoted(Path(path))


def test_the_include_is_found_when_it_is_there(tmp_path: Path) -> None:
    file, own = tmp_path / "pam", tmp_path / "own"
    assert not config.is_included(own, file)
    own.write_text(f"Host x\n{config.include_line(file)}\n")
    assert config.is_included(own, file)
    own.write_text(f"Include {file}\n")
    assert config.is_included(own, file)


def test_a_web_page_opens_no_channel(server: Any, command: Any, environment: dict[str, str]) -> None:
    process = subprocess.Popen(
        command("connect", "web-01/deploy", "--port", str(free_port())),
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout
        usage = shlex.split(process.stdout.readline())
        port = int(next(word for word in usage if word.startswith("Port=")).removeprefix("Port="))
        with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
            with contextlib.suppress(ConnectionResetError):  # when not all of it was read
                assert sock.recv(100) == b""
        assert not server.grants
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()
