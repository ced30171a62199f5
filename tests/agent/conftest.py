"""A platform and a relay in this process, speaking the real protocols, for an agent to meet."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import paramiko
import pytest
import yaml
from nacl.public import PrivateKey, PublicKey, SealedBox

from pam_agent import config, enrolment
from pam_agent.protocols.base import ClientProtocolError, Opening
from pam_common import fast_ssh, ssh_certs, tokens
from pam_common.errors import PamError
from pam_common.keys import SigningKey, VerifyKeys, b64decode, b64encode, key_id, new_session_id
from pam_common.secure_channel import SecureChannel
from pam_common.ssh_certs import CertificateKey
from pam_common.stream import SocketStream
from pam_common.tokens import AgentStatement, Grant

GATEWAY = "dc1"


def wait_until(condition: Callable[[], object], what: str = "it", seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen within {seconds} s"
        time.sleep(0.01)


@pytest.fixture(name="wait_until")
def wait_until_fixture() -> Callable[..., None]:
    return wait_until


class FakePlatform:
    """The agent endpoints over real HTTP. Everything it signs, it signs with real keys."""

    def __init__(self) -> None:
        self.grant_key, self.next_grant_key = SigningKey.generate(), SigningKey.generate()
        self.user_ca, self.host_ca = SigningKey.generate(), SigningKey.generate()
        self.recording = PrivateKey.generate()
        self.relays: list[dict[str, Any]] = []
        self.agents: dict[str, dict[str, Any]] = {}
        self.accounts: dict[str, dict[str, Any]] = {}
        self.sessions: dict[str, Grant] = {}
        self.opened: list[str] = []
        self.closed: list[tuple[str, dict[str, Any]]] = []
        self.messages: list[dict[str, Any]] = []
        self.recordings: dict[tuple[str, int], bytearray] = {}
        self.heads: list[dict[str, Any]] = []
        self.complete: set[tuple[str, int]] = set()
        self.revoked: set[str] = set()
        self.down = False
        self.refuse_open: tuple[int, str] | None = None
        self.open_gate = threading.Event()
        self.open_gate.set()
        self.lifetime = 86400
        self.trust_lifetime = 30 * 86400
        self.sign_trust_with: SigningKey | None = None
        self.change_opening: Callable[[dict[str, Any]], None] = lambda body: None
        self.condition = threading.Condition()
        platform = self

        class Exchange(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                code, answer = platform.answer(self.command, self.path, dict(self.headers), body)
                data = json.dumps(answer).encode()
                try:
                    self.send_response(code)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    self.close_connection = True

            do_GET = do_POST = do_PUT = answer

            def log_message(self, *_args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Exchange)
        self.server.daemon_threads = True
        self.issuer = self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self.down = True
        with self.condition:
            self.condition.notify_all()
        self.server.shutdown()
        self.server.server_close()

    # -- what tests ask of it ---------------------------------------------------------------------

    @property
    def recipient(self) -> dict[str, str]:
        public = bytes(self.recording.public_key)
        return {"kid": key_id(public), "key": b64encode(public)}

    def trust(self) -> str:
        claims = {
            "iss": self.issuer,
            "aud": "pam-trust",
            "grant_keys": VerifyKeys.of(self.grant_key.public, self.next_grant_key.public).to_json(),
            "relay_host_ca": VerifyKeys.of(self.host_ca.public).to_json(),
            "relay_user_ca": VerifyKeys.of(self.user_ca.public).to_json(),
            "recording_keys": [self.recipient],
        }
        key = self.sign_trust_with or self.grant_key
        return tokens.sign(key, tokens.TRUST, claims, lifetime=self.trust_lifetime)

    def account(self, account: str, host: str, port: int, password: str = "s3cret-word") -> None:
        self.accounts[account] = {"host": host, "port": port, "password": password}

    def grant(self, client_key: bytes, account: str = "prod-db/readonly", **changes: Any) -> Grant:
        now = int(time.time())
        fields: dict[str, Any] = {
            "session": new_session_id(),
            "user": "alice",
            "gateway": GATEWAY,
            "account": account,
            "protocol": "echo",
            "client_key": client_key,
            "expires": now + 120,
            "session_end": now + 3600,
            "idle_limit": 0,
        }
        grant = Grant(**{**fields, **changes})
        self.sessions[grant.session] = grant
        return grant

    def token(self, grant: Grant, **options: Any) -> bytes:
        return grant.issue(self.grant_key, issuer=self.issuer, **options).encode()

    def send(self, kind: str, session: str | None = None, reason: str = "") -> None:
        with self.condition:
            number = len(self.messages) + 1
            self.messages.append({"id": number, "kind": kind, "session": session, "reason": reason})
            self.condition.notify_all()

    # -- the API ----------------------------------------------------------------------------------

    def answer(self, method: str, target: str, headers: dict[str, str], body: bytes) -> tuple[int, Any]:
        if self.down:
            return 503, {"detail": "down"}
        parts = urlsplit(target)
        path = parts.path.removeprefix("/api/v1/agent/").split("/")
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        token = headers["Authorization"].removeprefix("Bearer ")
        if path == ["enrol"]:
            return self._enrol(token, json.loads(body))
        agent = self._authenticated(token)
        if agent is None:
            return 401, {"detail": "agent not accepted"}
        match path:
            case ["renew"]:
                return 200, self._renewal(agent)
            case ["inbox"]:
                return self._inbox(int(query["after"]), float(query["wait"]), agent)
            case ["sessions", session, "open"]:
                return self._open(session, agent)
            case ["sessions", session, "closed"]:
                self.closed.append((session, json.loads(body)))
                return 200, {}
            case ["recordings", session, part]:
                return self._recording(method, (session, int(part)), query, body)
            case ["recordings", session, part, "head"]:
                head = json.loads(body)
                self.heads.append(head)
                if head.get("final"):
                    self.complete.add((session, int(part)))
                return 200, {"complete": bool(head.get("final"))}
        return 404, {"detail": "no such path"}

    def _enrol(self, token: str, body: dict[str, Any]) -> tuple[int, Any]:
        identity = b64decode(body["identity_key"], 32)
        tokens.verify(
            token, VerifyKeys.of(identity), tokens.AGENT_REQUEST, issuer=body["name"], audience="pam-enrol"
        )
        known = self.agents.get(body["name"])
        if body["token"] != "enrol-me" or (known and known["identity_key"] != body["identity_key"]):
            return 403, {"detail": "the enrolment token is not valid", "hint": "make a new one"}
        self.agents[body["name"]] = body
        answer = {"agent": body["name"], "gateway": GATEWAY, "issuer": self.issuer}
        return 200, answer | self._renewal(body["name"])

    def _authenticated(self, token: str) -> str | None:
        for name, agent in self.agents.items():
            keys = VerifyKeys.of(b64decode(agent["identity_key"]))
            try:
                tokens.verify(token, keys, tokens.AGENT_REQUEST, issuer=name, audience=self.issuer, leeway=5)
            except PamError:
                continue
            return None if name in self.revoked else name
        return None

    def _renewal(self, name: str) -> dict[str, Any]:
        agent, now = self.agents[name], int(time.time())
        identity = b64decode(agent["identity_key"])
        statement = AgentStatement(name, GATEWAY, b64decode(agent["noise_key"]), identity)
        certificate = ssh_certs.make_user_certificate(
            self.user_ca,
            identity,
            key_id=name,
            principals=[f"serve:{GATEWAY}"],
            valid_after=now - 300,
            valid_before=now + self.lifetime,
        )
        return {
            "trust": self.trust(),
            "statement": statement.issue(self.grant_key, issuer=self.issuer, lifetime=self.lifetime),
            "certificate": certificate,
            "gateway": GATEWAY,
            "relays": self.relays,
            "recording_recipients": [self.recipient],
        }

    def _inbox(self, after: int, wait: float, agent: str) -> tuple[int, Any]:
        end = time.monotonic() + wait
        with self.condition:
            while after >= len(self.messages) and not self.down and agent not in self.revoked:
                heard = self.condition.wait(min(0.2, max(0.0, end - time.monotonic())))
                if not heard and time.monotonic() >= end:
                    break
            if agent in self.revoked:
                return 401, {"detail": "revoked"}
            cursor = len(self.messages)
            messages = [] if after < 0 else self.messages[after:]
        return 200, {"cursor": cursor, "messages": messages, "retry_ms": 0}

    def _open(self, session: str, agent: str) -> tuple[int, Any]:
        self.opened.append(session)
        self.open_gate.wait(60)
        if self.refuse_open is not None:
            return self.refuse_open[0], {"detail": self.refuse_open[1]}
        body = self.opening(self.sessions[session], agent)
        self.change_opening(body)
        return 200, body

    def opening(self, grant: Grant, agent: str) -> dict[str, Any]:
        account = self.accounts[grant.account]
        secret = {
            "session": grant.session,
            "account": grant.account,
            "agent": agent,
            "user": "app_ro",
            "password": account["password"],
        }
        box = SealedBox(PublicKey(b64decode(self.agents[agent]["sealing_key"])))
        return {
            "session": grant.session,
            "part": 1,
            "user": grant.user,
            "account": grant.account,
            "protocol": grant.protocol,
            "session_end": grant.session_end,
            "idle_limit": grant.idle_limit,
            "target": {"host": account["host"], "port": account["port"], "tls": {"mode": "disable"}},
            "budgets": {"rows_bytes": 16384},
            "allow_replication": False,
            "recipients": [self.recipient],
            "credential": b64encode(box.encrypt(json.dumps(secret).encode())),
        }

    def _recording(
        self, method: str, key: tuple[str, int], query: dict[str, str], body: bytes
    ) -> tuple[int, Any]:
        data = self.recordings.setdefault(key, bytearray())
        if method == "PUT":
            if int(query["offset"]) != len(data):
                return 409, {"detail": "wrong offset", "received": len(data)}
            data += body
        return 200, {"received": len(data), "complete": key in self.complete}


class Door(paramiko.ServerInterface):
    """Lets agents in whose certificate the platform's CA signed, and notes their forwards."""

    def __init__(self, relay: MiniRelay) -> None:
        self.relay = relay
        self.forwards: set[tuple[str, int]] = set()

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        return paramiko.AUTH_SUCCESSFUL if self.relay.admits else paramiko.AUTH_FAILED

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_port_forward_request(self, address: str, port: int) -> int:
        self.forwards.add((address, port))
        return port

    def cancel_port_forward_request(self, address: str, port: int) -> None:
        self.forwards.discard((address, port))


class MiniRelay:
    """An ssh server that agents tunnel to; a test opens channels down the newest tunnel."""

    def __init__(self, platform: FakePlatform, name: str = "r1", host_ca: SigningKey | None = None) -> None:
        self.platform = platform
        self.name = name
        self.admits = True
        self.host = SigningKey.generate()
        self.host_ca = host_ca or platform.host_ca
        self.links: list[tuple[fast_ssh.Transport, Door]] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self._accept, daemon=True)
        self.thread.start()
        platform.relays.append({"name": name, "host": "127.0.0.1", "port": self.port})

    def _accept(self) -> None:
        now = int(time.time())
        line = ssh_certs.make_host_certificate(
            self.host_ca,
            self.host.public,
            key_id=self.name,
            principals=["127.0.0.1", self.name],
            valid_after=now - 300,
            valid_before=now + 86400,
        )
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            door = Door(self)
            key = CertificateKey(self.host.seed(), line)
            transport = fast_ssh.serve(sock, name="mini-relay", host_key=key, server=door)
            # Before it starts: an agent may be served by it before this thread goes on, and be cut by a test.
            self.links.append((transport, door))
            fast_ssh.start(transport, door)

    def live(self, slot: int = 1) -> list[fast_ssh.Transport]:
        """Tunnels that are up and take channels for ``slot``, newest last."""
        return [
            transport
            for transport, door in self.links
            if transport.is_active() and (GATEWAY, slot) in door.forwards
        ]

    def open(self, session: str, slot: int = 1) -> fast_ssh.ChannelStream:
        return fast_ssh.open_forwarded(self.live(slot)[-1], GATEWAY, slot, session=session)

    def cut(self) -> None:
        for transport, _ in self.links:
            transport.close()

    def stop(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(60)  # so that every link was started
        self.cut()
        for transport, _ in self.links:
            transport.join(60)


class Echo:
    """A protocol for tests: dial, say ``ready``, then carry bytes both ways, recording the client's."""

    def __init__(self, opening: Opening) -> None:
        self.opening = opening
        self.broken = False

    def serve(self, client: Any, conversation: Any) -> None:
        try:
            sock = conversation.dial()
        except PamError as error:
            client.sendall(f"error: {error}\n".encode())
            raise
        with sock:
            target = SocketStream(sock)
            conversation.record([{"kind": "connect", "user": self.opening.credential.user}])
            client.sendall(b"ready\n")
            down = threading.Thread(target=self._down, args=(client, target, conversation), daemon=True)
            down.start()
            try:
                self._up(client, target, conversation)
            finally:
                target.shutdown(socket.SHUT_WR)
                down.join()

    def _up(self, client: Any, target: Any, conversation: Any) -> None:
        while data := client.recv(65536):
            if data == b"malformed\n":
                client.sendall(b"error: malformed\n")
                raise ClientProtocolError("the client sent something malformed")
            if data == b"fault\n":
                self.broken = True
                raise ZeroDivisionError
            conversation.record([{"kind": "up", "text": data.decode("latin-1")}])
            conversation.touch()
            target.sendall(data)

    def _down(self, client: Any, target: Any, conversation: Any) -> None:
        try:
            while data := target.recv(65536):
                client.sendall(data)
        except OSError:
            pass
        try:
            if conversation.end_reason:
                client.sendall(f"error: {conversation.end_reason}\n".encode())
            if not self.broken:
                client.shutdown(socket.SHUT_WR)
        except (OSError, PamError):
            pass

    @staticmethod
    def refuse(client: Any, message: str, hint: str) -> None:
        client.sendall(f"refused: {message} {hint}\n".encode())


@pytest.fixture
def echo_interceptor() -> type[Echo]:
    return Echo


@pytest.fixture
def platform() -> Iterator[FakePlatform]:
    fake = FakePlatform()
    yield fake
    fake.stop()


@pytest.fixture
def relay(platform: FakePlatform) -> Iterator[MiniRelay]:
    mini = MiniRelay(platform)
    yield mini
    mini.stop()


@pytest.fixture
def another_relay(platform: FakePlatform) -> Iterator[Callable[..., MiniRelay]]:
    made: list[MiniRelay] = []

    def make(name: str, host_ca: SigningKey | None = None) -> MiniRelay:
        made.append(MiniRelay(platform, name, host_ca))
        return made[-1]

    yield make
    for mini in made:
        mini.stop()


@pytest.fixture
def target() -> Iterator[SimpleNamespace]:
    """A TCP server that echoes; ``accepted`` holds its sockets. ``silent`` makes it read nothing."""
    listener = socket.create_server(("127.0.0.1", 0))
    state = SimpleNamespace(port=listener.getsockname()[1], accepted=[], silent=False)

    def echo(sock: socket.socket) -> None:
        try:
            while not state.silent and (data := sock.recv(65536)):
                sock.sendall(data)
            if not state.silent:
                sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def accept() -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            state.accepted.append(sock)
            threading.Thread(target=echo, args=(sock,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield state
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    for sock in state.accepted:
        sock.close()


@pytest.fixture
def settings(tmp_path: Path, platform: FakePlatform) -> Callable[..., config.AgentConfig]:
    """Writes agent.yml and loads it."""

    def make(**changes: Any) -> config.AgentConfig:
        document = {
            "platform": platform.url,
            "state_dir": str(tmp_path / "state"),
            "runtime_dir": str(tmp_path / "run"),
            "allow_targets": ["127.0.0.1:*"],
            "drain_timeout": 2,
            **changes,
        }
        path = tmp_path / "agent.yml"
        path.write_text(yaml.safe_dump(document))
        return config.load(path)

    return make


@pytest.fixture
def enrolled(platform: FakePlatform, settings: Callable[..., config.AgentConfig]) -> Callable[..., Any]:
    """Enrols an agent; its configuration."""

    def make(name: str = "dc1-a", **changes: Any) -> config.AgentConfig:
        made = settings(**changes)
        enrolment.enrol(made, "enrol-me", name, "test")
        return made

    return make


class Client:
    """A user's side: keeps one Noise key, opens channels with one grant."""

    def __init__(self, platform: FakePlatform, relay: MiniRelay) -> None:
        self.platform, self.relay = platform, relay
        self.key = os.urandom(32)
        self.public = bytes(PrivateKey(self.key).public_key)

    def connect(
        self, grant: Grant, token: bytes | None = None, key: bytes | None = None, gateway: str = GATEWAY
    ) -> SecureChannel:
        stream = self.relay.open(grant.session)
        return SecureChannel.connect(
            stream,
            gateway=gateway,
            static=key or self.key,
            check_agent=self.check_agent,
            grant=self.platform.token(grant) if token is None else token,
        )

    def check_agent(self, key: bytes, statement: bytes) -> None:
        stated = AgentStatement.parse(
            statement,
            VerifyKeys.of(self.platform.grant_key.public),
            issuer=self.platform.issuer,
            gateway=GATEWAY,
            now=time.time(),
        )
        stated.require_key(key)


@pytest.fixture
def client(platform: FakePlatform, relay: MiniRelay) -> Client:
    return Client(platform, relay)
