"""What the server bounds by itself, as a process whose times are made short."""

import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from patience import Metronome
from processes import Process, family, free_port, listens, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("test_serve_bounds")]

PROGRAM = Path(sys.executable).parent / "pam-platform"
HEALTH = b"GET /api/v1/health HTTP/1.1\r\nHost: 127.0.0.1\r\n"

#: The real server; only its times and its number of connections are smaller. And it has an endless stream.
SERVE = """
import json, sys
from pam_platform import serve
whole, changed = serve.gunicorn_settings, json.loads(sys.argv.pop(1))
smaller = {"timeout": 60, "graceful_timeout": 1, "keepalive": 1, "worker_connections": 6}
serve.gunicorn_settings = lambda settings: {**whole(settings), **smaller, **changed.pop("gunicorn", {})}
vars(serve).update(changed)

load = serve.Application.load
class Endless:
    streaming = True
    def __iter__(self):
        while True:
            yield bytes(10000)
def app(environ, start):
    if environ["PATH_INFO"] != "/endless":
        return real(environ, start)
    start("200 OK", [])
    return Endless()
def load_both(self):
    global real
    real = load(self)
    return app
serve.Application.load = load_both

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


def certify(folder):
    """gunicorn's settings for a certificate of its own."""
    key = ec.generate_private_key(ec.SECP256R1())
    name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "platform")]), datetime.now(UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    made = made.not_valid_before(now - timedelta(minutes=1)).not_valid_after(now + timedelta(hours=1))
    certificate = made.sign(key, hashes.SHA256())
    (folder / "tls.crt").write_bytes(certificate.public_bytes(Encoding.PEM))
    (folder / "tls.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return {"certfile": str(folder / "tls.crt"), "keyfile": str(folder / "tls.key")}


@pytest.fixture
def server(folder, request):
    """The parameter changes what ``serve`` bounds, and what it sets for gunicorn."""
    path, port = folder
    changed = dict(getattr(request, "param", {}))
    if changed.pop("tls", False):
        changed["gunicorn"] = certify(path)
    command = [sys.executable, "-c", SERVE, json.dumps(changed), "--config", path / "platform.yml", "serve"]
    (path / "log").write_text("")
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


# Not sooner, since a busy one may well stall.
@pytest.mark.parametrize("server", [{"gunicorn": {"timeout": 8}}], indirect=True)
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


# --- clients that are slow ------------------------------------------------------------------------------

THREADS = 4
OPENAPI = b"GET /api/v1/openapi.json HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
#: The same in three seconds; who is honest is above it by far.
RATE = {"SLOW_PERIOD": 3, "SLOW_BYTES": 1000}


def cuts(server):
    return server.log.read_text().count("a client was too slow")


def connected(server, data):
    """A client that takes little into its buffers."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    sock.connect(("127.0.0.1", server.port))
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        sock.send(data)
    return sock


def trickle(server, head):
    """As many clients as there are threads send ``head``, and then a byte now and then, until all are cut."""
    socks = [connected(server, head) for _ in range(THREADS)]

    def all_cut():
        for sock in socks:
            with contextlib.suppress(OSError):
                sock.send(b"a")
        time.sleep(0.2)
        return cuts(server) >= THREADS

    wait_for(all_cut, "an end of clients that send a byte now and then")
    for sock in socks:
        sock.close()


@pytest.mark.parametrize("server", [{"HEAD_TIMEOUT": 2}], indirect=True)
def test_a_head_that_does_not_end_is_cut(server):
    trickle(server, HEALTH + b"X-A: ")
    assert b"200" in ask(server.port)[1]


@pytest.mark.parametrize("server", [{"HEAD_TIMEOUT": 2, "tls": True}], indirect=True)
def test_a_tls_handshake_that_does_not_end_is_cut(server):
    trickle(server, bytes.fromhex("1603010200 010001fc 0303"))
    with socket.create_connection(("127.0.0.1", server.port), timeout=90) as raw:
        context = ssl.create_default_context(cafile=server.log.with_name("tls.crt"))
        context.check_hostname = False
        context.wrap_socket(raw).close()


LOGIN = (
    b"POST /accounts/login/ HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    b"Content-Type: application/x-www-form-urlencoded\r\nContent-Length: %d\r\n\r\nlogin="
)


@pytest.mark.parametrize("server", [RATE], indirect=True)
def test_a_body_that_trickles_is_cut(server):
    trickle(server, LOGIN % 60000)
    assert b"200" in ask(server.port)[1]


@pytest.mark.parametrize("server", [RATE], indirect=True)
def test_a_body_that_nobody_wants_and_that_trickles_is_cut(server):
    trickle(server, HEALTH + b"Content-Length: 60000\r\n\r\n")


@pytest.mark.parametrize("server", [RATE], indirect=True)
def test_a_slow_body_is_not_cut(server):
    """Longer than the period."""
    size = 24000
    with socket.create_connection(("127.0.0.1", server.port), timeout=90) as sock:
        sock.sendall(LOGIN % size)
        for _ in range(size // 400):
            time.sleep(0.1)
            sock.sendall(b"x" * 400)
        assert b"403" in sock.recv(65536).split(b"\r\n")[0]  # a form without its CSRF token
    assert cuts(server) == 0


@pytest.mark.parametrize("server", [RATE], indirect=True)
def test_answers_that_are_not_read_are_cut(server):
    socks = [connected(server, OPENAPI * 400) for _ in range(THREADS)]
    sock, line = ask(server.port)
    assert b"200" in line
    wait_for(lambda: cuts(server) >= THREADS, "an end of clients that do not read")
    for each in (sock, *socks):
        each.close()


@pytest.mark.parametrize("server", [RATE], indirect=True)
def test_answers_that_are_read_slowly_are_not_cut(server):
    asked = 40
    with contextlib.closing(connected(server, OPENAPI * asked)) as sock:
        sock.settimeout(90)
        found = 0
        while found < asked:
            time.sleep(0.02)
            found += sock.recv(4096).count(b"HTTP/1.1 200")
    assert cuts(server) == 0


@pytest.mark.parametrize("server", [{**RATE, "PAUSE_TIMEOUT": 9}], indirect=True)
def test_a_stream_may_pause_but_not_for_ever(server):
    stream = connected(server, b"GET /endless HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    other = connected(server, OPENAPI * 400)
    wait_for(lambda: cuts(server) == 1, "an end of the one whose answers are no stream")
    stream.settimeout(90)
    for _ in range(1000):  # what was under way, and more
        assert stream.recv(10000)
    wait_for(lambda: cuts(server) == 2, "an end of the stream that nobody reads")
    stream.close()
    other.close()


def test_who_does_not_hang_up_holds_up_nobody(server):
    """gunicorn waits two seconds for the client to close, in the thread that all others need."""
    ask(server.port)[0].close()  # it is up
    with Metronome() as beat:
        began = time.monotonic()
        held = [ask(server.port, HEALTH + b"Connection: close\r\n") for _ in range(THREADS)]
        assert time.monotonic() - began - beat.lost() < 4
    for sock, line in held:
        assert b"200" in line
        sock.close()
