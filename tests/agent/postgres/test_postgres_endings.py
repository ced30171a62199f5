"""How connections to a real PostgreSQL are cancelled, killed, refused and slowed down."""

from __future__ import annotations

import os
import resource
import socket
import struct
import subprocess
import threading
import time

import psycopg
import pytest

from pam_agent.protocols.base import ClientProtocolError
from pam_common.errors import PamError

pytestmark = pytest.mark.slow


def until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def raw(gate, database="app"):
    """A client of our own, logged in: the socket and the bytes of the greeting."""
    sock = socket.create_connection(("127.0.0.1", gate.port), timeout=120)
    body = struct.pack("!I", 196608) + f"user\0x\0database\0{database}\0\0".encode()
    sock.sendall(struct.pack("!I", len(body) + 4) + body)
    data = b""
    while not data.endswith(b"Z\0\0\0\5I"):
        part = sock.recv(65536)
        assert part, data
        data += part
    return sock, data


def query(sock, text):
    body = text.encode() + b"\0"
    sock.sendall(b"Q" + struct.pack("!I", 4 + len(body)) + body)


def read_all(sock):
    data = b""
    while part := sock.recv(65536):
        data += part
    return data


def test_postgres_cancel_stops_the_right_query(pg15, make_gate):
    gate = make_gate(pg15)
    ends: dict[int, str] = {}

    def sleep(number: int, connection: psycopg.Connection) -> None:
        try:
            connection.execute(f"select pg_sleep(300), {number}")
            ends[number] = "slept"
        except psycopg.errors.QueryCanceled:
            ends[number] = "canceled"
        except psycopg.errors.AdminShutdown:
            ends[number] = "ended"

    connections = [psycopg.connect(gate.url()) for _ in range(4)]
    threads = [threading.Thread(target=sleep, args=pair) for pair in enumerate(connections)]
    for thread in threads:
        thread.start()
    until(lambda: pg15.sleepers() == 4)
    connections[2].cancel_safe(timeout=60)
    threads[2].join(60)
    assert ends == {2: "canceled"}
    assert connections[2].info.transaction_status is not None
    gate.end("test is over")
    for thread in threads:
        thread.join(60)
    assert ends == {0: "ended", 1: "ended", 2: "canceled", 3: "ended"}
    assert [event["known"] for event in gate.of("cancel")] == [True]
    pg15.sql("select pg_terminate_backend(pid) from pg_stat_activity where wait_event = 'PgSleep'")


def test_postgres_cancel_with_a_foreign_key_is_ignored(pg15, make_gate):
    gate, other = make_gate(pg15), make_gate(pg15)
    sock, greeting = raw(other)
    at = greeting.index(b"K\0\0\0\x0c")
    key = greeting[at + 5 : at + 13]
    with socket.create_connection(("127.0.0.1", gate.port), timeout=60) as cancel:
        cancel.sendall(struct.pack("!II", 16, 80877102) + key)
        assert cancel.recv(1) == b""
    gate.wait_done()
    assert [event["known"] for event in gate.of("cancel")] == [False]
    assert gate.targets == []  # nothing was dialled
    sock.close()


def test_postgres_client_never_sees_the_targets_key(pg15, make_gate):
    gate = make_gate(pg15)
    sock, greeting = raw(gate)
    at = greeting.index(b"K\0\0\0\x0c")
    pid, secret = struct.unpack("!I4s", greeting[at + 5 : at + 13])
    # Straight to the server with what the client knows: nothing happens, for the secret is ours.
    query(sock, "select pg_sleep(0.5), 'slept'")
    with socket.create_connection(("127.0.0.1", pg15.port), timeout=60) as cancel:
        cancel.sendall(struct.pack("!III", 16, 80877102, pid) + secret)
        assert cancel.recv(1) == b""
    sock.shutdown(socket.SHUT_WR)
    assert b"slept" in read_all(sock)
    sock.close()


def test_postgres_kill_says_why(pg15, make_gate):
    gate = make_gate(pg15)
    sock, _ = raw(gate)
    gate.end("the session was killed: by an admin")
    last = read_all(sock)
    assert last.startswith(b"E")
    assert b"C57P01\0" in last
    assert b"the session was killed: by an admin" in last
    gate.wait_done()
    sock.close()


def test_postgres_kill_while_the_client_does_not_read(pg15, make_gate):
    gate = make_gate(pg15)
    sock, _ = raw(gate)
    query(sock, "select repeat('x', 1000) from generate_series(1, 1000000)")
    conversation = gate.conversations[0]
    until(lambda: conversation.touched > 5)
    gate.end("killed")
    gate.clients[0].abort()  # the session does so after 0.3 s
    gate.wait_done()
    sock.close()


def test_postgres_slow_reader_slows_the_target(pg15, make_gate):
    gate = make_gate(pg15, keep_events=False)
    sock, _ = raw(gate)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    query(sock, "select repeat('x', 1000) from generate_series(1, 300000)")
    time.sleep(1)  # what it cannot send it must not gather
    received = 0
    tail = b""
    while not tail.endswith(b"Z\0\0\0\5I"):
        part = sock.recv(1 << 18)
        received += len(part)
        tail = (tail + part)[-6:]
    assert received > 300_000_000
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 30_000, f"{grown} kB"
    sock.close()


def test_postgres_pipelining_without_reading_is_bounded(pg15, make_gate):
    """A client that only sends is made to wait; what is remembered of its messages stays small."""
    gate = make_gate(pg15, keep_events=False)
    sock, _ = raw(gate)
    parse = b"P" + struct.pack("!I", 4 + 2 + 9 + 2) + b"s\0select 1\0\0\0"
    step = b"B" + struct.pack("!I", 4 + 9) + b"\0s\0" + bytes(6) + b"E\0\0\0\x09\0\0\0\0\0"
    flood = step * 4_000_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sock.settimeout(4)
    sock.sendall(parse + b"S\0\0\0\4")
    with pytest.raises(TimeoutError):
        sock.sendall(flood)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
    gate.end("enough")
    gate.clients[0].abort()
    gate.wait_done()
    sock.close()


def test_postgres_half_close_still_gets_the_answer(pg15, make_gate):
    gate = make_gate(pg15)
    sock, _ = raw(gate)
    query(sock, "select 'last'")
    sock.shutdown(socket.SHUT_WR)
    assert b"last" in read_all(sock)
    gate.wait_done()
    assert gate.errors == []


def test_postgres_client_vanishes(pg15, make_gate):
    gate = make_gate(pg15)
    sock, _ = raw(gate)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()  # RST
    gate.wait_done()
    assert gate.of("end")[0]["reason"] in ("client gone", "client closed")


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (b"p\0\0\0\x0aabcdef", b"unexpected message 'p' after login"),
        (b"Q\0\0\0\3", b"impossible length"),
        (b"Q\xff\xff\xff\xff", b"impossible length"),
        (b"Q\0\0\0\x0bab\0cd\0\0", b"first zero byte"),
        (b"\x16\3\1\0\x10", b"unexpected message 0x16"),
        (b"X\0\0\0\4Q\0\0\0\5\0", b""),
    ],
)
def test_postgres_client_breaks_the_protocol(pg15, make_gate, message, text):
    gate = make_gate(pg15)
    sock, _ = raw(gate)
    sock.sendall(message)
    answer = read_all(sock)
    gate.wait_done()
    if text:
        assert b"C08P01\0" in answer
        assert text in answer
        assert isinstance(gate.errors[0], ClientProtocolError)
    sock.close()


def test_postgres_server_shutdown_reaches_the_client(pg15, make_gate, psql):
    gate = make_gate(pg15)
    sock, _ = raw(gate)
    until(lambda: len(gate.of("start")) == 1)
    pg15.sql(f"select pg_terminate_backend({gate.of('start')[0]['pid']})")
    answer = read_all(sock)
    assert answer.count(b"C57P01\0") == 1
    gate.wait_done()
    assert gate.errors == []
    assert gate.of("end")[0]["reason"] == "target ended the connection"


def test_postgres_target_crashes(pg15, make_gate):
    gate = make_gate(pg15)
    sock, _ = raw(gate)
    gate.targets[0].shutdown(socket.SHUT_RDWR)
    answer = read_all(sock)
    assert b"C08006\0" in answer
    gate.wait_done()


def test_postgres_no_recorder_no_query(pg15, make_gate):
    gate = make_gate(pg15)
    sock, _ = raw(gate)
    gate.recorder_error = PamError("the recording cannot be written: no space left on device")
    marker = f"select 'marker-{os.getpid()}-{time.time_ns()}'"
    query(sock, marker)
    answer = read_all(sock)
    assert b"C58030\0" in answer
    assert b"no space left" in answer
    gate.wait_done()
    assert marker not in pg15.log.read_text()


def test_postgres_no_recorder_no_login(pg15, make_gate, psql):
    gate = make_gate(pg15)
    gate.recorder_error = PamError("the recording cannot be written")
    done = psql(gate, "select 1")
    assert done.returncode == 2
    assert "the recording cannot be written" in done.stderr


def test_postgres_port_check_is_no_error(pg15, make_gate):
    gate = make_gate(pg15)
    socket.create_connection(("127.0.0.1", gate.port)).close()
    ready = subprocess.run([pg15.bin / "pg_isready", "-h", "127.0.0.1", "-p", str(gate.port)], check=False)
    assert ready.returncode == 0
    gate.wait_done()


def test_postgres_gigabyte_row_needs_no_memory(pg15, make_gate, tmp_path):
    """One row of 900 MB: followed piece by piece."""
    gate = make_gate(pg15)
    sock, _ = raw(gate)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    query(sock, "select repeat('x', 450000000), repeat('y', 450000000)")
    received = 0
    tail = b""
    buffer = bytearray(1 << 18)
    while not tail.endswith(b"Z\0\0\0\5I"):
        size = sock.recv_into(buffer)
        assert size
        received += size
        tail = (tail + bytes(buffer[max(size - 6, 0) : size]))[-6:]
    assert received > 900_000_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000
    sock.close()
    gate.wait_done()
    result = gate.of("result")[0]
    assert (result["rows"], result["bytes"]) == (1, 900_000_000 + 10)
    assert len(gate.of("progress")) >= 10
