"""The product as it is deployed: HTTPS by a private CA, two relays of which one is down, targets on IPv6."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from processes import Process, free_port, listens, wait_for
from stack import BIN, Person, Stack

ROBOT = "robot-secret-robot-secret-robot"


class TwoRelays(Stack):
    """A stack with a second relay, r0, which clients and agents see first, and a program as a user."""

    second_port = 0

    def access(self) -> dict[str, Any]:
        document = super().access()
        self.second_port = self.second_port or free_port()
        secret = self._secret("robot", ROBOT)
        document["users"].append(
            {"name": "robot", "service": True, "groups": ["dba"], "client_secret": {"file": secret}}
        )
        document["relays"].append({"name": "r0", "host": "127.0.0.1", "port": self.second_port})
        return document

    def start_second(self) -> None:
        config = self.folder / "relay-r0.yml"
        folders = {f"{name}_dir": str(self._private(f"r0-{name}")) for name in ("state", "runtime")}
        listen = f"127.0.0.1:{self.second_port}"
        self._yaml(config, {"platform": self.url, "listen": listen, **folders, **self._trusts()})
        self._enrol("pam-relay", config, "relay", "r0")
        process = Process("r0", [BIN / "pam-relay", "--config", config, "run"], self.folder / "r0.log")
        self.processes["r0"] = process
        process.ready_when(lambda: listens(self.second_port))


def certified(folder: Path) -> tuple[Path, dict[str, str]]:
    """A private CA's file, and a certificate of it for 127.0.0.1 as platform.yml's ``tls``."""
    now = datetime.now(UTC)
    ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    ca_name, name = (
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in ("ca", "platform")
    )

    def made(subject: x509.Name, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        builder = x509.CertificateBuilder(ca_name, subject, public, x509.random_serial_number())
        return builder.not_valid_before(now - timedelta(minutes=1)).not_valid_after(now + timedelta(hours=1))

    ca = made(ca_name, ca_key.public_key()).add_extension(x509.BasicConstraints(True, 0), critical=True)
    names = x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))])
    leaf = made(name, key.public_key()).add_extension(names, critical=False)
    files = {"ca": folder / "ca.pem", "cert": folder / "tls.crt", "key": folder / "tls.key"}
    files["ca"].write_bytes(ca.sign(ca_key, hashes.SHA256()).public_bytes(Encoding.PEM))
    files["cert"].write_bytes(leaf.sign(ca_key, hashes.SHA256()).public_bytes(Encoding.PEM))
    files["key"].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return files["ca"], {"cert": str(files["cert"]), "key": str(files["key"])}


@pytest.fixture(scope="module")
def six(postgres) -> Iterator[int]:
    """A port of ::1 that leads to the database."""
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        threading.Thread(target=_forward, args=(server, postgres.port), daemon=True).start()
        yield server.getsockname()[1]


def _forward(server: socket.socket, port: int) -> None:
    while True:
        try:
            left = server.accept()[0]
        except OSError:
            return
        right = socket.create_connection(("127.0.0.1", port))
        for pair in ((left, right), (right, left)):
            threading.Thread(target=_copy, args=pair, daemon=True).start()


def _copy(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        sink.close()


@pytest.fixture(scope="module")
def stack(tmp_path_factory, postgres, six) -> Iterator[TwoRelays]:
    folder = tmp_path_factory.mktemp("tls")
    ca, tls = certified(folder)
    with TwoRelays(tmp_path_factory.mktemp("stack"), ca=ca, platform_config={"tls": tls}) as running:
        running.add_database(postgres)
        running.add_database(postgres, name="six-db", host="::1", port=six)
        running.agent_config = {"allow_targets": [f"127.0.0.1:{postgres.port}", f"[::1]:{six}"]}
        running.start_platform()
        running.start_second()
        running.start()
        yield running


def routes(stack: Stack, name: str) -> int:
    return len(stack.status("pam-relay", name)["routes"])


def test_everything_goes_by_https_of_a_private_ca(stack, alice, replay) -> None:
    shown = alice.run("connect", "demo-db/readonly", "--", "psql", "-XAtc", "select 'over https'").stdout
    assert "over https" in shown
    session = json.loads(alice.run("sessions", "ls", "--json").stdout)[0]["id"]
    assert any("over https" in event.get("sql", "") for event in replay(alice, session))


def test_without_the_ca_nobody_is_believed(stack, tmp_path) -> None:
    stranger = stack.person("bob")
    done = stranger.run("login", "--no-browser", "--platform", stack.url, check=False)
    assert done.returncode == 69
    assert "certificate" in done.stderr
    config = tmp_path / "agent.yml"
    folders = {f"{name}_dir": str(tmp_path / name) for name in ("state", "runtime")}
    config.write_text(json.dumps({"platform": stack.url, "allow_targets": ["10.0.0.1:1"], **folders}))
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text(stack.platform("enrol-token", "agent", "dc1-z", "--gateway", "dc1", "--quiet"))
    command = [BIN / "pam-agent", "--config", config, "enrol", "--token-file", token, "--name", "dc1-z"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 69
    assert "certificate" in refused.stderr


def test_a_program_connects_by_its_client_credentials(stack, tmp_path) -> None:
    robot = Person(stack, "robot", "", tmp_path / "home")
    robot.home.mkdir(mode=0o700)
    config = robot.home / "client.yml"
    config.touch(mode=0o600)
    config.write_text(f"platform: {stack.url}\nplatform_ca: {stack.ca}\n")
    secret = tmp_path / "secret"
    secret.touch(mode=0o600)
    secret.write_text(ROBOT)
    env = {**robot.environment(), "PAM_CLIENT_ID": "robot", "PAM_CLIENT_SECRET_FILE": str(secret)}
    words = ["connect", "demo-db/readonly", "--", "psql", "-XAtc", "select 'by a program'"]
    done = subprocess.run(robot.command(*words), env=env, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "by a program", done.stderr
    listed = subprocess.run(
        robot.command("sessions", "ls", "--json"), env=env, capture_output=True, text=True, check=True
    )
    assert [row["user"] for row in json.loads(listed.stdout)] == ["robot"]
    secret.write_text("another-secret-another-secret")
    refused = subprocess.run(robot.command("ls"), env=env, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "does not accept the credentials" in refused.stderr


def test_a_target_on_ipv6(alice) -> None:
    assert "six" in alice.run("connect", "six-db/readonly", "--", "psql", "-XAtc", "select 'six'").stdout


def test_sessions_go_through_the_relay_that_is_up(stack, alice, connect) -> None:
    wait_for(lambda: routes(stack, "relay") == routes(stack, "relay-r0") == 1, "a route at both relays")
    with connect(alice) as connected:
        connected.open().close()
        stack.processes["r0"].kill()
        with connected.open() as connection:  # the same session, through the other one
            assert connection.execute("select 1").fetchone() == (1,)
    alice.run("connect", "demo-db/readonly", "--", "psql", "-Xc", "select 1")
    assert stack.status("pam-agent", "dc1-a")["ok"], "one relay of two is enough"


def test_a_unix_socket_instead_of_a_port(alice, tmp_path) -> None:
    folder = tmp_path / "s"
    shown = alice.run(
        "connect", "demo-db/readonly", "--socket", str(folder), "--", "psql", "-XAtc", "select current_user"
    ).stdout
    assert shown.strip() == "demo_db_ro"
    assert not list(folder.glob("*")), "the socket is removed"
