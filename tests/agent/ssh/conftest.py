"""A real sshd, the interceptor in front of it on a local port, and the stock programs of OpenSSH."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from ssh_server import SshServer

from pam_agent import target
from pam_agent.protocols.base import Credential, Opening, SshIdentity, Target
from pam_agent.protocols.ssh import SshInterceptor
from pam_agent.target import TargetRules
from pam_common.errors import PamError
from pam_common.keys import SigningKey
from pam_common.ssh_certs import make_host_certificate
from pam_common.stream import SocketStream

HOST_CA = SigningKey(b"\7" * 32)
HOST = SigningKey(b"\x08" * 32)
SESSION = "s-" + "a" * 26
EVERYTHING = ["shell", "exec", "sftp", "local-forward", "remote-forward"]


def wait_for(condition: Callable[[], object], what: str, timeout: float = 60.0) -> None:
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"{what} did not happen in {timeout} s")
        time.sleep(0.01)


def identity(user_seed: bytes = b"\x09" * 32, user_certificate: str | None = None) -> SshIdentity:
    now = int(time.time())
    line = make_host_certificate(
        HOST_CA, HOST.public, key_id="s", principals=["dc1.pam"], valid_after=now - 300,
        valid_before=now + 3600,
    )  # fmt: skip
    return SshIdentity(HOST.seed(), user_seed, line, user_certificate)


class LocalConversation:
    """A Conversation that records into a list."""

    def __init__(self, gate: Gate, number: int) -> None:
        self.number = number
        self.events: list[dict[str, Any]] = []
        self._gate = gate

    @property
    def end_reason(self) -> str | None:
        return self._gate.end_reason

    def record(self, events: Sequence[dict[str, Any]]) -> None:
        if self._gate.recorder_error is not None:
            raise self._gate.recorder_error
        for event in events:
            assert re.fullmatch(r"[a-z][a-z0-9_]{0,31}", event["kind"]), "the format takes no other kind"
            assert len(json.dumps(event)) < 1 << 20, "nor a longer line"
        self.events += [dict(event) for event in events]

    def dial(self, host: str | None = None, port: int | None = None) -> socket.socket:
        if self.end_reason is not None:
            raise PamError(self.end_reason)
        where = self._gate.opening.target
        if self._gate.rules is not None:
            target.permitted(host or where.host, port or where.port, self._gate.rules)
        sock = socket.create_connection((host or where.host, port or where.port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._gate.targets.append(sock.dup())
        return sock

    def permitted(self, host: str, port: int) -> str:
        if self._gate.rules is not None:
            return target.permitted(host, port, self._gate.rules)
        return host

    def touch(self) -> None:
        self._gate.touched += 1


@dataclass
class Gate:
    """A TCP port whose connections the interceptor serves, each in a thread of its own."""

    opening: Opening
    folder: Path
    end_reason: str | None = None
    recorder_error: PamError | None = None
    touched: int = 0
    rules: TargetRules | None = None  #: allow_targets; None is everything
    conversations: list[LocalConversation] = field(default_factory=list)
    errors: list[PamError] = field(default_factory=list)
    targets: list[socket.socket] = field(default_factory=list)
    clients: list[SocketStream] = field(default_factory=list)
    threads: list[threading.Thread] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.interceptor = SshInterceptor(self.opening)
        self._starting = threading.Lock()  # whoever sees a connection's thread sees it started
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = int(self._listener.getsockname()[1])
        self.known_hosts = self.folder / f"known-{self.port}"
        ca = HOST_CA.private_key.public_key()
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        line = ca.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
        self.known_hosts.write_text(f"@cert-authority *.pam {line}\n")
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

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
        stream = SocketStream(sock)
        self.clients.append(stream)
        try:
            self.interceptor.serve(stream, conversation)
        except PamError as error:
            self.errors.append(error)
        finally:
            stream.abort()
            stream.close()

    def end(self, reason: str, last_words: float = 10.0) -> None:
        """What the session does on a kill; the clients follow after its moment for last words, which is
        longer here than the session's: on a busy machine, too, what is to be said must come through."""
        self.end_reason = reason
        for sock in self.targets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        timer = threading.Timer(last_words, lambda: [client.abort() for client in self.clients])
        timer.daemon = True
        timer.start()

    def close(self) -> None:
        self._listener.close()
        self.end("the test is over", last_words=0.3)
        with self._starting:
            threads = list(self.threads)
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), "a connection's thread did not end"

    # -- the user's programs ---------------------------------------------------------------------------

    @property
    def options(self) -> list[str]:
        return [
            *("-F", "none", "-o", "BatchMode=yes", "-o", "HostKeyAlias=dc1.pam"),
            *("-o", f"UserKnownHostsFile={self.known_hosts}", "-o", "GlobalKnownHostsFile=/dev/null"),
            *("-o", "StrictHostKeyChecking=yes", "-o", "IdentityAgent=none", "-o", "PubkeyAuthentication=no"),
        ]

    def ssh_command(self, *words: str) -> list[str]:
        return ["ssh", *self.options, "-p", str(self.port), "me@127.0.0.1", *words]

    def ssh(
        self, *words: str, options: Sequence[str] = (), **more: Any
    ) -> subprocess.CompletedProcess[bytes]:
        command = ["ssh", *self.options, *options, "-p", str(self.port), "me@127.0.0.1", *words]
        more.setdefault("timeout", 300)
        if "input" not in more:
            more.setdefault("stdin", subprocess.DEVNULL)
        return subprocess.run(command, capture_output=True, check=False, **more)

    def run(self, program: str, *words: str, **more: Any) -> subprocess.CompletedProcess[bytes]:
        """``scp``, ``sftp`` with its own options before ``words``."""
        command = [program, *self.options, "-P", str(self.port), *words]
        more.setdefault("timeout", 300)
        return subprocess.run(command, capture_output=True, check=False, **more)

    # -- the recording ---------------------------------------------------------------------------------

    @property
    def events(self) -> list[dict[str, Any]]:
        return [event for conversation in self.conversations for event in conversation.events]

    def kinds(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["kind"] == kind]

    def ended(self) -> None:
        """Wait until every connection is over, so that all is recorded."""

        def over() -> bool:
            with self._starting:
                return not any(thread.is_alive() for thread in self.threads)

        wait_for(over, "the end of the connections")


MakeGate = Callable[..., Gate]


@pytest.fixture(scope="session")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    server = SshServer(tmp_path_factory.mktemp("sshd"), kinds=("ed25519", "ecdsa", "rsa"))
    yield server
    server.stop()


@pytest.fixture
def make_gate(tmp_path: Path) -> Iterator[MakeGate]:
    """``make_gate(server, allow=[…], options={…}, **fields of the Credential)``."""
    gates: list[Gate] = []

    def make(
        server: Any,
        *,
        options: dict[str, Any] | None = None,
        account: dict[str, Any] | None = None,
        ssh: SshIdentity | None = None,
        rows_bytes: int = 16384,
        **credential: Any,
    ) -> Gate:
        if not credential:
            credential = {"secrets": {"private_key": server.key.read_text()}}
        credential.setdefault("user", server.user)
        base = {"host_keys": server.host_keys[:1], **(options or {})}
        base["account"] = {"allow": EVERYTHING, "env": ["LANG", "LC_*", "DEMO_*"], **(account or {})}
        opening = Opening(
            session=SESSION, part=1, user="alice", account="web/deploy", protocol="ssh",
            session_end=int(time.time()) + 3600, idle_limit=0, target=Target("127.0.0.1", server.port),
            credential=Credential(**credential), rows_bytes=rows_bytes, options=base,
            ssh=ssh or identity(),
        )  # fmt: skip
        gate = Gate(opening, tmp_path)
        gates.append(gate)
        return gate

    yield make
    for gate in gates:
        gate.close()


@pytest.fixture
def gate(sshd: SshServer, make_gate: MakeGate) -> Gate:
    return make_gate(sshd)


@pytest.fixture
def make_identity() -> Callable[..., SshIdentity]:
    return identity
