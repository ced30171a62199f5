"""How connections end: killed wherever they block, refused, failed, stalled."""

from __future__ import annotations

import contextlib
import resource
import socket
import subprocess
import threading
import time
from collections.abc import Iterator

import paramiko
import pytest
from patience import Metronome
from processes import wait_for as _wait_for

from pam_agent.protocols.base import PamError
from pam_agent.protocols.ssh import bridge, farewell, interceptor, login
from pam_agent.protocols.ssh.farewell import MAX_FIRST, MAX_WORDS
from pam_agent.protocols.ssh.interceptor import SshInterceptor
from pam_common.stream import SocketStream

pytestmark = pytest.mark.slow


def wait_for(condition, what: str) -> None:
    _wait_for(lambda: bool(condition()), what)


def peak() -> int:
    """KiB that this process has ever used."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.fixture
def silent() -> Iterator[int]:
    """A target that accepts and never says anything."""
    listener = socket.create_server(("127.0.0.1", 0))
    kept: list[socket.socket] = []

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                kept.append(listener.accept()[0])

    threading.Thread(target=accept, daemon=True).start()
    yield int(listener.getsockname()[1])
    listener.close()
    for sock in kept:
        sock.close()


def killed(gate, process: subprocess.Popen[bytes]) -> tuple[float, str]:
    """End the session; the seconds until the program was gone, and what it said."""
    with Metronome() as beat:
        began = time.monotonic()
        gate.end("the session was killed: a test")
        _, said = process.communicate(timeout=60)
        return time.monotonic() - began - beat.lost(), said.decode()


def start(gate, *words: str, **options) -> subprocess.Popen[bytes]:
    return subprocess.Popen(gate.ssh_command(*words), stderr=subprocess.PIPE, **options)


def test_a_kill_cuts_an_idle_session_with_its_reason(gate) -> None:
    process = start(gate, "sleep 1000", stdin=subprocess.PIPE)
    wait_for(lambda: gate.kinds("exec"), "the command")
    seconds, said = killed(gate, process)
    assert "the session was killed: a test" in said
    assert seconds < 3  # under load; the agent's part is measured below
    assert process.returncode == 255
    gate.ended()
    assert gate.kinds("end")[0]["reason"] == "the session was killed: a test"


@pytest.mark.parametrize("command", ["cat /dev/zero", "sleep 1000"], ids=["down", "up"])
def test_a_kill_cuts_a_session_that_is_blocked(gate, command) -> None:
    """The user's program does not read, or the target does not."""
    with open("/dev/zero", "rb") as zero:  # noqa: PTH123 - a device
        process = start(gate, command, stdin=zero, stdout=subprocess.PIPE)
        wait_for(lambda: gate.kinds("exec"), "the command")
        time.sleep(1)  # for windows and buffers to fill
        with Metronome() as beat:
            began = time.monotonic()
            gate.end("the session was killed: a test", last_words=0.3)
            gate.ended()
            assert time.monotonic() - began - beat.lost() < 3
        process.kill()
        process.communicate(timeout=60)


def test_a_kill_during_the_login_to_the_target(sshd, make_gate, silent) -> None:
    server = type("Server", (), {"host_keys": sshd.host_keys, "port": silent, "key": sshd.key, "user": "x"})
    gate = make_gate(server)
    process = start(gate, "true", stdin=subprocess.DEVNULL)
    wait_for(lambda: gate.targets, "the dial")
    _, said = killed(gate, process)
    assert "killed: a test" in said


def test_a_slow_reader_slows_the_target_and_memory_stays_flat(gate) -> None:
    before = peak()
    process = start(gate, "head -c 300000000 /dev/zero", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert process.stdout is not None
    wait_for(lambda: gate.kinds("exec"), "the command")
    time.sleep(1)
    assert peak() - before < 48 << 10
    total = 0
    while data := process.stdout.read(1 << 20):
        total += len(data)
    assert total == 300_000_000
    assert process.wait(60) == 0
    assert peak() - before < 48 << 10
    process.communicate()


def test_a_recording_that_fails_ends_the_session_before_anything_passes(gate) -> None:
    process = start(gate, "cat", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    wait_for(lambda: gate.kinds("exec"), "the command")
    gate.recorder_error = PamError("the session cannot be recorded: no space", hint="look at the disk")
    process.stdin.write(b"secret\n")
    process.stdin.flush()
    out, said = process.communicate(timeout=60)
    assert out == b""
    assert b"cannot be recorded" in said
    assert b"HINT: look at the disk" in said


def test_the_targets_end_is_told(sshd, make_gate) -> None:
    gate = make_gate(sshd)
    process = start(gate, "sleep 1000", stdin=subprocess.DEVNULL)
    wait_for(lambda: gate.kinds("exec"), "the command")
    for sock in gate.targets:
        sock.shutdown(socket.SHUT_RDWR)
    _, said = process.communicate(timeout=60)
    assert b"the target closed the connection" in said


def test_a_login_that_takes_too_long_is_given_up(sshd, make_gate, silent, monkeypatch) -> None:
    monkeypatch.setattr(login, "EXCHANGE_SECONDS", 0.5)
    server = type("Server", (), {"host_keys": sshd.host_keys, "port": silent, "key": sshd.key, "user": "x"})
    done = make_gate(server).ssh("true")
    assert b"did not finish the key exchange" in done.stderr
    monkeypatch.setattr(login, "EXCHANGE_SECONDS", 20.0)
    monkeypatch.setattr(interceptor, "LOGIN_SECONDS", 0.5)
    done = make_gate(server).ssh("true")
    assert done.returncode == 255
    assert b"the target" in done.stderr


def test_a_client_that_never_logs_in_is_cut(gate, monkeypatch) -> None:
    monkeypatch.setattr(interceptor, "START_SECONDS", 0.5)
    with socket.create_connection(("127.0.0.1", gate.port), timeout=60) as sock:
        sock.sendall(b"SSH-2.0-silent\r\n")
        data = b""
        while piece := sock.recv(65536):
            data += piece
    assert b"no ssh login within" in data
    gate.ended()


def test_a_client_that_does_not_close_is_cut(gate, monkeypatch) -> None:
    monkeypatch.setattr(bridge, "CLOSE_SECONDS", 0.2)
    monkeypatch.setattr(interceptor, "START_SECONDS", 0.2)
    sock = socket.create_connection(("127.0.0.1", gate.port), timeout=60)
    sock.sendall(b"SSH-2.0-silent\r\n")
    wait_for(lambda: gate.threads, "the connection")
    gate.ended()
    sock.close()


def test_a_refusal_is_read_by_the_stock_client(tmp_path) -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        sock, _ = listener.accept()
        SshInterceptor.refuse(SocketStream(sock), "the session was killed", "connect again")
        sock.shutdown(socket.SHUT_WR)
        with sock, contextlib.suppress(OSError):
            while sock.recv(65536):  # to its end, lest a reset comes before what it was told
                pass

    thread = threading.Thread(target=serve)
    thread.start()
    port = listener.getsockname()[1]
    done = subprocess.run(
        ["ssh", "-F", "none", "-p", str(port), "-o", f"UserKnownHostsFile={tmp_path}/none", "x@127.0.0.1"],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
        check=False,
    )
    thread.join(60)
    listener.close()
    assert b"the session was killed. HINT: connect again" in done.stderr


def test_refusals_are_bounded() -> None:
    near, far = socket.socketpair()
    with near, far:
        near.sendall(b"x" * (MAX_FIRST + 100))
        farewell.refuse(SocketStream(far), "no", "")
        assert near.recv(65536).startswith(b"SSH-2.0-")
    assert len(farewell.words("ü" * 1000, "y").encode()) <= MAX_WORDS
    assert "\n" not in farewell.words("a\nb", "c\x1b[0m")


# -- clients of our own ----------------------------------------------------------------------------------


def client(gate) -> paramiko.Transport:
    transport = paramiko.Transport(("127.0.0.1", gate.port))
    transport.start_client(timeout=60)
    return transport


def test_abuse_2_no_key_and_no_password_is_taken_for_a_proof(gate) -> None:
    """The grant let the person in; whatever else a program offers is refused, not believed."""
    for offer in (
        lambda transport: transport.auth_publickey("root", paramiko.ECDSAKey.generate()),
        lambda transport: transport.auth_password("root", "x"),
        lambda transport: transport.auth_interactive("root", lambda *_: []),
    ):
        transport = client(gate)
        with pytest.raises(paramiko.AuthenticationException):
            offer(transport)
        transport.close()
    gate.ended()
    assert not gate.kinds("ssh_login")
    assert gate.targets == []


def test_abuse_3_channels_and_forwards_before_the_login_are_refused(gate) -> None:
    transport = client(gate)
    with pytest.raises(paramiko.SSHException):
        transport.open_channel("session", timeout=60)
    with contextlib.suppress(paramiko.SSHException):
        transport.request_port_forward("127.0.0.1", 8000)
    assert gate.targets == []  # nothing was dialled
    assert gate.events == []
    transport.close()


def test_abuse_3_a_servers_own_messages_log_nobody_in(gate) -> None:
    transport = client(gate)
    message = paramiko.Message()
    message.add_byte(bytes([52]))  # SSH_MSG_USERAUTH_SUCCESS
    transport.packetizer.send_message(message)
    with pytest.raises(paramiko.SSHException):
        transport.open_channel("session", timeout=60)
    assert gate.targets == []
    transport.close()


def test_abuse_4_a_user_name_is_only_recorded(gate) -> None:
    transport = client(gate)
    transport.auth_none("../../etc/passwd\n; rm -rf")
    channel = transport.open_session(timeout=60)
    channel.exec_command("echo $USER-x; id -un")
    output = channel.makefile().read().decode()
    assert "passwd" not in output
    transport.close()
    gate.ended()
    assert gate.kinds("ssh_login")[0]["asked_user"] == "../../etc/passwd\n; rm -rf"


def test_abuse_5_a_client_without_strict_key_exchange_is_refused(gate) -> None:
    transport = paramiko.Transport(("127.0.0.1", gate.port), strict_kex=False)
    with pytest.raises((paramiko.SSHException, EOFError)):
        transport.start_client(timeout=60)
    transport.close()
    gate.ended()
    assert gate.targets == []


def test_a_client_that_floods_and_never_reads_is_slowed_not_kept(gate) -> None:
    """Forty channels, each with a target that answers without end, and nobody who reads."""
    before = peak()
    transport = client(gate)
    transport.auth_none("x")
    channels = []
    for _ in range(40):
        channel = transport.open_session(window_size=1 << 22, timeout=60)
        channel.exec_command("cat /dev/zero")
        channels.append(channel)
        transport.packetizer.set_keepalive(0, lambda: None)
    transport.sock.setblocking(True)
    time.sleep(3)
    assert peak() - before < 400 << 10  # paramiko's own buffers are in this process, too
    transport.close()
    gate.ended()
