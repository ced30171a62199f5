"""An agent's keys, its spool, and a small real HTTP server in place of the platform's recordings API."""

from __future__ import annotations

import io
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from nacl.public import PrivateKey
from processes import free_port

from pam_agent.protocols.base import Credential, Opening, Target
from pam_agent.recorder import Recorder
from pam_agent.spool import Spool
from pam_common.keys import SigningKey, key_id, new_session_id
from pam_common.platform_client import PlatformClient
from pam_common.recording import Head, PartReader, Recipient, VerifyReport, verify_part


class Parties:
    """The agent's identity and a reviewer's key."""

    def __init__(self) -> None:
        self.identity = SigningKey.generate()
        self.secret = PrivateKey.generate()
        public = bytes(self.secret.public_key)
        self.recipient = Recipient(key_id(public), public)

    def opening(self, session: str | None = None, part: int = 1) -> Opening:
        target, credential = Target("db.test", 5432), Credential("app_ro")
        return Opening(
            session or new_session_id(), part, "alice", "db/ro", "postgres", 2**31, 0, target, credential
        )

    def verify(self, source: Path | bytes, **options: Any) -> VerifyReport:
        return verify_part(source, agent_keys={"a1": [self.identity.public]}, **options)

    def read(self, source: Path | bytes) -> list[dict[str, Any]]:
        data = source.read_bytes() if isinstance(source, Path) else source
        return list(PartReader(io.BytesIO(data), [bytes(self.secret)]).events())


class RecordingServer(ThreadingHTTPServer):
    """The platform's side of an upload. ``faults`` are taken one per request, by name:

    ``503``, ``401``, ``403``, ``409``: answered instead; ``cut``: half of the body is taken, then the line
    is dead; ``lost``: the request is carried out but its answer is lost; ``lie``: an impossible answer.
    """

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Request)
        self.lock = threading.Lock()
        self.stored: dict[tuple[str, int], bytearray] = {}
        self.complete: list[tuple[str, int]] = []
        self.heads: list[Head] = []
        self.faults: deque[str] = deque()
        self.requests: list[str] = []
        self.largest = 0
        self.lost: set[tuple[str, int]] = set()  # acknowledged, and gone
        self.receipts: list[dict[str, Any]] = []  # as they were asked for
        self.refused: dict[tuple[str, int], str] = {}  # faults that stay
        self.check: Callable[[bytes], bool] = lambda data: True
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def stop(self) -> None:
        """May be called again."""
        self.shutdown()
        self.server_close()
        self.thread.join()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A cut line is part of the tests."""


class _Request(BaseHTTPRequestHandler):
    server: RecordingServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(lambda place: {"received": self._size(place), "complete": place in self.server.complete})

    def do_PUT(self) -> None:
        self._answer(self._append)

    def do_POST(self) -> None:
        if self.path == "/api/v1/agent/recordings/check":
            self._check()
        else:
            self._answer(self._head)

    def _check(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["parts"]
        with self.server.lock:
            self.server.receipts += asked
            lost = [entry for entry in asked if (entry["session"], entry["part"]) in self.server.lost]
        self._reply(200, {"lost": [{"session": one["session"], "part": one["part"]} for one in lost]})

    def _answer(self, action: Callable[[tuple[str, int]], dict[str, Any]]) -> None:
        server = self.server
        url = urlsplit(self.path)
        words = url.path.removeprefix("/api/v1/agent/recordings/").split("/")
        place = (words[0], int(words[1]))
        self.offset = int(parse_qs(url.query).get("offset", ["0"])[0])
        length = int(self.headers.get("Content-Length", 0))
        server.largest = max(server.largest, length)
        with server.lock:
            server.requests.append(f"{self.command} {place[1]}")
            fault = server.refused.get(place) or (server.faults.popleft() if server.faults else "")
            self.body = self.rfile.read(length // 2 if fault == "cut" else length)
            if fault.isdigit():
                self._reply(int(fault), {"detail": "no", "received": self._size(place)})
                return
            status, answer = 200, {"received": -1} if fault == "lie" else action(place)
            if "detail" in answer:
                status = 409
        if fault in ("cut", "lost"):
            self.close_connection = True
        else:
            self._reply(status, answer)

    def _size(self, place: tuple[str, int]) -> int:
        return len(self.server.stored.get(place, b""))

    def _append(self, place: tuple[str, int]) -> dict[str, Any]:
        if self.offset != self._size(place):
            return {"detail": "wrong offset", "received": self._size(place)}
        self.server.stored.setdefault(place, bytearray()).extend(self.body)
        return {"received": self._size(place)}

    def _head(self, place: tuple[str, int]) -> dict[str, Any]:
        head = Head.from_json(*place, json.loads(self.body))
        self.server.heads.append(head)
        if not head.final:
            return {"complete": False}
        if not self.server.check(bytes(self.server.stored.get(place, b""))):
            return {"detail": "the chain does not hold", "received": self._size(place)}
        self.server.complete.append(place)
        return {"complete": True}

    def _reply(self, status: int, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


@pytest.fixture(scope="session")
def parties() -> Parties:
    return Parties()


@pytest.fixture
def server() -> Iterator[RecordingServer]:
    server = RecordingServer(free_port())  # which stays free when a test stops it and starts another there
    yield server
    server.stop()


@pytest.fixture
def new_server() -> type[RecordingServer]:
    return RecordingServer


@pytest.fixture
def platform(server: RecordingServer) -> PlatformClient:
    return PlatformClient(server.url)


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    with Spool(tmp_path / "spool", max_bytes=64 << 20) as spool:
        yield spool


@pytest.fixture
def recorder(
    spool: Spool, parties: Parties, platform: PlatformClient, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Recorder]:
    monkeypatch.setattr("pam_agent.recorder.SYNC_INTERVAL", 0.02)
    monkeypatch.setattr("pam_agent.witness.FIRST_WAIT", 0.02)
    recorder = Recorder(spool, parties.identity, "a1", platform)
    recorder.start()
    yield recorder
    recorder.stop()


@pytest.fixture
def wait_for() -> Callable[[Callable[[], object]], None]:
    """Wait until a condition holds; fail after a minute."""

    def wait(condition: Callable[[], object]) -> None:
        waiter, end = threading.Event(), time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end, "the condition never came to hold"
            waiter.wait(0.005)

    return wait
