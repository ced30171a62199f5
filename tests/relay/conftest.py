"""A relay in this process, from CA keys alone, and the peers that talk to it: no platform needed."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from processes import free_port

from pam_common import fast_ssh, ssh_certs, tokens
from pam_common.fast_ssh import ChannelStream, Transport
from pam_common.keys import SigningKey, VerifyKeys, b64decode, new_session_id
from pam_common.secure_channel import SecureChannel, generate_x25519
from pam_common.ssh_certs import CertificateKey
from pam_relay.bundle import Bundle
from pam_relay.config import Limits, RelayConfig, load
from pam_relay.server import RelayServer

GATEWAY = "dc1"


class EchoAgent:
    """An agent's tunnel that sends back what it gets, half-closes included; or hands channels out."""

    def __init__(self, transport: Transport, *, echo: bool = True) -> None:
        self.transport = transport
        self.streams: list[ChannelStream] = []
        self.origins: list[tuple[str, int]] = []
        self._echo = echo

    def arrived(self, stream: ChannelStream, origin: tuple[str, int], server: tuple[str, int]) -> None:
        self.origins.append(origin)
        self.streams.append(stream)
        if self._echo:
            threading.Thread(target=self._answer, args=(stream,), daemon=True).start()

    def _answer(self, stream: ChannelStream) -> None:
        with contextlib.suppress(OSError):
            while data := stream.recv(1 << 17):
                stream.sendall(data)
            stream.shutdown(socket.SHUT_WR)
        stream.close()


class World:
    """The CAs, one relay, and ways to make certificates and connections for it."""

    def __init__(self) -> None:
        self.user_ca = SigningKey.generate()
        self.host_ca = SigningKey.generate()
        self.host = SigningKey.generate()
        self.server: RelayServer | None = None
        self.address = ("", 0)
        self._opened: list[Transport] = []

    @property
    def relay(self) -> RelayServer:
        assert self.server is not None
        return self.server

    def bundle(self, serial: int = 1, **changes: Any) -> Bundle:
        bundle = Bundle(
            relay="r1",
            serial=serial,
            user_ca=VerifyKeys.of(self.user_ca.public),
            gateways=frozenset({GATEWAY, "dc2"}),
            host_certificate=self.host_certificate(),
            issued=int(time.time()),
        )
        return replace(bundle, **changes)

    def host_certificate(self, lifetime: int = 3600) -> str:
        now = int(time.time())
        return ssh_certs.make_host_certificate(
            self.host_ca,
            self.host.public,
            key_id="r1",
            principals=["r1", "127.0.0.1"],
            valid_after=now - 300,
            valid_before=now + lifetime,
        )

    def start(self, limits: Limits | None = None, **options: Any) -> RelayServer:
        self.server = RelayServer(self.bundle(), self.host.seed(), limits=limits, **options)
        self.address = self.server.listen("127.0.0.1", 0)
        return self.server

    def login(
        self, principal: str, key_id: str, *, lifetime: float = 600, ca: Any = None, **more: Any
    ) -> CertificateKey:
        key = SigningKey.generate()
        now = int(time.time())
        line = ssh_certs.make_user_certificate(
            ca or self.user_ca,
            key.public,
            key_id=key_id,
            principals=more.pop("principals", [principal]),
            valid_after=now - 300,
            valid_before=int(now + lifetime),
            **more,
        )
        return CertificateKey(key.seed(), line)

    def connect(self, login: CertificateKey) -> Transport:
        sock = socket.create_connection(self.address)
        transport = fast_ssh.connect(
            sock,
            name="peer",
            host_ca=VerifyKeys.of(self.host_ca.public),
            hostname="r1",
            login=login,
            timeout=120,
        )
        self._opened.append(transport)
        return transport

    def client(self, session: str | None = None, gateway: str = GATEWAY, **options: Any) -> Transport:
        return self.connect(self.login(f"connect:{gateway}", session or new_session_id(), **options))

    def agent(
        self,
        name: str = "dc1-a",
        gateway: str = GATEWAY,
        slot: int = 1,
        *,
        echo: bool = True,
        **options: Any,
    ) -> EchoAgent:
        transport = self.connect(self.login(f"serve:{gateway}", name, **options))
        agent = EchoAgent(transport, echo=echo)
        transport.request_port_forward(gateway, slot, agent.arrived)
        return agent

    def close(self) -> None:
        for transport in self._opened:
            transport.close()
        if self.server is not None:
            self.server.close()


@pytest.fixture
def world() -> Iterator[World]:
    """CAs and makers of peers; ``world.start(limits)`` starts the relay."""
    world = World()
    yield world
    world.close()


@pytest.fixture
def relay(world: World) -> World:
    """A world whose relay runs with default limits."""
    world.start()
    return world


@pytest.fixture
def wait_for() -> Callable[..., None]:
    """Wait until a condition holds, or fail."""

    def wait(condition: Callable[[], object], seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not happen in time"
            time.sleep(0.01)

    return wait


@pytest.fixture
def until_up(config: RelayConfig, wait_for: Callable[..., None]) -> Callable[[subprocess.Popen[Any]], None]:
    """Wait until a process of the relay serves, and ends in order when it is told to."""

    def catches(pid: int, number: int) -> bool:
        caught = int(Path(f"/proc/{pid}/status").read_text().split("SigCgt:\t")[1].split()[0], 16)
        return bool(caught >> (number - 1) & 1)

    def up(process: subprocess.Popen[Any]) -> None:
        def seen() -> bool:
            assert process.poll() is None, f"it ended with {process.returncode}"
            # The socket comes just before the signals are taken over.
            return config.status_socket.exists() and catches(process.pid, signal.SIGTERM)

        wait_for(seen, 120)

    return up


class FakePlatform:
    """The two relay endpoints over real HTTP, with real signatures; what it answers is the tests' choice."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.key = SigningKey.generate()
        self.trust_keys = [self.key]
        self.serial = 1
        self.revoked_agents: list[str] = []
        self.revoked_sessions: list[str] = []
        self.relay = "r1"
        self.enrolments: list[dict[str, Any]] = []
        self.down = False
        self.identity: VerifyKeys | None = None
        platform = self

        class Endpoint(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self._answer(*platform.enrol(body, self.headers["Authorization"]))

            def do_GET(self) -> None:
                self._answer(*platform.bundle(self.headers["Authorization"]))

            def _answer(self, status: int, body: dict[str, Any]) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def enrol(self, body: dict[str, Any], authorization: str) -> tuple[int, dict[str, Any]]:
        self.identity = VerifyKeys.of(b64decode(body["identity_key"]))
        self._check(authorization, "pam-enrol")
        if body["token"] != "good" or body["name"] != self.relay:
            return 403, {"detail": "the token is not valid", "hint": "ask for another"}
        self.enrolments.append(body)
        self.host_public = b64decode(body["host_key"])
        answer = {
            "relay": self.relay,
            "issuer": self.url,
            "trust": self.trust(),
            "bundle": self.bundle_token(),
        }
        return 200, answer

    def bundle(self, authorization: str) -> tuple[int, dict[str, Any]]:
        if self.down:
            return 503, {"detail": "away"}
        self._check(authorization, self.url)
        return 200, {"trust": self.trust(), "bundle": self.bundle_token()}

    def _check(self, authorization: str, audience: str) -> None:
        assert self.identity is not None
        token = authorization.removeprefix("Bearer ")
        tokens.verify(token, self.identity, tokens.RELAY_REQUEST, issuer="r1", audience=audience)

    def trust(self) -> str:
        claims = {
            "iss": self.url,
            "aud": "pam-trust",
            "grant_keys": VerifyKeys.of(*(key.public for key in self.trust_keys)).to_json(),
            "relay_host_ca": VerifyKeys.of(self.world.host_ca.public).to_json(),
            "relay_user_ca": VerifyKeys.of(self.world.user_ca.public).to_json(),
            "recording_keys": [],
        }
        return tokens.sign(self.key, tokens.TRUST, claims, lifetime=86400)

    def bundle_token(self, **changes: Any) -> str:
        now = int(time.time())
        certificate = ssh_certs.make_host_certificate(
            self.world.host_ca,
            self.host_public,
            key_id="r1",
            principals=["r1", "127.0.0.1"],
            valid_after=now - 300,
            valid_before=now + 3600,
        )
        claims = {
            "iss": self.url,
            "aud": "relay:r1",
            "relay_user_ca": VerifyKeys.of(self.world.user_ca.public).to_json(),
            "revoked_agents": self.revoked_agents,
            "revoked_sessions": self.revoked_sessions,
            "gateways": [GATEWAY],
            "host_certificate": certificate,
            "serial": self.serial,
            **changes,
        }
        return tokens.sign(changes.get("key", self.key), tokens.RELAY_BUNDLE, claims, lifetime=86400)


@pytest.fixture
def platform(world: World) -> Iterator[FakePlatform]:
    """A platform's relay endpoints for the CAs of ``world``."""
    platform = FakePlatform(world)
    yield platform
    platform.close()


@pytest.fixture
def config(platform: FakePlatform, tmp_path: Path) -> RelayConfig:
    """A configuration in a folder of its own, written to ``relay.yml`` there."""
    path = tmp_path / "relay.yml"
    path.write_text(
        f"platform: {platform.url}\n"
        f"state_dir: {tmp_path}/state\n"
        f"runtime_dir: {tmp_path}/run\n"
        f"listen: 127.0.0.1:{free_port()}\n"
        "poll_interval: 1s\n"
        "drain_timeout: 60s\n"
    )
    return load(path)


@pytest.fixture
def join(relay, wait_for) -> Callable[..., tuple[ChannelStream, ChannelStream]]:
    """Open a channel through the relay: its two ends. ``join.client`` and ``join.agent`` are the links."""
    agent = relay.agent(echo=False)

    class Join:
        def __init__(self) -> None:
            self.agent = agent
            self.client: Transport = relay.client()

        def __call__(self, client: Transport | None = None) -> tuple[ChannelStream, ChannelStream]:
            count = len(agent.streams)
            near = fast_ssh.open_direct(client or self.client, "dc1")
            wait_for(lambda: len(agent.streams) > count)
            return near, agent.streams[-1]

    return Join()


@pytest.fixture
def secure(join) -> Callable[[], tuple[SecureChannel, SecureChannel]]:
    """Open a channel and shake hands: the client's end and the agent's."""

    def make() -> tuple[SecureChannel, SecureChannel]:
        near, far = join()
        accepted: list[SecureChannel] = []

        def accept() -> None:
            channel, _ = SecureChannel.accept(
                far, gateway="dc1", static=generate_x25519(), statement=b"statement"
            )
            accepted.append(channel)

        thread = threading.Thread(target=accept)
        thread.start()
        channel = SecureChannel.connect(
            near, gateway="dc1", static=generate_x25519(), check_agent=lambda *_: None, grant=b"grant"
        )
        thread.join()
        return channel, accepted[0]

    return make
