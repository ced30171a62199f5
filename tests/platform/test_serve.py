"""The real thing: init, apply, serve as processes, on SQLite and PostgreSQL, with agents over HTTP."""

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import warnings
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path

import pytest
import requests
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from patience import Metronome
from postgres_server import DEBIAN_BIN, PostgresServer
from processes import Process, free_port, listens, wait_for

from pam_common import tokens
from pam_common.errors import AuthenticationError, PamError, RefusedError
from pam_common.keys import SigningKey, b64encode
from pam_common.platform_client import PlatformClient
from pam_common.secure_channel import generate_x25519, x25519_public

# One platform per database for the whole module: keep it on one worker.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("test_serve")]

PROGRAM = Path(sys.executable).parent / "pam-platform"
SECRET = "robot-secret-robot-secret-robot"
WORKERS, THREADS = 2, 8


class Platform:
    """One platform's folder, its commands and its server."""

    def __init__(self, folder, database=None, scheme="http", **more):
        self.folder, self.port = folder, free_port()
        self.url = f"{scheme}://127.0.0.1:{self.port}"
        self.config = folder / "platform.yml"
        values = {
            "public_url": self.url,
            "state_dir": str(folder / "state"),
            "listen": f"127.0.0.1:{self.port}",
            "workers": WORKERS,
            "threads": THREADS,
            **more,
        }
        self.config.write_text(yaml.safe_dump(values | ({"database": database} if database else {})))
        self.server = None

    def run(self, *words, check=True):
        done = subprocess.run(
            [PROGRAM, "--config", self.config, *words], capture_output=True, text=True, check=False
        )
        if check:
            assert done.returncode == 0, done.stdout + done.stderr
        return done

    def secret(self, name, value):
        path = self.folder / name
        path.touch(mode=0o600)
        path.write_text(value)
        return str(path)

    def serve(self, **env):
        command = [PROGRAM, "--config", self.config, "serve"]
        self.server = Process("platform", command, self.folder / "log", env=env)
        self.server.ready_when(lambda: listens(self.port))

    def login(self, name="robot"):
        """A program's PlatformClient, by client credentials over HTTP."""
        answer = requests.post(
            f"{self.url}/identity/o/api/token",
            data={"grant_type": "client_credentials", "client_id": name, "client_secret": SECRET},
            timeout=60,
        )
        assert answer.status_code == 200, answer.text
        token = answer.json()["access_token"]
        return PlatformClient(self.url, authorization=lambda: f"Bearer {token}")

    def enrol(self, name):
        token = self.run("enrol-token", "agent", name, "--gateway", "dc1", "--quiet").stdout.strip()
        return HttpAgent(self.url, name, token)


class HttpAgent:
    """An agent's side of the API over a socket."""

    def __init__(self, url, name, token):
        self.name, self.identity = name, SigningKey.generate()
        self.sealing = generate_x25519()
        body = {
            "token": token,
            "name": name,
            "identity_key": b64encode(self.identity.public),
            "noise_key": b64encode(x25519_public(generate_x25519())),
            "sealing_key": b64encode(x25519_public(self.sealing)),
            "version": "1",
        }
        with self._client(url, "pam-enrol") as client:
            answer = client.post("/agent/enrol", body)
        self.client = self._client(url, answer["issuer"])
        self.cursor = self.client.get("/agent/inbox", params={"after": -1})["cursor"]

    def _client(self, url, audience):
        claims = {"iss": self.name, "sub": self.name, "aud": audience, "jti": "x"}
        return PlatformClient(
            url,
            authorization=lambda: (
                f"Bearer {tokens.sign(self.identity, tokens.AGENT_REQUEST, claims, lifetime=60)}"
            ),
        )

    def poll(self, wait=20):
        answer = self.client.get("/agent/inbox", params={"after": self.cursor, "wait": wait})
        self.cursor = answer["cursor"]
        return answer


def access(folder):
    return {
        "groups": [{"name": "dba"}],
        "users": [
            {"name": "robot", "groups": ["dba"], "service": True, "client_secret": {"file": "robot"}},
            {"name": "root2", "roles": ["admin"], "service": True, "client_secret": {"file": "robot"}},
        ],
        "gateways": [{"name": "dc1"}],
        "relays": [{"name": "r1", "host": "127.0.0.1", "port": 2222}],
        "resources": [
            {
                "name": "db",
                "protocol": "postgres",
                "gateway": "dc1",
                "host": "127.0.0.1",
                "port": 5432,
                "tls": {"mode": "disable"},
                "accounts": [{"name": "ro", "password": {"file": "robot"}}],
            }
        ],
        "policies": [{"name": "all", "groups": ["dba"], "accounts": ["*/*"], "max_duration": "8h"}],
    }


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def platform(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("platform")
    server, database = None, None
    if request.param == "postgresql":
        server = PostgresServer(debian=DEBIAN_BIN.exists())
        (folder / "pg").touch(mode=0o600)
        (folder / "pg").write_text(server.password)
        url = f"postgresql://postgres@127.0.0.1:{server.port}/postgres"
        database = {"url": url, "password_file": str(folder / "pg")}
    made = Platform(folder, database)
    try:
        password = made.secret("password", "correct horse battery")
        made.run("init", "--admin", "root", "--password-file", password)
        made.secret("robot", SECRET)
        (folder / "access.yml").write_text(yaml.safe_dump(access(folder)))
        made.run("apply", "-f", str(folder / "access.yml"))
        made.serve()
        yield made
    finally:
        if made.server:
            made.server.stop()
        if server:
            server.stop()


@pytest.fixture(scope="module")
def relay(platform):
    """A relay that is enrolled, so that connect has one to name."""
    token = platform.run("enrol-token", "relay", "r1", "--json").stdout
    identity, host = SigningKey.generate(), SigningKey.generate()
    claims = {"iss": "r1", "sub": "r1", "aud": "pam-enrol", "jti": "x"}
    proof = tokens.sign(identity, tokens.RELAY_REQUEST, claims, lifetime=60)
    body = {
        "token": json.loads(token)["token"],
        "name": "r1",
        "identity_key": b64encode(identity.public),
        "host_key": b64encode(host.public),
    }
    with PlatformClient(platform.url, authorization=lambda: f"Bearer {proof}") as client:
        return client.post("/relay/enrol", body)


@pytest.fixture(scope="module")
def agent(platform, relay):
    """After the relay, of which an agent that was there before would be told."""
    return platform.enrol("dc1-a")


@pytest.fixture
def robot(platform, agent):
    agent.poll(wait=0)  # who connects needs an agent that was heard of in the last two minutes
    return platform.login()


def connect(robot):
    body = {
        "resource": "db",
        "account": None,
        "ssh_key": b64encode(SigningKey.generate().public),
        "noise_key": b64encode(x25519_public(generate_x25519())),
    }
    return robot.post("/connect", body)["session"]


def test_a_session_opens_and_a_kill_arrives_within_a_second(robot, agent):
    """With two workers, the kill and the poll are often in different ones: do it a few times."""
    for _ in range(6):
        session = connect(robot)
        opened = agent.client.post(f"/agent/sessions/{session}/open")
        assert (opened["session"], opened["part"]) == (session, 1)
        heard = []
        with Metronome() as beat:

            def listen(heard=heard, beat=beat):
                heard.append((agent.poll(), time.monotonic(), beat.lost()))

            listener = threading.Thread(target=listen)
            listener.start()
            time.sleep(0.3)  # so that the poll waits, most times; it must hear of the kill either way
            robot.post(f"/sessions/{session}/kill", {"reason": "test"})
            killed, lost = time.monotonic(), beat.lost()
            listener.join(60)
        answer, when, lost_then = heard[0]
        assert [message["session"] for message in answer["messages"]] == [session]
        assert when - killed - (lost_then - lost) < 1
        with pytest.raises(RefusedError, match="over"):
            agent.client.post(f"/agent/sessions/{session}/open")


def test_waiting_agents_do_not_starve_the_rest(platform, robot, agent):
    """More polls than threads: half of the threads wait at most, and people are answered."""
    ended = threading.Event()

    def keep_polling():
        client = agent._client(platform.url, platform.url)
        while not ended.is_set():
            answer = client.get("/agent/inbox", params={"after": agent.cursor, "wait": 12})
            ended.wait(answer["retry_ms"] / 1000)

    pollers = [threading.Thread(target=keep_polling) for _ in range(WORKERS * THREADS + 4)]
    for poller in pollers:
        poller.start()
    try:
        time.sleep(1)
        with Metronome() as beat:
            for _ in range(10):
                began, lost = time.monotonic(), beat.lost()
                robot.get("/me")
                # Far from the time that it would wait for a poll to end.
                assert time.monotonic() - began - (beat.lost() - lost) < 4
    finally:
        ended.set()
        for poller in pollers:
            poller.join(60)


def test_commands_act_on_the_running_server(platform, robot, agent):
    session = connect(robot)
    agent.client.post(f"/agent/sessions/{session}/open")
    done = platform.run("user", "disable", "robot")
    assert "1 session was ended" in done.stdout
    assert session in [message["session"] for message in agent.poll()["messages"]]
    with pytest.raises(AuthenticationError):
        robot.get("/me")
    platform.run("user", "enable", "robot")
    assert platform.login().get("/me")["name"] == "robot"


def test_apply_twice_and_in_parallel_with_requests(platform, robot, agent):
    done = platform.run("apply", "-f", str(platform.folder / "access.yml"))
    assert "nothing to change" in done.stdout
    stop, failed = threading.Event(), []

    def ask():
        client = platform.login()
        while not stop.is_set():
            try:
                client.post(f"/sessions/{connect(client)}/end")
            except PamError as error:
                failed.append(error)
                return

    asking = [threading.Thread(target=ask) for _ in range(3)]
    for thread in asking:
        thread.start()
    try:
        content = access(platform.folder)
        for number in range(3):
            agent.poll(wait=0)  # it lives, however long the commands take
            content["policies"][0]["max_duration"] = f"{number + 1}h"
            (platform.folder / "access.yml").write_text(yaml.safe_dump(content))
            assert "max_duration" in platform.run("apply", "-f", str(platform.folder / "access.yml")).stdout
    finally:
        stop.set()
        for thread in asking:
            thread.join(120)
    assert failed == []


def test_the_audit_trail_cannot_be_changed(platform, robot):
    code = (
        "from pam_platform.commands.root import start; start()\n"
        "from django.db import DatabaseError, connection\n"
        "from pam_platform.audit.models import AuditEvent\n"
        "assert AuditEvent.objects.exists()\n"
        "for sql in ('UPDATE audit_auditevent SET actor = 1', 'DELETE FROM audit_auditevent'):\n"
        "    try:\n"
        "        connection.cursor().execute(sql)\n"
        "    except DatabaseError as error:\n"
        "        print('refused', error)\n"
    )
    env = {**os.environ, "PAM_PLATFORM_CONFIG": str(platform.config)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.count("append-only") == 2, done.stdout + done.stderr


def test_the_vault_is_rekeyed_under_a_running_server(platform, robot, agent):
    platform.run("vault", "rekey")
    session = connect(robot)
    assert agent.client.post(f"/agent/sessions/{session}/open")["credential"]


def test_init_is_safe_to_repeat(platform, robot):
    key = (platform.folder / "state/keys/vault.key").read_bytes()
    password = platform.secret("password", "correct horse battery")
    done = platform.run("init", "--admin", "root", "--password-file", password)
    assert "exists already" in done.stdout
    assert (platform.folder / "state/keys/vault.key").read_bytes() == key
    assert robot.get("/me")["name"] == "robot"


def test_nothing_on_disk_is_for_others(platform):
    state = platform.folder / "state"
    for path in [state, *state.rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path


def test_a_silent_client_holds_no_thread_for_long(platform, robot):
    """As many half-sent requests as threads: the server answers again when they are cut."""
    stalled = []
    for _ in range(WORKERS * THREADS):
        client = socket.create_connection(("127.0.0.1", platform.port))
        client.sendall(b"GET /api/v1/health HTTP/1.1\r\nHost: x")
        stalled.append(client)
    try:
        assert requests.get(f"{platform.url}/api/v1/health", timeout=120).status_code == 200
    finally:
        for client in stalled:
            client.close()


def test_status_says_what_is_connected(platform, robot, agent):
    agent.poll(wait=0)
    shown = json.loads(platform.run("status", "--json").stdout)
    assert (shown["server"], shown["agents"], shown["agents_connected"]) == ("up", 1, 1)


def test_a_request_for_another_host_is_one_line(platform, robot):
    url = f"{platform.url}/api/v1/health"
    assert requests.get(url, headers={"Host": "evil\texample"}, timeout=60).status_code == 400
    lines = [line for line in (platform.folder / "log").read_text().splitlines() if "another host" in line]
    assert len(lines) == 1
    assert "level=warning" in lines[0]
    assert 'host="evil' in lines[0]
    assert "traceback" not in lines[0]


def test_logs_hold_no_secret(platform):
    log = (platform.folder / "log").read_text()
    assert SECRET not in log
    assert "Bearer" not in log
    assert "Traceback" not in log, log[-3000:]


def under_way(platform, agent):
    """A poll that the server has begun to answer, in a thread; and where its answer or its error comes."""
    answers = []

    def poll():
        try:
            answers.append(agent.poll(wait=25))
        except PamError as error:
            answers.append(error)

    agent.poll(wait=0)  # its connection is up
    waiting = threading.Thread(target=poll)
    waiting.start()
    time.sleep(0.5)
    wait_for(lambda: not unread(platform.port), "the server to have read it")
    return waiting, answers


def unread(port):
    """Bytes that the server on the loopback ``port`` has not read yet."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    ours = [row for row in rows if int(row[1].rpartition(":")[2], 16) == port and row[3] == "01"]
    return sum(int(row[4].partition(":")[2], 16) for row in ours)


def test_it_stops_soon_though_agents_wait(platform, agent):
    waiting, _ = under_way(platform, agent)
    with Metronome() as beat:
        began = time.monotonic()
        assert platform.server.stop() == 0
        assert time.monotonic() - began - beat.lost() < 8
    waiting.join(60)
    assert not waiting.is_alive()
    down = platform.run("status", check=False)
    assert down.returncode == 69
    assert "error: nothing healthy answers" in down.stderr
    platform.serve()


def test_a_new_server_takes_the_port_soon_after_the_first_process_was_killed(platform, agent):
    """Its workers notice, and do not wait for the agents that they have on the line."""
    waiting, answers = under_way(platform, agent)
    with Metronome() as beat:
        platform.server.send(signal.SIGKILL)
        began = time.monotonic()
        wait_for(lambda: not listens(platform.port), "the port to be free")
        assert time.monotonic() - began - beat.lost() < 5, "gunicorn tries to listen for five seconds"
    waiting.join(60)
    assert answers
    platform.server.stop()
    platform.serve()


# --- systemd and TLS -----------------------------------------------------------------------------------


@pytest.fixture
def certificate(tmp_path):
    """A self-signed certificate for 127.0.0.1: (cert, key) files."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "platform")])
    names = x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))])
    now = datetime.now(UTC)
    cert = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(names, critical=False)
        .sign(key, hashes.SHA256())
    )
    files = tmp_path / "tls.crt", tmp_path / "tls.key"
    files[0].write_bytes(cert.public_bytes(Encoding.PEM))
    files[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return files


def test_it_serves_tls_itself(tmp_path, certificate):
    cert, key = certificate
    platform = Platform(tmp_path, scheme="https", tls={"cert": str(cert), "key": str(key)}, workers=1)
    platform.run("init")
    platform.run("check-config")
    platform.serve()
    try:
        answer = requests.get(f"{platform.url}/api/v1/health", verify=str(cert), timeout=60)
        assert answer.json() == {"status": "ok"}
        assert "max-age" in answer.headers["Strict-Transport-Security"]
        assert json.loads(platform.run("status", "--json").stdout)["server"] == "up"
        with pytest.raises(requests.ConnectionError):
            requests.get(f"http://127.0.0.1:{platform.port}/api/v1/health", timeout=60)
        old = ssl.create_default_context(cafile=str(cert))
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
        with (
            socket.create_connection(("127.0.0.1", platform.port)) as raw,
            pytest.raises((ssl.SSLError, ConnectionError)),
        ):
            old.wrap_socket(raw, server_hostname="127.0.0.1")
    finally:
        platform.server.stop()
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log, log


def test_a_reload_takes_on_what_it_can_and_refuses_the_rest(tmp_path):
    platform = Platform(tmp_path, workers=1)
    platform.run("init")
    platform.serve()
    log, text = tmp_path / "log", platform.config.read_text()
    refused = "reload refused, going on as before"
    try:
        platform.config.write_text(text.replace("workers: 1", "workers: 2"))
        platform.server.send(signal.SIGHUP)
        wait_for(lambda: log.read_text().count("Booting worker") >= 3, "new workers")
        # An old worker may take the question with it.
        wait_for(lambda: platform.run("status", check=False).returncode == 0, "an answer")
        for number, wrong, words in (
            (1, f"{text}nonsense: 1\n", "unknown key"),
            (2, f"{text}behind_proxy: true\n", "restart"),
        ):
            platform.config.write_text(wrong)
            platform.server.send(signal.SIGHUP)
            wait_for(lambda number=number: log.read_text().count(refused) == number, words)
            assert words in log.read_text().rpartition(refused)[2]
        assert requests.get(f"{platform.url}/api/v1/health", timeout=60).json() == {"status": "ok"}
    finally:
        platform.server.stop()
    assert "Traceback" not in log.read_text()


def test_systemd_hears_that_it_is_ready_and_lives(tmp_path):
    platform = Platform(tmp_path, workers=1)
    platform.run("init")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        # A short name: socket addresses hold about 100 bytes.
        systemd.bind(b"\0pam-test-%d" % os.getpid())
        systemd.settimeout(120)
        platform.serve(NOTIFY_SOCKET=f"@pam-test-{os.getpid()}", WATCHDOG_USEC="30000000")
        try:
            assert systemd.recv(4096).startswith(b"READY=1")
            assert systemd.recv(4096) == b"WATCHDOG=1"
        finally:
            platform.server.stop()
