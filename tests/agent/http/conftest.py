"""Apps to speak to, and an interceptor in front of them on a local TCP port."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from pam_agent.protocols.base import Credential, Opening, Target, TlsPolicy
from pam_agent.protocols.http import HttpInterceptor
from pam_agent.protocols.http.door import Preamble, parse_preamble
from pam_common.errors import PamError
from pam_common.keys import b64encode
from pam_common.stream import SocketStream

PASSWORD = "correct horse battery"
TOKEN = "tok-5f0c2a9e7b"
SESSION = "s-" + "a" * 26
KEY = bytes(range(32))


class LocalConversation:
    """A Conversation that records into a list."""

    def __init__(self, gate: Gate, number: int) -> None:
        self.number = number
        self.events: list[dict[str, Any]] = []
        self.touched = 0
        self.dials = 0
        self._gate = gate

    @property
    def end_reason(self) -> str | None:
        return self._gate.end_reason

    def record(self, events: Sequence[dict[str, Any]]) -> None:
        if self._gate.recorder_error is not None:
            raise self._gate.recorder_error
        json.dumps(events)
        if self._gate.keep_events:
            self.events += [dict(event) for event in events]

    def dial(self, host: str | None = None, port: int | None = None) -> socket.socket:
        if self.end_reason is not None:
            raise PamError(self.end_reason)
        self.dials += 1
        where = self._gate.opening.target
        sock = socket.create_connection((where.host, where.port), 60)
        sock.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._gate.targets.append(sock.dup())
        return sock

    def permitted(self, host: str, port: int) -> str:
        return host

    def touch(self) -> None:
        self.touched += 1


class PrecededStream(SocketStream):
    """A program's connection with the client's own line in front of it."""

    def __init__(self, sock: socket.socket, line: bytes) -> None:
        super().__init__(sock)
        self._line = line
        self._recv = self.recv
        self.recv = self._read  # type: ignore[method-assign,assignment]

    def _read(self, size: int) -> bytes:
        if self._line:
            data, self._line = self._line[:size], self._line[size:]
            return data
        return self._recv(size)


@dataclass
class Gate:
    """A TCP port whose connections the interceptor serves, each in a thread of its own."""

    opening: Opening
    mode: str = "program"
    said: bytes | None = None  #: instead of the client's line
    end_reason: str | None = None
    recorder_error: PamError | None = None
    keep_events: bool = True
    conversations: list[LocalConversation] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)
    targets: list[socket.socket] = field(default_factory=list)
    clients: list[SocketStream] = field(default_factory=list)
    threads: list[threading.Thread] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.interceptor = HttpInterceptor(self.opening)
        self._starting = threading.Lock()  # whoever sees a connection's thread sees it started
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = int(self._listener.getsockname()[1])
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    @property
    def host(self) -> str:
        name = "viewer.grafana.localhost" if self.mode == "browser" else "127.0.0.1"
        return f"{name}:{self.port}"

    @property
    def line(self) -> bytes:
        if self.said is not None:
            return self.said
        said = {"v": 1, "mode": self.mode, "origin": f"http://{self.host}"}
        if self.mode == "browser":
            said["key"] = b64encode(KEY)
        return json.dumps(said).encode() + b"\n"

    @property
    def preamble(self) -> Preamble:
        return parse_preamble(self.line[:-1])

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            conversation = LocalConversation(self, len(self.conversations) + 1)
            self.conversations.append(conversation)
            thread = threading.Thread(target=self._serve, args=(sock, conversation), daemon=True)
            with self._starting:
                self.threads.append(thread)
                thread.start()

    def _serve(self, sock: socket.socket, conversation: LocalConversation) -> None:
        stream = PrecededStream(sock, self.line)
        self.clients.append(stream)
        try:
            self.interceptor.serve(stream, conversation)
            stream.shutdown(socket.SHUT_WR)
        except (PamError, OSError) as error:
            self.errors.append(error)
            stream.shutdown(socket.SHUT_WR)
        except BaseException as error:
            self.errors.append(error)
            raise
        finally:
            stream.close()

    def connect(self) -> socket.socket:
        """A raw connection of a program; its calls give up after a minute."""
        return socket.create_connection(("127.0.0.1", self.port), 60)

    def end(self, reason: str) -> None:
        """What the session does on a kill."""
        self.end_reason = reason
        for sock in self.targets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    @property
    def events(self) -> list[dict[str, Any]]:
        return [event for conversation in self.conversations for event in conversation.events]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["kind"] == kind]

    def wait_done(self, seconds: float = 60) -> None:
        """Until every connection so far has been served to its end."""
        with self._starting:
            threads = list(self.threads)
        for thread in threads:
            thread.join(seconds)
            assert not thread.is_alive(), "a connection hangs"

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for stream in self.clients:
            stream.abort()
        for sock in self.targets:
            sock.close()


def make_opening(port: int, **fields: Any) -> Opening:
    """An opening of an app on a local port; ``account`` and ``host`` are its options."""
    tls = fields.pop("tls", TlsPolicy(mode="disable"))
    credential = Credential(
        fields.pop("user", "viewer"),
        fields.pop("password", PASSWORD),
        secrets=fields.pop("secrets", {"token": TOKEN}),
    )
    given = {"host": fields.pop("host", None), "account": fields.pop("account", {})}
    return Opening(
        session=SESSION,
        part=1,
        user="alice",
        account="grafana/viewer",
        protocol="http",
        session_end=2**31,
        idle_limit=0,
        target=Target("127.0.0.1", port, tls),
        credential=credential,
        options={key: value for key, value in given.items() if value is not None},
        **fields,
    )


@pytest.fixture
def make_gate() -> Iterator[Callable[..., Gate]]:
    """make_gate(port, mode="program", account={…}, tls=TlsPolicy(…), …) -> Gate"""
    gates: list[Gate] = []

    def make(port: int, *, mode: str = "program", keep_events: bool = True, **fields: Any) -> Gate:
        gate = Gate(make_opening(port, **fields), mode=mode, keep_events=keep_events)
        gates.append(gate)
        return gate

    yield make
    for gate in gates:
        gate.close()


# --- an app whose every byte the test decides ------------------------------------------------------------


@dataclass
class ScriptedApp:
    """Serves each connection with ``serve(socket)``; what it was sent stands in ``received``."""

    serve: Callable[[socket.socket, ScriptedApp], None]
    received: list[bytes] = field(default_factory=list)
    connections: int = 0

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = int(self._listener.getsockname()[1])
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._sockets.append(sock)
            threading.Thread(target=self._run, args=(sock,), daemon=True).start()

    def _run(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError), sock:
            self.serve(sock, self)

    def read_head(self, sock: socket.socket) -> bytes:
        """One request's head, without a body; empty at the end."""
        head = b""
        while b"\r\n\r\n" not in head:
            data = sock.recv(1)  # byte by byte, so as not to take what follows
            if not data:
                return b""
            head += data
        self.received.append(head)
        return head

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def make_app() -> Iterator[Callable[..., ScriptedApp]]:
    """make_app(answer or a function) -> ScriptedApp; an answer is given to every request of a connection."""
    apps: list[ScriptedApp] = []

    def make(answer: bytes | Callable[[socket.socket, ScriptedApp], None]) -> ScriptedApp:
        def serve(sock: socket.socket, app: ScriptedApp) -> None:
            while app.read_head(sock):
                sock.sendall(answer)  # type: ignore[arg-type]

        app = ScriptedApp(serve if isinstance(answer, bytes) else answer)
        apps.append(app)
        return app

    yield make
    for app in apps:
        app.close()


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Type: text/plain\r\n\r\nok"


@pytest.fixture
def ask() -> Callable[..., bytes]:
    """ask(gate, request bytes) -> everything that came until the end of the connection"""

    def run(gate: Gate, data: bytes, *, end: bool = False) -> bytes:
        with gate.connect() as sock:
            sock.sendall(data.replace(b"HOST", gate.host.encode()))
            if end:
                sock.shutdown(socket.SHUT_WR)
            answer = b""
            while piece := sock.recv(65536):
                answer += piece
            return answer

    return run


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> Any:
    """Wait until ``condition()`` is true, and give its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it does not come to that"
        time.sleep(0.01)
    return value


@pytest.fixture(name="wait_for")
def _wait_for() -> Callable[..., Any]:
    return wait_for


@pytest.fixture
def opening_of() -> Callable[..., Opening]:
    return make_opening
