import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests

from pam_common import platform_client
from pam_common.errors import AuthenticationError, PamError, ProtocolError, RefusedError, UnavailableError
from pam_common.platform_client import MAX_ANSWER, ConflictError, PlatformClient, check_base_url


class Answers(BaseHTTPRequestHandler):
    """The path says what to answer: /api/v1/<status>/<kind>."""

    def do_GET(self) -> None:
        status, kind = self.path.removeprefix("/api/v1/").split("/")
        body = {
            "ok": json.dumps({"auth": self.headers["Authorization"]}).encode(),
            "error": json.dumps({"detail": "no\x1b[2J", "hint": "ask", "received": 7}).encode(),
            "html": b"<html>",
            "huge": b"x" * (MAX_ANSWER + 1),
            "cut": b"{",
            "empty": b"",
        }[kind]
        self.send_response(int(status))
        self.send_header("Location", "/api/v1/200/ok")
        self.send_header("Content-Length", str(len(body) + (kind == "cut")))
        self.end_headers()
        self.wfile.write(body)

    def date_time_string(self, timestamp: float | None = None) -> str:
        return "Fri, 31 Dec 2038 23:59:59 GMT"

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_the_authorization_is_made_anew_for_each_call(url: str) -> None:
    tokens = iter(["one", "two"])
    with PlatformClient(url, authorization=lambda: f"Bearer {next(tokens)}") as platform:
        assert platform.get("/200/ok") == {"auth": "Bearer one"}
        assert platform.get("/200/ok") == {"auth": "Bearer two"}


def test_the_environment_gives_neither_proxy_nor_password(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with PlatformClient(url) as platform:
        assert platform.get("/200/ok") == {"auth": None}


@pytest.mark.parametrize(
    ("path", "error", "words"),
    [
        ("/500/error", UnavailableError, r"no\?\[2J"),
        ("/503/html", UnavailableError, "HTTP 503"),
        ("/429/empty", UnavailableError, "HTTP 429"),
        ("/401/error", AuthenticationError, "no"),
        ("/403/error", RefusedError, "no"),
        ("/302/ok", ProtocolError, "redirect"),
        ("/200/html", ProtocolError, "not one of the platform's API"),
        ("/200/huge", ProtocolError, "larger than"),
        ("/200/cut", UnavailableError, "cut"),
    ],
)
def test_failures_are_told_apart(url: str, path: str, error: type[PamError], words: str) -> None:
    with PlatformClient(url) as platform, pytest.raises(error, match=words):
        platform.get(path)


def test_an_answer_that_trickles_ends(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform_client, "TOTAL_TIMEOUT", 0.0)
    with PlatformClient(url) as platform, pytest.raises(UnavailableError, match="took too long"):
        platform.get("/200/ok")


def test_a_platform_that_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform_client, "READ_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with PlatformClient(url) as platform, pytest.raises(UnavailableError, match="timed out"):
            platform.get("/me")


def test_a_platform_that_cannot_be_reached_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform_client, "CONNECT_TIMEOUT", 0.2)
    with socket.socket() as full, contextlib.ExitStack() as fillers:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(4):  # its backlog is full, so a connect to it hangs
            filler = fillers.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}"
        with PlatformClient(url) as platform, pytest.raises(UnavailableError, match="timed out"):
            platform.get("/me")


def test_a_conflict_carries_its_answer(url: str) -> None:
    with PlatformClient(url) as platform, pytest.raises(ConflictError) as caught:
        platform.get("/409/error")
    assert caught.value.body["received"] == 7
    assert caught.value.hint == "ask"


def test_the_platforms_clock_is_used(url: str) -> None:
    with PlatformClient(url) as platform:
        began = time.monotonic()
        platform.get("/200/ok")
        assert -5 < platform.now() - 2177452799 < 5 + time.monotonic() - began


def test_an_answer_that_is_read_late_is_no_difference_of_clocks() -> None:
    """A process that stood still with an answer in its socket must not give sessions more time for it."""
    platform = PlatformClient("http://127.0.0.1:1")
    answer = requests.Response()
    written = time.time() - 5
    answer.headers["Date"] = formatdate(written, usegmt=True)
    platform._note_clock(answer, written - 0.1)
    assert abs(platform.now() - time.time()) < 0.5


def test_no_answer_is_unavailable() -> None:
    with PlatformClient("http://127.0.0.1:1") as platform, pytest.raises(UnavailableError, match="refused"):
        platform.get("/me")


@pytest.mark.parametrize(
    ("answer", "words"),
    [(b"", "it closed the connection without an answer"), (b"SSH-2.0-x\r\n", "it does not speak HTTP")],
)
def test_what_is_no_platform_is_told_in_words(answer: bytes, words: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):  # the listener closes as soon as the client has given up
                for _ in range(2):  # a closed connection is tried once more where that is safe
                    peer, _ = listener.accept()
                    with peer:
                        peer.recv(65536)
                        peer.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with PlatformClient(url) as platform, pytest.raises(UnavailableError) as caught:
            platform.get("/me")
        assert str(caught.value).endswith(f"does not answer: {words}")


@pytest.mark.parametrize(
    "url", ["http://pam.example.com", "ftp://x", "https://", "https://a:b@c", "https://a/?x"]
)
def test_addresses_that_may_not_be_used(url: str) -> None:
    with pytest.raises(PamError):
        check_base_url(url)


@pytest.mark.parametrize("url", ["https://pam.example.com/", "http://127.0.0.1:8000", "http://[::1]:80"])
def test_addresses_that_may_be_used(url: str) -> None:
    assert check_base_url(url) == url.rstrip("/")
