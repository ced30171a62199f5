"""What the client talks to, over real sockets: a platform's HTTP API, a relay, an agent's end of the channel.

The platform here is small and obeys the tests; keys, grants, certificates and handshakes are real.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import paramiko
import pytest
from paramiko.common import AUTH_FAILED, AUTH_SUCCESSFUL

import pam_client.__main__
from pam_client import ports
from pam_client.home import Home
from pam_common import cli, fast_ssh
from pam_common.errors import PamError
from pam_common.fast_ssh import IncomingChannel
from pam_common.keys import SigningKey, VerifyKeys, b64decode, b64encode, new_session_id
from pam_common.secure_channel import SecureChannel, generate_x25519, x25519_public
from pam_common.ssh_certs import (
    CertificateKey,
    make_host_certificate,
    make_user_certificate,
    verify_user_certificate,
)
from pam_common.tokens import AgentStatement, Grant

GATEWAY = "dc1"


class FakePlatform:
    """Answers ``(method, path)`` with what ``answers`` holds: (status, body) or a function of the form."""

    def __init__(self) -> None:
        self.answers: dict[tuple[str, str], Any] = {}
        self.requests: list[tuple[str, str, dict[str, Any], dict[str, str]]] = []
        self.lock = threading.Lock()
        owner = self

        class Endpoint(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None: ...

            def do_GET(self) -> None:
                self._answer({})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.headers.get("Content-Type") == "application/json":
                    self._answer(json.loads(body or b"{}"))
                else:
                    self._answer({name: values[0] for name, values in parse_qs(body.decode()).items()})

            def _answer(self, form: dict[str, Any]) -> None:
                path = self.path.partition("?")[0]
                with owner.lock:
                    owner.requests.append((self.command, self.path, form, dict(self.headers)))
                found = owner.answers.get((self.command, path), (404, {"detail": "not found"}))
                status, body = found(form) if callable(found) else found
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None: ...  # a killed client resets its connection

        self.server = Server(("127.0.0.1", 0), Endpoint)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()
        self.discovery = {
            "device_authorization_endpoint": f"{self.url}/o/device/code",
            "token_endpoint": f"{self.url}/o/token",
            "revocation_endpoint": f"{self.url}/o/revoke",
        }
        self.answers["GET", "/.well-known/openid-configuration"] = lambda _form: (200, self.discovery)

    def count(self, method: str, path: str) -> int:
        with self.lock:
            return sum(
                1 for seen, url, *_ in self.requests if seen == method and url.partition("?")[0] == path
            )

    def last(self, method: str, path: str) -> tuple[dict[str, Any], dict[str, str]]:
        with self.lock:
            found = [
                (form, headers) for seen, url, form, headers in self.requests if (seen, url) == (method, path)
            ]
        return found[-1]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(60)


class Agency:
    """Relays and the agent behind them, and the platform's side of a session: what ``connect`` answers.

    ``serve(channel)`` is what the agent does with a channel whose grant is good; by default it echoes.
    """

    ISSUER = "https://pam.test"

    def __init__(self) -> None:
        self.user_ca, self.host_ca, self.grant_key, self.interceptor_ca = (
            SigningKey.generate() for _ in range(4)
        )
        self.protocol = "postgres"
        self.noise = generate_x25519()
        self.statement_key = x25519_public(self.noise)  # what the statement says; tests may lie
        self.agent_id = "agent-1"
        self.listed = [("agent-1", x25519_public(self.noise))]
        self.grant_lifetime, self.certificate_lifetime, self.duration = 120, 600, 3600
        self.refuse_channels = ""  # the relay's reason for refusing every channel
        self.refuse_grant = ""  # the agent's
        self.serve: Callable[[SecureChannel], None] = echo
        self.relays: list[RelayServer] = []
        self.sessions: list[str] = []
        self.grants: list[Grant] = []
        self.ended: list[str] = []

    def start_relay(self, name: str, host_ca: SigningKey | None = None) -> RelayServer:
        relay = RelayServer(self, name, host_ca or self.host_ca)
        self.relays.append(relay)
        return relay

    def connect(self, form: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """``POST /connect``."""
        now = int(time.time())
        session = new_session_id()
        self.sessions.append(session)
        label = form.get("account") or "readonly"
        grant = Grant(
            session=session,
            user="alice",
            gateway=GATEWAY,
            account=f"{form['resource']}/{label}",
            protocol=self.protocol,
            client_key=b64decode(form["noise_key"]),
            expires=now + self.grant_lifetime,
            session_end=now + self.duration,
        )
        certificate = make_user_certificate(
            self.user_ca,
            b64decode(form["ssh_key"]),
            key_id=session,
            principals=[f"connect:{GATEWAY}"],
            valid_after=now - 300,
            valid_before=now + self.certificate_lifetime,
        )
        return 200, {
            "session": session,
            "grant": grant.issue(self.grant_key, issuer=self.ISSUER, now=now),
            "certificate": certificate,
            "gateway": GATEWAY,
            "account": grant.account,
            "protocol": self.protocol,
            "session_end": grant.session_end,
            "expires": grant.expires,
            "idle_limit": 0,
            "relays": [relay.address() for relay in self.relays],
            "relay_host_ca": VerifyKeys.of(self.host_ca.public).to_json(),
            "interceptor_host_ca": VerifyKeys.of(self.interceptor_ca.public).to_json(),
            "grant_keys": VerifyKeys.of(self.grant_key.public).to_json(),
            "issuer": self.ISSUER,
            "agents": [{"id": name, "noise_key": b64encode(key)} for name, key in self.listed],
            "hints": {"port": 5432, "database": "app", "user": label},
        }

    def statement(self) -> bytes:
        identity = SigningKey.generate().public
        statement = AgentStatement(self.agent_id, GATEWAY, self.statement_key, identity)
        return statement.issue(self.grant_key, issuer=self.ISSUER).encode()

    def carry(self, wish: IncomingChannel) -> None:
        """The agent's end of one channel, in a thread of its own."""
        stream = wish.accept()
        with contextlib.suppress(OSError, PamError):
            channel, token = SecureChannel.accept(
                stream, gateway=GATEWAY, static=self.noise, statement=self.statement()
            )
            grant = Grant.parse(
                token,
                VerifyKeys.of(self.grant_key.public),
                issuer=self.ISSUER,
                gateway=GATEWAY,
                now=time.time(),
                first_opening=True,
            )
            grant.require_key(channel.peer)
            self.grants.append(grant)
            if self.refuse_grant:
                channel.send_error(self.refuse_grant)
                # Closed by the client, which reads the reason first.
                with contextlib.suppress(OSError, PamError):
                    while channel.recv(4096):
                        pass
            else:
                self.serve(channel)
        stream.close()


def echo(channel: SecureChannel) -> None:
    while data := channel.recv(65536):
        channel.sendall(data)
    channel.shutdown(socket.SHUT_WR)


class RelayServer:
    """A real SSH server with a host certificate that hands every channel to the agency's agent."""

    def __init__(self, agency: Agency, name: str, host_ca: SigningKey) -> None:
        self.agency, self.name = agency, name
        key, now = SigningKey.generate(), int(time.time())
        line = make_host_certificate(
            host_ca, key.public, key_id=name, principals=[name], valid_after=now - 300, valid_before=now + 600
        )
        self.host_key = CertificateKey(key.seed(), line)
        self.transports: list[fast_ssh.Transport] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self._accept, daemon=True)
        self.thread.start()

    def address(self) -> dict[str, Any]:
        return {"name": self.name, "host": "127.0.0.1", "port": self.port}

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            door = Door(self.agency)
            transport = fast_ssh.serve(sock, name=f"server-{self.name}", host_key=self.host_key, server=door)
            transport.on_direct_tcpip = self._wanted
            self.transports.append(transport)
            fast_ssh.start(transport, door)

    def _wanted(self, wish: IncomingChannel) -> None:
        if self.agency.refuse_channels:
            wish.refuse(2, self.agency.refuse_channels)
            return
        threading.Thread(target=self.agency.carry, args=(wish,), daemon=True).start()

    def cut(self) -> None:
        """Drop every connection; new ones are accepted."""
        for transport in self.transports:
            transport.close()
            transport.join(60)

    def close(self) -> None:
        # shutdown wakes the accepting thread; close alone would not.
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(60)
        self.cut()


class Door(paramiko.ServerInterface):
    """Lets in whom the user CA certified for the gateway."""

    def __init__(self, agency: Agency) -> None:
        self.agency = agency

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        try:
            verify_user_certificate(
                key.public_blob.key_blob if key.public_blob else b"",
                VerifyKeys.of(self.agency.user_ca.public),
                now=time.time(),
                principal=f"connect:{GATEWAY}",
            )
        except PamError:
            return AUTH_FAILED
        return AUTH_SUCCESSFUL

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"


@pytest.fixture
def platform() -> Iterator[FakePlatform]:
    server = FakePlatform()
    yield server
    server.close()


@pytest.fixture
def agency() -> Iterator[Agency]:
    """An agent with one relay, ``r1``."""
    made = Agency()
    made.start_relay("r1")
    yield made
    for relay in made.relays:
        relay.close()


@pytest.fixture
def connecting(platform: FakePlatform, agency: Agency) -> FakePlatform:
    """A platform at which ``connect`` leads to the agency's relays."""
    platform.answers["POST", "/api/v1/connect"] = agency.connect

    def session(_form: object) -> tuple[int, dict[str, Any]]:
        return 200, {"id": agency.sessions[-1], "state": "active"}

    class Sessions(dict[tuple[str, str], Any]):
        """Knows the paths of every session that was granted."""

        def get(self, key: tuple[str, str], default: Any = None) -> Any:
            if key not in self and key[1].startswith("/api/v1/sessions/s-"):
                if key[1].endswith("/end"):
                    return lambda _form: agency.ended.append(key[1].split("/")[4]) or (200, {})  # type: ignore[func-returns-value]  # append gives None
                return session
            return super().get(key, default)

    platform.answers = Sessions(platform.answers)
    return platform


@pytest.fixture
def home(tmp_path: Path, platform: FakePlatform) -> Home:
    """A home that is logged in at the platform."""
    home = Home(tmp_path / "home")
    home.make()
    home.config_file.write_text(f"platform: {platform.url}\n")
    home.write_json(
        "tokens.json",
        {platform.url: {"access": "access-1", "expires": time.time() + 900, "refresh": "refresh-1"}},
    )
    return home


@pytest.fixture
def keep_port(platform: FakePlatform) -> Iterator[Callable[[str], None]]:
    """``keep_port(account)``: its port goes to nobody else. The kernel chooses among the ports of accounts,
    too, for who connects to somewhere; not one that a socket is bound to, which is no obstacle to a listener.
    """
    with contextlib.ExitStack() as stack:

        def keep(account: str) -> None:
            start = ports.preferred(platform.url, account) - ports.FIRST
            for step in range(ports.COUNT):  # the next one while that is taken, as the client does
                sock = stack.enter_context(socket.socket())
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                with contextlib.suppress(OSError):
                    sock.bind((ports.HOST, ports.FIRST + (start + step) % ports.COUNT))
                    return

        yield keep


@pytest.fixture
def environment(home: Home) -> dict[str, str]:
    """For a pam-client process with this home and no keyring."""
    keep = {name: os.environ[name] for name in ("PATH", "LANG", "HOME") if name in os.environ}
    return keep | {
        "PAM_CLIENT_HOME": str(home.folder),
        "PYTHON_KEYRING_BACKEND": "keyring.backends.null.Keyring",
    }


@pytest.fixture
def command() -> Callable[..., list[str]]:
    """The words that run pam-client."""
    return lambda *words: [sys.executable, "-m", "pam_client", *words]


@pytest.fixture
def call(
    environment: dict[str, str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Like ``run``, within this process: twenty times as fast."""

    def call(*words: str, **extra: str) -> subprocess.CompletedProcess[str]:
        for name in [name for name in os.environ if name.startswith("PAM_")]:
            monkeypatch.delenv(name)
        for name, value in (environment | extra).items():
            monkeypatch.setenv(name, value)
        capfd.readouterr()
        code = cli.run(pam_client.__main__.cli, words, prog_name="pam-client")
        return subprocess.CompletedProcess(words, code, *capfd.readouterr())

    return call


@pytest.fixture
def run(environment: dict[str, str], command: Callable[..., list[str]]) -> Callable[..., Any]:
    """Run pam-client to its end; a CompletedProcess with text."""

    def run(*words: str, **extra: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(*words),
            env=environment | extra,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    return run


@pytest.fixture(autouse=True)
def _no_keyring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests in this process never touch the keyring of whoever runs them."""
    import keyring
    from keyring.backends import null

    monkeypatch.setattr(keyring, "get_keyring", null.Keyring)


@pytest.fixture
def wait_for() -> Callable[..., None]:
    def wait(condition: Callable[[], object], seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not happen in time"
            time.sleep(0.01)

    return wait
