"""What the server bounds by itself, as a process whose times are made short."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from patience import Metronome
from processes import Process, family, free_port, listens, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("test_serve_bounds")]

PROGRAM = Path(sys.executable).parent / "pam-platform"
HEALTH = b"GET /api/v1/health HTTP/1.1\r\nHost: 127.0.0.1\r\n"

#: The real server; only its times and its number of connections are smaller.
SERVE = """
import sys
from pam_platform import serve
whole, TIMEOUT = serve.gunicorn_settings, int(sys.argv.pop(1))
serve.gunicorn_settings = lambda settings: {
    **whole(settings), "timeout": TIMEOUT, "graceful_timeout": 1, "keepalive": 1, "worker_connections": 6
}
from pam_platform.__main__ import main
main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("platform")
    values = {"public_url": "http://127.0.0.1", "state_dir": str(folder / "state"), "threads": 4}
    port = free_port()
    (folder / "platform.yml").write_text(yaml.safe_dump({**values, "listen": f"127.0.0.1:{port}"}))
    (folder / "password").touch(mode=0o600)
    (folder / "password").write_text("correct horse battery")
    words = ["--config", folder / "platform.yml", "init", "--admin", "root"]
    subprocess.run([PROGRAM, *words, "--password-file", folder / "password"], check=True, capture_output=True)
    return folder, port


@pytest.fixture
def server(folder, request):
    """The parameter is the time after which a worker counts as hung, since a busy one may well stall."""
    path, port = folder
    timeout = str(getattr(request, "param", 60))
    command = [sys.executable, "-c", SERVE, timeout, "--config", path / "platform.yml", "serve"]
    process = Process("platform", command, path / "log")
    process.ready_when(lambda: listens(port))
    process.port = port
    yield process
    process.stop()


def ask(port, head=HEALTH, timeout=90.0):
    """The first line of the answer; the connection stays open."""
    sock = socket.create_connection(("127.0.0.1", port), timeout=timeout)
    sock.sendall(head + b"\r\n")
    return sock, sock.recv(65536).split(b"\r\n")[0]


def test_a_connection_is_not_kept_for_ever(server):
    from pam_platform import serve

    assert serve.KEEPALIVE == 30
    sock, line = ask(server.port)
    assert b"200" in line
    with sock, Metronome() as beat:
        started = time.monotonic()
        while sock.recv(65536):
            pass
        assert time.monotonic() - started - beat.lost() < 10


@pytest.mark.parametrize(
    "head",
    [
        b"GET /api/v1/health?" + b"x" * 4094 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n",
        HEALTH + b"".join(b"X-Field-%d: x\r\n" % number for number in range(51)),
        HEALTH + b"X-Field: " + b"x" * 16381 + b"\r\n",
    ],
    ids=["line", "fields", "field"],
)
def test_a_request_with_too_long_a_head_is_refused(server, head):
    sock, line = ask(server.port, head)
    sock.close()
    assert line.split()[1][:1] == b"4"


def test_more_connections_than_a_worker_takes_wait(server):
    """The next is served when one of them has gone."""
    held = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(6)]
    for sock in held:
        sock.sendall(HEALTH)  # and not its end
    waiting = socket.create_connection(("127.0.0.1", server.port), timeout=2)
    waiting.sendall(HEALTH + b"\r\n")
    with pytest.raises(TimeoutError):
        waiting.recv(100)
    for sock in held:
        sock.close()
    waiting.settimeout(90)
    assert b"200" in waiting.recv(100)
    waiting.close()


@pytest.mark.parametrize("server", [8], indirect=True)
def test_a_worker_that_hangs_is_replaced(server):
    ask(server.port)[0].close()  # its first sign of life is what the others are counted from
    (worker,) = [pid for pid in family(server.pid) if pid != server.pid]
    os.kill(worker, signal.SIGSTOP)
    sock, line = ask(server.port, timeout=120)
    sock.close()
    assert b"200" in line
    wait_for(lambda: worker not in family(server.pid), "the end of the hung worker")


def test_a_request_under_way_does_not_hold_the_stop(server):
    sock = socket.create_connection(("127.0.0.1", server.port))
    sock.sendall(b"POST /api/v1/connect HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n{")
    time.sleep(0.5)  # a worker has taken it
    with Metronome() as beat:
        started = time.monotonic()
        assert server.stop(timeout=60) == 0
        assert time.monotonic() - started - beat.lost() < 8
    with contextlib.suppress(OSError):
        sock.close()
