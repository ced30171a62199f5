"""Reading host keys: within allow_targets, with an end, and reported whatever happens."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Any

import paramiko
import pytest
from paramiko.common import AUTH_FAILED

from pam_agent import scan
from pam_agent.inbox import Message, parse
from pam_agent.scan import MAX_ERROR, MAX_SCANS, Scans, read_keys
from pam_agent.target import TargetRules
from pam_common.errors import PamError, ProtocolError, RefusedError, UnavailableError

RULES = TargetRules.parse(["127.0.0.1:*"])
SCAN = "k-" + "a" * 26


class Door(paramiko.ServerInterface):
    def __init__(self, server: Server) -> None:
        self.server = server

    def check_auth_none(self, username: str) -> int:
        self.server.logins += 1
        return AUTH_FAILED


class Server:
    """An SSH server that shows its keys and goes no further."""

    def __init__(self, *keys: paramiko.PKey) -> None:
        self.keys = keys
        self.logins = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            transport = paramiko.Transport(sock)
            for key in self.keys:
                transport.add_server_key(key)
            transport.start_server(event=threading.Event(), server=Door(self))


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server(paramiko.RSAKey.generate(2048), paramiko.ECDSAKey.generate())
    yield made
    made.listener.close()


def line(key: paramiko.PKey) -> str:
    return f"{key.get_name()} {key.get_base64()}"


def test_a_key_of_each_type_that_the_server_has(server: Server) -> None:
    assert sorted(read_keys("127.0.0.1", server.port, RULES)) == sorted(map(line, server.keys))
    assert server.logins == 0


def test_only_where_the_agent_may_dial(server: Server) -> None:
    with pytest.raises(RefusedError, match="may not dial"):
        read_keys("127.0.0.1", server.port, TargetRules.parse(["10.0.0.0/8:*"]))


def test_what_is_no_ssh_server(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        threading.Thread(target=lambda: listener.accept()[0].close(), daemon=True).start()
        with pytest.raises(UnavailableError, match="no SSH key exchange"):
            read_keys("127.0.0.1", port, RULES)


def test_a_silent_server_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "EXCHANGE_TIMEOUT", 0.3)
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(UnavailableError, match="no SSH key exchange"),
    ):
        read_keys("127.0.0.1", silent.getsockname()[1], RULES)


class Api:
    def __init__(self) -> None:
        self.reports: list[tuple[str, list[str], str]] = []
        self.reported = threading.Event()
        self.fails = False

    def scanned(self, scan: str, keys: list[str], error: str) -> None:
        self.reports.append((scan, keys, error))
        self.reported.set()
        if self.fails:
            raise PamError("refused")


def scans(api: Any) -> Scans:
    return Scans(api, lambda: RULES)


def test_keys_are_reported(server: Server) -> None:
    api = Api()
    scans(api).start(Message("scan", scan=SCAN, host="127.0.0.1", port=server.port))
    assert api.reported.wait(60)
    name, keys, error = api.reports[0]
    assert (name, sorted(keys), error) == (SCAN, sorted(map(line, server.keys)), "")


def test_failures_are_reported_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def long(*_: object) -> list[str]:
        raise UnavailableError("a\nb" + "x" * 1000)

    def fault(*_: object) -> list[str]:
        raise ValueError("of ours")

    for read, told in ((long, "a?b" + "x" * (MAX_ERROR - 3)), (fault, "the agent failed to read the keys")):
        monkeypatch.setattr(scan, "read_keys", read)
        api = Api()
        api.fails = True  # nor does a refused report end anything
        scans(api).start(Message("scan", scan=SCAN, host="h", port=1))
        assert api.reported.wait(60)
        assert api.reports == [(SCAN, [], told)]


def test_so_many_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    release, entered = threading.Event(), threading.Semaphore(0)

    def read(*_: object) -> list[str]:
        entered.release()
        release.wait(60)
        return ["key"]

    monkeypatch.setattr(scan, "read_keys", read)
    api, message = Api(), Message("scan", scan=SCAN, host="h", port=1)
    running = scans(api)
    for _ in range(MAX_SCANS + 1):
        running.start(message)
    for _ in range(MAX_SCANS):
        assert entered.acquire(timeout=60)
    assert not entered.acquire(timeout=0.2), "one more is left out"
    release.set()


def test_the_message() -> None:
    good = {"kind": "scan", "scan": SCAN, "host": "10.0.0.7", "port": 22}
    _, messages, _ = parse({"cursor": 1, "messages": [good]})
    assert messages == [Message("scan", scan=SCAN, host="10.0.0.7", port=22)]
    for change in ({"scan": "k-1"}, {"scan": "../x"}, {"host": ""}, {"host": "x" * 254}, {"port": 0}):
        with pytest.raises(ProtocolError):
            parse({"cursor": 1, "messages": [{**good, **change}]})
