"""A small web application for tests: pages, cookies, large bodies, server-sent events, a WebSocket echo.

    python tests/support/web_app.py PORT

``/seen`` lists what it was asked since it started, so that a test can tell what never arrived.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, CloseConnection, Message, Ping, Request

PIECE = bytes(range(256)) * 256

PAGE = """<!doctype html><html><head><title>{title}</title><link rel="stylesheet" href="/style.css"></head>
<body><h1>{title}</h1><img src="/pixel.svg" alt=""><form method="post" action="/note"><input name="text">
<button>Send</button></form></body></html>"""

SOCKET = """<!doctype html><html><head><title>socket</title></head><body><script>
const socket = new WebSocket("ws://" + location.host + "/ws");
window.heard = [];
socket.onmessage = (event) => window.heard.push(event.data);
socket.onopen = () => { window.opened = true; };
socket.onclose = (event) => { window.ended = true; };
window.say = (text) => socket.send(text);
</script></body></html>"""


class App(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    seen: ClassVar[list[list[str]]] = []
    guard = threading.Lock()

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        path = urlsplit(self.path)
        if path.path not in ("/seen", "/favicon.ico"):  # browsers ask for the latter when they like
            with self.guard:
                self.seen.append([self.command, self.path, self.headers.get("Origin") or ""])
        words = path.path.strip("/").split("/")
        answer: Any = getattr(self, f"_{words[0] or 'home'}", None)
        if answer is None:
            self._send(b"not found", "text/plain", status=404)
        else:
            answer(words[1:], parse_qs(path.query))

    do_HEAD = do_POST = do_PUT = do_GET

    def _home(self, _words: list[str], _query: dict[str, list[str]]) -> None:
        self._send(PAGE.format(title="the app").encode(), "text/html")

    def _note(self, _words: list[str], _query: dict[str, list[str]]) -> None:
        text = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self._send(PAGE.format(title=f"noted {text['text'][0]}").encode(), "text/html")

    def _seen(self, _words: list[str], _query: dict[str, list[str]]) -> None:
        with self.guard:
            self._json(self.seen)

    def _headers(self, _words: list[str], _query: dict[str, list[str]]) -> None:
        self._json(self.headers.items())

    def _cookie(self, words: list[str], _query: dict[str, list[str]]) -> None:
        self._send(b"set", "text/plain", [("Set-Cookie", f"{words[0]}={words[1]}; Path=/")])

    def _sleep(self, words: list[str], _query: dict[str, list[str]]) -> None:
        time.sleep(float(words[0]))
        self._send(b"slept", "text/plain")

    def _bytes(self, words: list[str], _query: dict[str, list[str]]) -> None:
        left = int(words[0])
        self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(left))
        self.end_headers()
        with contextlib.suppress(OSError):
            while left:
                size = min(left, len(PIECE))
                self.wfile.write(PIECE[:size])
                left -= size

    def _upload(self, _words: list[str], _query: dict[str, list[str]]) -> None:
        digest, size = hashlib.sha256(), 0
        left = int(self.headers["Content-Length"])
        while left and (data := self.rfile.read(min(left, 1 << 16))):
            digest.update(data)
            size += len(data)
            left -= len(data)
        self._json({"bytes": size, "sha256": digest.hexdigest()})

    def _events(self, _words: list[str], _query: dict[str, list[str]]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for number in range(3):
            self.wfile.write(f"data: {number}\n\n".encode())
            self.wfile.flush()
        self.close_connection = True

    def _socket(self, _words: list[str], _query: dict[str, list[str]]) -> None:
        self._send(SOCKET.encode(), "text/html")

    def _ws(self, _words: list[str], _query: dict[str, list[str]]) -> None:
        echo = WSConnection(ConnectionType.SERVER)
        head = "".join(f"{name}: {value}\r\n" for name, value in self.headers.items())
        echo.receive_data(f"{self.requestline}\r\n{head}\r\n".encode("latin-1"))
        self.close_connection = True
        while True:
            for event in echo.events():
                if isinstance(event, Request):
                    self.connection.sendall(echo.send(AcceptConnection()))
                elif isinstance(event, Message):
                    again = Message(data=event.data, message_finished=event.message_finished)
                    self.connection.sendall(echo.send(again))
                elif isinstance(event, Ping):
                    self.connection.sendall(echo.send(event.response()))
                elif isinstance(event, CloseConnection):
                    self.connection.sendall(echo.send(event.response()))
                    return
            data = self.connection.recv(1 << 16)
            if not data:
                return
            echo.receive_data(data)

    def _style(self, _words: list[str], _query: dict[str, list[str]]) -> None:
        self._send(b"h1 { color: rgb(1, 2, 3); }", "text/css")

    def _json(self, value: Any) -> None:
        self._send(
            json.dumps(list(value) if not isinstance(value, dict) else value).encode(), "application/json"
        )

    def _send(
        self, body: bytes, kind: str, more: list[tuple[str, str]] | None = None, *, status: int = 200
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in more or []:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def __getattr__(self, name: str) -> Any:
        # Files of pages, whose names are no identifiers.
        if name == "_style.css":
            return self._style
        if name == "_pixel.svg":
            svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="3" height="3"/>'
            return lambda *_: self._send(svg, "image/svg+xml")
        raise AttributeError(name)


if __name__ == "__main__":
    ThreadingHTTPServer.daemon_threads = True
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), App).serve_forever()
