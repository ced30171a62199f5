"""WebSockets, with a server and a client that share no code with the interceptor's."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import websockets.exceptions
from websockets.sync.client import connect
from websockets.sync.server import ServerConnection, serve

SECRET = "tok-5f0c2a9e7b"


class Echo:
    """Says back what it hears; ``heads`` are the requests it was opened with."""

    def __init__(self) -> None:
        self.heads: list[Any] = []
        self._server = serve(self._talk, "127.0.0.1", 0, max_size=64 << 20)
        self.port = int(self._server.socket.getsockname()[1])
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def _talk(self, socket: ServerConnection) -> None:
        assert socket.request is not None
        self.heads.append(socket.request)
        with contextlib.suppress(websockets.exceptions.ConnectionClosed):
            for message in socket:
                if message == "close":
                    socket.close(4001, "as you wish")
                socket.send(message)

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join(60)


@pytest.fixture(scope="module")
def echo() -> Iterator[Echo]:
    made = Echo()
    yield made
    made.stop()


def opened(gate, path: str = "/ws", **more: Any):
    return connect(
        f"ws://{gate.host}{path}", sock=gate.connect(), max_size=64 << 20, close_timeout=10, **more
    )


def test_http_a_socket_carries_messages_and_they_are_recorded(make_gate, echo):
    gate = make_gate(echo.port, account={"login": "bearer"}, host="app.corp.example")
    with opened(gate) as socket:
        socket.send("grün")
        assert socket.recv(30) == "grün"
        assert [(e["dir"], e["opcode"], e["data"]) for e in gate.of("ws")] == [
            ("up", "text", "grün"),
            ("down", "text", "grün"),
        ]
        socket.send(b"\0\1")
        assert socket.recv(30) == b"\0\1"
        assert gate.of("ws")[-1]["base64"] == "AAE="
        socket.ping().wait(60)
    gate.wait_done()
    assert [(e["dir"], e["code"]) for e in gate.of("ws") if e["opcode"] == "close"] == [
        ("up", 1000),
        ("down", 1000),
    ]
    head = echo.heads[-1].headers
    assert head["Host"] == "app.corp.example"
    assert head["Authorization"] == f"Bearer {SECRET}"
    assert "Sec-WebSocket-Extensions" not in head  # though this client offers one
    assert SECRET not in json.dumps(gate.events)
    (response,) = gate.of("response")
    assert response["status"] == 101


def test_http_a_sockets_large_messages_pass_in_pieces(make_gate, echo):
    gate = make_gate(echo.port)
    data = bytes(range(256)) * (32 << 10)
    with opened(gate) as socket:
        socket.send(data)
        assert socket.recv(60) == data
        socket.send(["one ", "message ", "in ", "pieces"])
        assert socket.recv(30) == "one message in pieces"
    gate.wait_done()
    up = [e for e in gate.of("ws") if e["dir"] == "up" and e["opcode"] == "binary"]
    assert up[-1]["bytes"] == len(data)
    kept = b"".join(base64.b64decode(e.get("base64", "")) for e in up)
    assert kept == data[: 64 << 10]
    assert len(up[-1]["sha256"]) == 64


def test_http_a_socket_is_closed_by_the_app_in_its_own_words(make_gate, echo):
    gate = make_gate(echo.port)
    with opened(gate) as socket:
        socket.send("close")
        with pytest.raises(websockets.exceptions.ConnectionClosed) as closed:
            socket.recv(30)
    assert closed.value.rcvd is not None
    assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4001, "as you wish")
    gate.wait_done()
    assert not gate.errors


def test_http_a_killed_socket_is_told_why(make_gate, echo):
    gate = make_gate(echo.port)
    with opened(gate) as socket:
        socket.send("hello")
        socket.recv(30)
        gate.end("the session was killed: enough")
        with pytest.raises(websockets.exceptions.ConnectionClosed) as closed:
            socket.recv(30)
    assert closed.value.rcvd is not None
    assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1001, "the session was killed: enough")


def test_http_a_message_that_is_too_large_ends_its_socket(make_gate, echo):
    gate = make_gate(echo.port, account={"rules": {"max_request": 1000}})
    with opened(gate) as socket:
        socket.send("x" * 1000)
        assert socket.recv(30) == "x" * 1000
        socket.send("x" * 1001)
        with pytest.raises(websockets.exceptions.ConnectionClosed) as closed:
            socket.recv(30)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1009


def test_http_what_cannot_be_recorded_is_not_sent_on(make_gate, echo):
    from pam_common.errors import PamError

    gate = make_gate(echo.port)
    with opened(gate) as socket:
        socket.send("one")
        socket.recv(30)
        gate.recorder_error = PamError("the disk is full")
        socket.send("two")
        with pytest.raises(websockets.exceptions.ConnectionClosed) as closed:
            socket.recv(30)
    assert closed.value.rcvd is not None
    assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1011, "the disk is full")


def test_http_a_frame_that_is_none_ends_its_socket(make_gate, echo):
    gate = make_gate(echo.port)
    with gate.connect() as sock:
        head = f"GET / HTTP/1.1\r\nHost: {gate.host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        head += "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        sock.sendall(head.encode() + b"\x81\x01a")  # without a mask, and before the answer is there
        data = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := sock.recv(65536):
                data += piece
    assert data.startswith(b"HTTP/1.1 101")
    assert data.partition(b"\r\n\r\n")[2][2:4] == (1002).to_bytes(2, "big")


def test_abuse_14_a_socket_under_rules_is_checked_like_any_request(make_gate, echo):
    gate = make_gate(echo.port, account={"rules": {"deny": [{"paths": ["/ws/**"]}]}})
    for path in ("/ws?denied", "/WS/x?denied", "/x/../ws?denied"):
        with pytest.raises(websockets.exceptions.InvalidStatus) as refused, opened(gate, path):
            pass
        assert refused.value.response.status_code == 403
    # By their names: the echo may take note of a socket of the test before as late as now.
    assert [head.path for head in echo.heads if "denied" in head.path] == []
    with opened(gate, "/other") as socket:
        socket.send("x")
        assert socket.recv(30) == "x"


def test_http_a_socket_that_the_app_refuses_is_an_ordinary_answer(make_gate, make_app):
    app = make_app(b"HTTP/1.1 426 Upgrade Required\r\nContent-Length: 2\r\n\r\nno")
    gate = make_gate(app.port)
    with pytest.raises(websockets.exceptions.InvalidStatus) as refused, opened(gate):
        pass
    assert refused.value.response.status_code == 426


def test_http_another_protocol_is_not_asked_for(make_gate, make_app, ask):
    """h2c, say: behind it nobody could see the requests."""
    app = make_app(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
    gate = make_gate(app.port)
    for upgrade in (b"h2c", b"websocket, h2c", b"TLS/1.0"):
        head = (
            b"GET / HTTP/1.1\r\nHost: HOST\r\nConnection: Upgrade, HTTP2-Settings, close\r\nUpgrade: %b\r\n"
        )
        answer = ask(gate, head % upgrade + b"HTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"pgrade" not in app.received[-1]
        assert b"HTTP2" not in app.received[-1]
