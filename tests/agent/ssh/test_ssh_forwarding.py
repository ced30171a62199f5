"""Forwarded ports: as far as the account allows, with destinations and bytes recorded."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
from collections.abc import Iterator

import pytest
from processes import free_port, listens
from processes import wait_for as _wait_for

pytestmark = pytest.mark.slow


def wait_for(condition, what: str) -> None:
    _wait_for(lambda: bool(condition()), what)


@pytest.fixture
def echo() -> Iterator[int]:
    """A port that answers with what it gets, up to the end of it."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(sock,), daemon=True).start()

    def answer(sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            while data := sock.recv(65536):
                sock.sendall(data)

    threading.Thread(target=serve, daemon=True).start()
    yield int(listener.getsockname()[1])
    listener.close()


def ask(port: int, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        found = b""
        while piece := sock.recv(65536):
            found += piece
        return found


@contextlib.contextmanager
def background(gate, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    command = gate.ssh_command()
    process = subprocess.Popen(["ssh", "-N", *options, *command[1:]], stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()  # on SIGTERM, ssh finishes what it waits for first
        process.communicate(timeout=60)


def test_a_local_forward_is_opened_from_the_target_and_counted(sshd, make_gate, echo) -> None:
    gate = make_gate(sshd, account={"forward_to": [f"127.0.0.1:{echo}"]})
    port = free_port()
    with background(gate, "-L", f"{port}:127.0.0.1:{echo}"):
        wait_for(lambda: listens(port), "the forward")
        assert ask(port, b"x" * 100_000) == b"x" * 100_000
    gate.ended()
    ends = [event for event in gate.kinds("forward") if event.get("up")]
    assert [(e["host"], e["port"], e["dir"], e["up"], e["down"]) for e in ends] == [
        ("127.0.0.1", echo, "local", 100_000, 100_000)
    ]
    first = gate.kinds("forward")[0]
    assert "up" not in first  # recorded before it was opened


def test_dynamic_forwarding_is_many_local_ones(sshd, make_gate, echo) -> None:
    gate = make_gate(sshd, account={"forward_to": ["127.0.0.0/8:*"]})
    port = free_port()
    with background(gate, "-D", str(port)):
        wait_for(lambda: listens(port), "the forward")
        command = ["curl", "-sN", "-m", "60", "--socks5", f"127.0.0.1:{port}", f"telnet://127.0.0.1:{echo}"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as curl:
            assert curl.stdin is not None
            assert curl.stdout is not None
            curl.stdin.write(b"hello\n")
            curl.stdin.flush()
            assert curl.stdout.readline() == b"hello\n"
            curl.kill()  # by itself it stays until its time is over


@pytest.mark.parametrize(
    ("places", "host"),
    [
        (["10.0.0.0/8:*"], "127.0.0.1"),
        (["0.0.0.0/0:*"], "127.0.0.1"),
        (["127.0.0.1:1"], "127.0.0.1"),
        (["127.0.0.0/8:*"], "localhost"),
        (["*:*"], "localhost"),
        (["127.0.0.0/8:*"], "2130706433"),
        (["127.0.0.0/8:*"], "0x7f.1"),
        (["127.0.0.0/8:*"], "127.1"),
        ([], "127.0.0.1"),
    ],
)
def test_abuse_10_a_destination_that_is_not_allowed_is_never_opened(
    sshd, make_gate, echo, places, host
) -> None:
    gate = make_gate(sshd, account={"forward_to": places})
    done = gate.ssh(options=["-W", f"{host}:{echo}"], input=b"hello")
    assert b"hello" not in done.stdout
    assert b"not allowed" in done.stderr
    gate.ended()
    event = gate.kinds("forward")[0]
    assert (event["host"], event["ok"]) == (host, False)


def test_abuse_10_the_right_to_forward_is_needed_besides_a_destination(sshd, make_gate, echo) -> None:
    gate = make_gate(sshd, account={"allow": ["shell"], "forward_to": ["127.0.0.0/8:*"]})
    done = gate.ssh(options=["-W", f"127.0.0.1:{echo}"], input=b"hello")
    assert done.stdout == b""
    gate.ended()
    assert gate.kinds("forward")[0]["ok"] is False


def test_a_remote_forward_comes_back_to_the_user(sshd, make_gate, echo) -> None:
    port = free_port()
    gate = make_gate(sshd, account={"remote_bind": [f"127.0.0.1:{port}-{port}"]})
    with background(gate, "-R", f"{port}:127.0.0.1:{echo}"):
        wait_for(lambda: listens(port), "the bound port")
        assert ask(port, b"y" * 50_000) == b"y" * 50_000
    gate.ended()
    assert [event["ok"] for event in gate.kinds("bind") if "ok" in event] == [True]
    assert any(e.get("dir") == "remote" and e.get("down") == 50_000 for e in gate.kinds("forward"))


def test_any_port_may_be_bound_where_all_may(sshd, make_gate, echo) -> None:
    gate = make_gate(sshd, account={"remote_bind": ["127.0.0.1:*"]})
    done = gate.ssh("true", options=["-R", f"0:127.0.0.1:{echo}"])
    assert b"Allocated port" in done.stderr


@pytest.mark.parametrize("where", ["127.0.0.1:9", "0.0.0.0:{}", "[::1]:{}"])
def test_abuse_10_a_port_that_is_not_allowed_is_not_bound(sshd, make_gate, echo, where) -> None:
    port = free_port()
    gate = make_gate(sshd, account={"remote_bind": [where.format(port)]})
    done = gate.ssh(
        "true", options=["-o", "ExitOnForwardFailure=yes", "-R", f"127.0.0.1:{port}:127.0.0.1:{echo}"]
    )
    assert done.returncode == 255
    assert not listens(port)
    gate.ended()
    assert gate.kinds("bind")[0]["ok"] is False


def test_tunnels_and_sockets_are_refused(gate, tmp_path) -> None:
    port = free_port()
    with background(gate, "-L", f"{port}:{tmp_path}/socket"):
        wait_for(lambda: listens(port), "the forward")
        with contextlib.suppress(OSError):
            assert ask(port, b"hello") == b""
    done = gate.ssh("true", options=["-o", "ExitOnForwardFailure=yes", "-R", f"{tmp_path}/s:127.0.0.1:1"])
    assert done.returncode == 255
    gate.ended()
    assert {event["what"] for event in gate.kinds("refused")} == {
        "direct-streamlocal@openssh.com",
        "streamlocal-forward@openssh.com",
    }
