"""Past every bound in time and number that the other files do not pass."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import threading
import time

import pytest
from patience import Metronome

from pam_agent.protocols.base import TlsPolicy
from pam_agent.protocols.http import client_side, exchange, target_side, upload

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def read_all(sock: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := sock.recv(65536):
            data += piece
    return data


def test_http_a_client_that_does_not_say_what_it_carries_is_cut(make_gate, make_app, monkeypatch):
    monkeypatch.setattr(client_side, "PREAMBLE_SECONDS", 0.2)
    gate = make_gate(make_app(OK).port)
    gate.said = b"{"
    with gate.connect() as sock:
        assert b"200 OK" not in read_all(sock)
    gate.wait_done()
    assert "took longer than" in str(gate.errors[0])


def test_http_a_head_that_does_not_end_is_cut(make_gate, make_app, monkeypatch):
    monkeypatch.setattr(client_side, "HEAD_SECONDS", 0.3)
    gate = make_gate(make_app(OK).port)
    with gate.connect() as sock:
        # Until it begins nobody hurries it.
        time.sleep(0.6)
        sock.sendall(b"GET / HTTP/1.1\r\n")
        assert b"200 OK" not in read_all(sock)
    gate.wait_done()
    assert "the head of a request took longer than" in str(gate.errors[0])


def test_http_a_program_that_still_sends_after_its_refusal_is_cut(make_gate, make_app, monkeypatch, wait_for):
    monkeypatch.setattr(client_side, "LINGER_SECONDS", 0.3)
    gate = make_gate(make_app(OK).port, account={"rules": {"max_request": 10}})
    with gate.connect() as sock:
        head = f"POST / HTTP/1.1\r\nHost: {gate.host}\r\nContent-Length: 1000000\r\n\r\n"
        sock.sendall(head.encode())
        with Metronome() as beat:
            began = time.monotonic()
            wait_for(lambda: gate.threads)
            gate.wait_done()  # though the client neither sends nor closes
            assert time.monotonic() - began - beat.lost() < 20
        assert read_all(sock).startswith(b"HTTP/1.1 413")


def test_http_an_app_that_never_answers_is_given_up(make_gate, make_app, ask, monkeypatch):
    monkeypatch.setattr(exchange, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(exchange, "WATCH_SECONDS", 0.1)
    hold = threading.Event()
    gate = make_gate(make_app(lambda sock, app: (app.read_head(sock), hold.wait(60))).port)
    answer = ask(gate, b"GET / HTTP/1.1\r\nHost: HOST\r\n\r\n")
    hold.set()
    assert answer.startswith(b"HTTP/1.1 502")
    assert b"the app has not answered for" in answer


def test_http_an_app_that_answers_slowly_while_it_is_sent_a_body_is_not(make_gate, make_app, monkeypatch):
    monkeypatch.setattr(exchange, "ANSWER_SECONDS", 10.0)
    monkeypatch.setattr(exchange, "WATCH_SECONDS", 0.1)

    def serve(sock, app):
        app.read_head(sock)
        left = 12 * 20_000
        while left:
            left -= len(sock.recv(65536))
        sock.sendall(OK)

    gate = make_gate(make_app(serve).port)
    with gate.connect() as sock:
        sock.sendall(
            f"POST / HTTP/1.1\r\nHost: {gate.host}\r\nContent-Length: {12 * 20_000}\r\n\r\n".encode()
        )
        for _ in range(12):
            sock.sendall(bytes(20_000))
            time.sleep(1)
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")


def test_http_an_app_that_does_not_shake_hands_is_given_up(make_gate, make_app, ask, monkeypatch):
    monkeypatch.setattr(target_side, "SECURE_SECONDS", 0.3)
    hold = threading.Event()
    gate = make_gate(make_app(lambda sock, app: hold.wait(60)).port, tls=TlsPolicy(mode="require"))
    answer = ask(gate, b"GET / HTTP/1.1\r\nHost: HOST\r\n\r\n")
    hold.set()
    assert answer.startswith(b"HTTP/1.1 502")
    assert b"the app does not answer" in answer


def test_http_a_thread_that_cannot_be_woken_is_left_behind(monkeypatch):
    monkeypatch.setattr(upload, "JOIN_SECONDS", 0.2)
    hold = threading.Event()

    class Stuck:
        def piece(self):
            hold.wait(600)

        def linger(self, reader):
            pass

        def abort(self):
            pass

        def send_end(self):
            pass

    class Quiet:
        def end(self, **more):
            return {}

        def record(self, events):
            pass

    one = upload.Upload(Stuck(), Stuck(), Quiet(), None, Quiet())
    one.start("test")
    began = time.monotonic()
    one.finish()
    assert time.monotonic() - began < 60
    hold.set()


def test_abuse_29_a_slow_reader_slows_the_app(make_gate, make_app, wait_for):
    """What the app sends and nobody reads waits in the app, not in the agent."""
    sent = [0]
    total = 200 << 20

    def serve(sock, app):
        app.read_head(sock)
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % total)
        piece = bytes(65536)
        while sent[0] < total:
            sock.sendall(piece)
            sent[0] += len(piece)

    gate = make_gate(make_app(serve).port, keep_events=False)
    with gate.connect() as sock:
        sock.sendall(f"GET / HTTP/1.1\r\nHost: {gate.host}\r\n\r\n".encode())
        sock.recv(10)
        last = -1
        while last != sent[0]:
            last = sent[0]
            time.sleep(0.5)
        assert last < 40 << 20  # socket buffers
        got = 10
        while got < total:
            data = sock.recv(1 << 20)
            assert data
            got += len(data)


def test_abuse_29_a_slow_app_slows_the_sender(make_gate, make_app):
    go = threading.Event()
    total = 60 << 20

    def serve(sock, app):
        app.read_head(sock)
        go.wait(60)
        left = total
        while left:
            left -= len(sock.recv(1 << 20))
        sock.sendall(OK)

    gate = make_gate(make_app(serve).port, keep_events=False)
    sent = [0]
    with gate.connect() as sock:
        sock.sendall(f"POST / HTTP/1.1\r\nHost: {gate.host}\r\nContent-Length: {total}\r\n\r\n".encode())

        def send() -> None:
            piece = bytes(65536)
            while sent[0] < total:
                sock.sendall(piece)
                sent[0] += len(piece)

        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        last = -1
        while last != sent[0]:
            last = sent[0]
            time.sleep(0.5)
        assert last < 40 << 20
        go.set()
        thread.join(60)
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")


def test_abuse_29_requests_that_come_too_early_wait_outside(make_gate, make_app):
    """Hundreds of requests at once are served one after another; no queue of them grows."""
    count = 300
    gate = make_gate(make_app(OK).port, keep_events=False)
    request = f"GET / HTTP/1.1\r\nHost: {gate.host}\r\n\r\n".encode()
    with gate.connect() as sock:

        def send() -> None:
            for _ in range(count):
                sock.sendall(request)
            sock.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        answers = read_all(sock).count(b"HTTP/1.1 200 OK")
        thread.join(60)
    assert answers == count


@pytest.mark.slow
def test_http_a_gibibyte_goes_both_ways_in_flat_memory(make_gate, make_app):
    import resource

    total = 1 << 30
    piece = bytes(range(256)) * 1024

    def serve(sock, app):
        app.read_head(sock)
        left, digest = total, hashlib.sha256()
        while left:
            data = sock.recv(1 << 20)
            digest.update(data)
            left -= len(data)
        app.received.append(digest.hexdigest().encode())
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % total)
        for _ in range(total // len(piece)):
            sock.sendall(piece)

    app = make_app(serve)
    gate = make_gate(app.port)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    digest = hashlib.sha256()
    with gate.connect() as sock:
        sock.sendall(f"POST / HTTP/1.1\r\nHost: {gate.host}\r\nContent-Length: {total}\r\n\r\n".encode())
        for _ in range(total // len(piece)):
            sock.sendall(piece)
            digest.update(piece)
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += sock.recv(1)
        got, back = 0, hashlib.sha256()
        while got < total:
            data = sock.recv(1 << 20)
            back.update(data)
            got += len(data)
    gate.wait_done()
    assert app.received[-1].decode() == digest.hexdigest() == back.hexdigest()
    ends = [event for event in gate.of("body") if event.get("done")]
    assert [event["sha256"] for event in ends] == [digest.hexdigest()] * 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40 << 10  # KiB
