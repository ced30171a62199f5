"""Requests and answers through the interceptor, with an app whose every byte is decided here."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import threading

import pytest

from pam_agent.protocols.http import target_side
from pam_common.errors import PamError

OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\nok"
CLOSE = b"Host: HOST\r\nConnection: close\r\n\r\n"


def read_until(sock: socket.socket, end: bytes) -> bytes:
    data = b""
    while not data.endswith(end):
        piece = sock.recv(1)
        assert piece, data
        data += piece
    return data


def test_http_requests_follow_each_other_on_both_connections(make_gate, make_app, ask):
    app = make_app(OK)
    gate = make_gate(app.port)
    first, second = b"GET /1 HTTP/1.1\r\nHost: HOST\r\n\r\n", b"GET /2 HTTP/1.1\r\n" + CLOSE
    answer = ask(gate, first + second)  # at once: the second waits for the first one's answer
    assert answer.count(b"HTTP/1.1 200 OK") == 2
    assert app.connections == 1
    gate.wait_done()
    assert [event["kind"] for event in gate.events] == [
        *("start", "request", "response", "request", "response", "end")
    ]
    assert gate.events[1]["url"] == f"http://127.0.0.1:{app.port}/1"
    assert gate.events[2]["body"] == "ok"
    assert gate.events[2]["id"] == 1


def test_http_every_request_is_recorded_before_it_is_sent_and_every_answer_too(make_gate, make_app, ask):
    seen = []

    def serve(sock, app):
        app.read_head(sock)
        seen.append([event["kind"] for event in gate.events])
        sock.sendall(OK)

    app = make_app(serve)
    gate = make_gate(app.port)
    with gate.connect() as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: " + gate.host.encode() + b"\r\n\r\n")
        read_until(sock, b"ok")
        assert [event["kind"] for event in gate.events] == ["start", "request", "response"]
    assert seen == [["start", "request"]]


def test_http_nothing_goes_on_that_cannot_be_recorded(make_gate, make_app, ask):
    app = make_app(OK)
    gate = make_gate(app.port)
    with gate.connect() as sock:
        request = b"GET / HTTP/1.1\r\nHost: " + gate.host.encode() + b"\r\n\r\n"
        sock.sendall(request)
        read_until(sock, b"ok")
        gate.recorder_error = PamError("the disk is full")
        sock.sendall(request)
        answer = b""
        while piece := sock.recv(65536):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 502")
    assert b"the disk is full" in answer
    assert len(app.received) == 1


def test_http_a_head_request_has_an_answer_without_a_body(make_gate, make_app, ask):
    app = make_app(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    gate = make_gate(app.port)
    answer = ask(gate, b"HEAD / HTTP/1.1\r\nHost: HOST\r\n\r\nHEAD / HTTP/1.1\r\n" + CLOSE)
    assert answer.count(b"Content-Length: 1000") == 2
    assert answer.endswith(b"\r\n\r\n")
    assert app.connections == 1


def test_http_ranges_and_conditions_pass(make_gate, make_app, ask):
    app = make_app(
        b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 1-2/5\r\nContent-Length: 2\r\n\r\nbc"
    )
    gate = make_gate(app.port)
    answer = ask(gate, b'GET / HTTP/1.1\r\nRange: bytes=1-2\r\nIf-Range: "x"\r\n' + CLOSE)
    assert b"Content-Range: bytes 1-2/5" in answer
    assert answer.endswith(b"bc")
    assert b"Range: bytes=1-2" in app.received[0]
    assert b'If-Range: "x"' in app.received[0]


def test_http_a_post_is_sent_with_its_length(make_gate, make_app, ask):
    def serve(sock, app):
        app.read_head(sock)
        app.received.append(sock.recv(5, socket.MSG_WAITALL))
        sock.sendall(OK)

    app = make_app(serve)
    gate = make_gate(app.port)
    ask(
        gate,
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n"
        + CLOSE
        + b"2;x=y\r\nab\r\n3\r\ncde\r\n0\r\n\r\n",
    )
    # All of it was there, so it goes on in the one form that nobody reads differently.
    assert b"Content-Length: 5" in app.received[0]
    assert b"chunked" not in app.received[0].lower()
    assert app.received[1] == b"abcde"
    (request,) = gate.of("request")
    assert request["body_bytes"] == 5


def test_http_a_long_upload_is_streamed_counted_and_hashed(make_gate, make_app):
    size = 20 << 20
    digest = hashlib.sha256()

    def serve(sock, app):
        head = app.read_head(sock)
        assert f"Content-Length: {size}".encode() in head
        left = size
        while left:
            data = sock.recv(65536)
            digest.update(data)
            left -= len(data)
        sock.sendall(OK)

    app = make_app(serve)
    gate = make_gate(app.port)
    with gate.connect() as sock:
        head = f"PUT /file HTTP/1.1\r\nHost: {gate.host}\r\nContent-Length: {size}\r\n\r\n"
        sock.sendall(head.encode())
        piece = bytes(range(256)) * 256
        for _ in range(size // len(piece)):
            sock.sendall(piece)
        read_until(sock, b"ok")
    gate.wait_done()
    (last,) = [event for event in gate.of("body") if event.get("done")]
    assert last["bytes"] == size
    assert last["sha256"] == digest.hexdigest()
    assert gate.of("request")[0]["body_bytes"] is None


def test_http_a_long_upload_may_be_answered_early(make_gate, make_app):
    """The app refuses a large upload after its head; the client reads that though it is still sending."""

    def serve(sock, app):
        app.read_head(sock)
        sock.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\nConnection: close\r\n\r\nno!")
        sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):
            while sock.recv(65536):
                pass

    app = make_app(serve)
    gate = make_gate(app.port)
    with gate.connect() as sock:
        size = 100 << 20
        sock.sendall(f"POST / HTTP/1.1\r\nHost: {gate.host}\r\nContent-Length: {size}\r\n\r\n".encode())
        answer = b""

        def send() -> None:
            with contextlib.suppress(OSError):
                for _ in range(size >> 16):
                    sock.sendall(bytes(65536))

        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        with contextlib.suppress(OSError):
            while piece := sock.recv(65536):
                answer += piece
        assert answer.startswith(b"HTTP/1.1 413 Too Large")
        assert answer.endswith(b"no!")
        thread.join(60)
        assert not thread.is_alive()
    gate.wait_done()


def test_http_bodies_may_flow_both_ways_at_once(make_gate, make_app):
    """An app that answers each piece as it comes: with one thread this would stop for ever."""
    rounds, piece = 200, b"x" * 65536

    def serve(sock, app):
        app.read_head(sock)
        sock.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        left = rounds * len(piece)
        while left:
            data = sock.recv(65536)
            left -= len(data)
            sock.sendall(b"%x\r\n%b\r\n" % (len(data), data))
        sock.sendall(b"0\r\n\r\n")

    app = make_app(serve)
    gate = make_gate(app.port)
    with gate.connect() as sock:
        head = f"POST / HTTP/1.1\r\nHost: {gate.host}\r\nContent-Length: {rounds * len(piece)}\r\n\r\n"
        sock.sendall(head.encode())
        got = 0

        def receive() -> None:
            nonlocal got
            read_until(sock, b"\r\n\r\n")
            data = b""
            while not data.endswith(b"0\r\n\r\n"):
                data = data[-5:] + sock.recv(65536)
                got += 1

        thread = threading.Thread(target=receive, daemon=True)
        thread.start()
        for _ in range(rounds):
            sock.sendall(piece)
        thread.join(60)
        assert not thread.is_alive()
    gate.wait_done()
    assert [e["bytes"] for e in gate.of("body") if e.get("done")] == [rounds * len(piece)] * 2


def test_http_100_continue_is_the_apps_to_give(make_gate, make_app):
    def serve(sock, app):
        app.read_head(sock)
        sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        app.received.append(sock.recv(4, socket.MSG_WAITALL))
        sock.sendall(OK)

    app = make_app(serve)
    gate = make_gate(app.port)
    with gate.connect() as sock:
        head = f"POST / HTTP/1.1\r\nHost: {gate.host}\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n"
        sock.sendall(head.encode())
        assert read_until(sock, b"\r\n\r\n").startswith(b"HTTP/1.1 100")
        sock.sendall(b"body")
        read_until(sock, b"ok")
    assert b"Expect: 100-continue" in app.received[0]
    assert app.received[1] == b"body"


def test_http_100_continue_that_is_refused(make_gate, make_app, ask):
    app = make_app(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
    gate = make_gate(app.port)
    answer = ask(
        gate, b"POST / HTTP/1.1\r\nHost: HOST\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n", end=False
    )
    assert answer.startswith(b"HTTP/1.1 403")
    assert b"Connection: close" in answer  # the body may come or not: nobody can tell


def test_http_interim_answers_nobody_asked_for_are_dropped(make_gate, make_app, ask):
    app = make_app(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n" + OK)
    gate = make_gate(app.port)
    assert ask(gate, b"GET / HTTP/1.1\r\n" + CLOSE).startswith(b"HTTP/1.1 200 OK")


def test_http_events_are_sent_on_as_they_come(make_gate, make_app):
    go = threading.Event()

    def serve(sock, app):
        app.read_head(sock)
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n")
        assert go.wait(60)
        sock.sendall(b"data: 2\n\n")
        sock.close()

    app = make_app(serve)
    gate = make_gate(app.port)
    with gate.connect() as sock:
        sock.sendall(f"GET / HTTP/1.1\r\nHost: {gate.host}\r\n\r\n".encode())
        read_until(sock, b"data: 1\n\n")
        recorded = "".join(e.get("data", "") for e in gate.of("body"))
        assert recorded == "data: 1\n\n"
        go.set()
        read_until(sock, b"0\r\n\r\n")
    gate.wait_done()
    assert "".join(e.get("data", "") for e in gate.of("body")) == "data: 1\n\ndata: 2\n\n"


def test_http_a_program_that_leaves_a_silent_answer_ends_it(make_gate, make_app, wait_for):
    """A closed tab: the app says nothing, so only the client's end can tell."""
    over = threading.Event()

    def serve(sock, app):
        app.read_head(sock)
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n: hello\n\n")
        assert sock.recv(1) == b""
        over.set()

    app = make_app(serve)
    gate = make_gate(app.port)
    sock = gate.connect()
    sock.sendall(f"GET / HTTP/1.1\r\nHost: {gate.host}\r\n\r\n".encode())
    read_until(sock, b"hello\n\n")
    sock.close()
    assert over.wait(60)
    gate.wait_done()
    assert [e for e in gate.of("body") if e.get("cut")]


def test_http_what_comes_while_an_answer_is_awaited_is_the_next_request(make_gate, make_app):
    go = threading.Event()

    def serve(sock, app):
        app.read_head(sock)
        assert go.wait(60)
        sock.sendall(OK)
        app.read_head(sock)
        sock.sendall(OK.replace(b"ok", b"2!"))

    app = make_app(serve)
    gate = make_gate(app.port)
    with gate.connect() as sock:
        request = f"GET / HTTP/1.1\r\nHost: {gate.host}\r\n\r\n".encode()
        sock.sendall(request)
        # By now somebody watches the client, whose next request must not be lost.
        assert not go.wait(2.5)
        sock.sendall(request)
        go.set()
        assert read_until(sock, b"ok").count(b"200 OK") == 1
        assert read_until(sock, b"2!").count(b"200 OK") == 1


def test_http_a_kept_connection_that_the_app_closed_is_dialled_again(make_gate, make_app):
    def serve(sock, app):
        app.read_head(sock)
        sock.sendall(OK)  # and closes without having said so

    app = make_app(serve)
    gate = make_gate(app.port)
    with gate.connect() as sock:
        for _ in range(5):
            sock.sendall(f"GET / HTTP/1.1\r\nHost: {gate.host}\r\n\r\n".encode())
            read_until(sock, b"ok")
    assert app.connections == 5
    assert not gate.errors


def test_http_a_request_that_changes_something_is_not_sent_twice(make_gate, make_app, ask):
    def serve(sock, app):
        if app.connections == 1:
            app.read_head(sock)
            sock.sendall(OK)
            app.read_head(sock)  # takes the second, and dies of it
            return
        app.read_head(sock)
        sock.sendall(OK)

    app = make_app(serve)
    gate = make_gate(app.port)
    first = b"GET / HTTP/1.1\r\nHost: HOST\r\n\r\n"
    answer = ask(gate, first + b"POST / HTTP/1.1\r\nContent-Length: 0\r\n" + CLOSE)
    assert b"HTTP/1.1 502" in answer
    assert [head.split()[0] for head in app.received] == [b"GET", b"POST"]
    # What may be repeated is.
    app.received.clear()
    app.connections = 0
    answer = ask(gate, first + b"GET /2 HTTP/1.1\r\n" + CLOSE)
    assert answer.count(b"200 OK") == 2
    assert len(app.received) == 3


def test_http_an_app_that_closes_after_each_answer(make_gate, make_app, wait_for):
    app = make_app(b"HTTP/1.0 200 OK\r\n\r\nold")
    gate = make_gate(app.port)

    def serve(sock, app):
        app.read_head(sock)
        sock.sendall(b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\nold")

    app.serve = serve
    with gate.connect() as sock:
        answers = 0
        closing = False
        while not closing:
            sock.sendall(f"GET / HTTP/1.1\r\nHost: {gate.host}\r\n\r\n".encode())
            head = read_until(sock, b"\r\n\r\n")
            closing = b"Connection: close" in head
            assert b"chunked" in head
            read_until(sock, b"0\r\n\r\n")
            answers += 1
        assert sock.recv(1) == b""  # before too many targets were dialled for one connection
    assert answers == target_side.MAX_TARGETS
    assert gate.conversations[0].dials == target_side.MAX_TARGETS
    # None of them is left open, though the session keeps a descriptor of each.
    for target in gate.targets:
        assert target.recv(1) == b""


def test_http_1_0_programs_are_served_and_closed(make_gate, make_app, ask):
    app = make_app(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n")
    gate = make_gate(app.port)
    answer = ask(gate, b"GET / HTTP/1.0\r\nHost: HOST\r\n\r\n")
    assert answer.endswith(b"\r\n\r\nok")
    assert b"chunked" not in answer


def test_http_an_app_that_is_not_there(make_gate, ask):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and nobody else is given it meanwhile
        gate = make_gate(closed.getsockname()[1])
        answer = ask(gate, b"GET / HTTP/1.1\r\nHost: HOST\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 502")
    assert [e["status"] for e in gate.of("failed")] == [502]


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\n\r\n",
        b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\x00b\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\n\r\n" * 40,
    ],
)
def test_http_an_app_that_answers_nonsense(make_gate, make_app, ask, answer):
    gate = make_gate(make_app(answer).port)
    got = ask(gate, b"GET / HTTP/1.1\r\n" + CLOSE)
    assert got.startswith(b"HTTP/1.1 502"), got


def test_http_an_answer_that_is_cut_is_cut_for_the_client_too(make_gate, make_app, ask):
    def serve(sock, app):
        app.read_head(sock)
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 100\r\n\r\nhalf")

    gate = make_gate(make_app(serve).port)
    with gate.connect() as sock:
        sock.sendall(f"GET / HTTP/1.0\r\nHost: {gate.host}\r\n\r\n".encode())
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := sock.recv(65536):
                answer += piece
    assert b"half" in answer
    gate.wait_done()
    (last,) = [e for e in gate.of("body") if e.get("done")]
    assert last["cut"] is True
    assert gate.errors


def test_http_a_kill_is_told_by_a_page(make_gate, make_app, wait_for):
    hold = threading.Event()

    def serve(sock, app):
        app.read_head(sock)
        hold.wait(60)

    gate = make_gate(make_app(serve).port)
    with gate.connect() as sock:
        sock.sendall(f"GET / HTTP/1.1\r\nHost: {gate.host}\r\n\r\n".encode())
        wait_for(lambda: gate.of("request"))
        wait_for(lambda: gate.targets)
        gate.end("the session was killed: <b>enough</b>")
        answer = b""
        while piece := sock.recv(65536):
            answer += piece
    hold.set()
    assert answer.startswith(b"HTTP/1.1 403")
    assert b"the session was killed: &lt;b&gt;enough" in answer
    gate.wait_done()
    assert gate.of("end")[-1]["reason"] == "the session was killed: <b>enough</b>"


def test_http_a_killed_answer_is_never_a_whole_one(make_gate, make_app):
    """Without a length, the end of the app's connection is the end of its answer; a kill is not."""
    hold = threading.Event()

    def serve(sock, app):
        app.read_head(sock)
        sock.sendall(b"HTTP/1.1 200 OK\r\n\r\nhalf")
        hold.wait(60)

    gate = make_gate(make_app(serve).port)
    with gate.connect() as sock:
        sock.sendall(f"GET / HTTP/1.1\r\nHost: {gate.host}\r\n\r\n".encode())
        read_until(sock, b"half\r\n")
        gate.end("killed")
        rest = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := sock.recv(65536):
                rest += piece
    hold.set()
    assert rest == b""


def test_http_a_session_that_is_refused_gets_a_page(make_gate, make_app):
    gate = make_gate(make_app(OK).port)
    left, right = socket.socketpair()
    with left, right:
        from pam_common.stream import SocketStream

        left.sendall(gate.line + f"GET / HTTP/1.1\r\nHost: {gate.host}\r\n\r\n".encode())
        left.shutdown(socket.SHUT_WR)
        type(gate.interceptor).refuse(SocketStream(right), "no <session>", "connect again.")
        right.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := left.recv(65536):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 403")
    assert b"no &lt;session&gt;" in answer
    assert b"HINT: connect again." in answer


def test_http_a_program_that_never_speaks_costs_no_target(make_gate, make_app):
    app = make_app(OK)
    gate = make_gate(app.port)
    gate.connect().close()
    gate.wait_done()
    assert app.connections == 0
