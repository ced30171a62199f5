"""Logging in to real targets: TLS policies, channel binding, every method, protocol 3.2."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
from pathlib import Path

import psycopg
import pytest

from pam_agent.protocols.base import TargetLoginError, TlsPolicy

pytestmark = pytest.mark.slow

CHECK = "select ssl, version, client_dn from pg_stat_ssl where pid = pg_backend_pid()"


@pytest.mark.parametrize("mode", ["require", "verify-ca", "verify-full"])
def test_postgres_tls_modes(pg15, make_gate, psql, authority, mode):
    policy = TlsPolicy(mode, server_name="db.test", ca_pem=authority.pem)
    gate = make_gate(pg15, tls=policy, user="tls_user")
    done = psql(gate, CHECK)
    assert done.stdout == "t|TLSv1.3|\n", done.stderr
    gate.wait_done()
    start = gate.of("start")[0]
    assert (start["tls"], start["login"]) == ("TLSv1.3", "SCRAM-SHA-256-PLUS")


def test_postgres_tls_verify_full_by_address(pg15, make_gate, psql, authority):
    gate = make_gate(pg15, tls=TlsPolicy("verify-full", ca_pem=authority.pem))
    assert psql(gate, "select 1").stdout == "1\n"


def test_postgres_tls_require_without_ca_does_not_verify(pg15, make_gate, psql):
    gate = make_gate(pg15, tls=TlsPolicy("require"))
    assert psql(gate, "select 1").stdout == "1\n"


@pytest.mark.parametrize(
    ("mode", "name", "ca", "words"),
    [
        ("verify-full", "other.test", True, "Hostname mismatch"),
        ("verify-full", "db.test", False, "self-signed|unable to get"),
        ("verify-ca", "db.test", False, "self-signed|unable to get"),
        ("require", "db.test", False, "self-signed|unable to get"),  # a CA that is given counts
    ],
)
def test_postgres_tls_refuses(pg15, make_gate, psql, authority, other_authority, mode, name, ca, words):
    pem = authority.pem if ca else other_authority.pem
    gate = make_gate(pg15, tls=TlsPolicy(mode, server_name=name, ca_pem=pem))
    done = psql(gate, "select 1")
    assert done.returncode == 2
    assert "the target's certificate is refused" in done.stderr
    assert any(word in done.stderr for word in words.split("|"))
    gate.wait_done()
    assert isinstance(gate.errors[0], TargetLoginError)


def test_postgres_tls_where_the_target_has_none(pg18, make_gate, psql):
    gate = make_gate(pg18, tls=TlsPolicy("require"))
    assert "the target does not offer TLS" in psql(gate, "select 1").stderr


def test_postgres_client_certificate_leaves_no_file(pg15, make_gate, psql, authority):
    certificate, key = authority.issue("cert_user")
    policy = TlsPolicy("verify-full", ca_pem=authority.pem, client_cert_pem=certificate)
    before = set(Path("/tmp").iterdir())
    gate = make_gate(pg15, tls=policy, user="cert_user", password=None, client_key_pem=key)
    done = psql(gate, CHECK)
    assert done.stdout == "t|TLSv1.3|/CN=cert_user\n", done.stderr
    assert key not in repr(gate.opening)
    assert not {path for path in set(Path("/tmp").iterdir()) - before if "cert" in path.name}


def test_postgres_broken_client_key_says_nothing_of_it(pg15, make_gate, psql, authority):
    certificate, _ = authority.issue("cert_user")
    policy = TlsPolicy("verify-full", ca_pem=authority.pem, client_cert_pem=certificate)
    gate = make_gate(pg15, tls=policy, user="cert_user", password=None, client_key_pem="hunter2 key")
    done = psql(gate, "select 1")
    assert "cannot be loaded" in done.stderr
    assert "hunter2" not in done.stderr


@pytest.mark.parametrize(
    ("user", "tls", "method"),
    [
        ("scram_user", False, "SCRAM-SHA-256"),
        ("scram_user", True, "SCRAM-SHA-256-PLUS"),
        ("md5_user", False, "md5"),
        ("md5_user", True, "md5"),
        ("pass_user", True, "password"),
        ("trust_user", False, "trust"),
    ],
)
def test_postgres_login_methods(pg15, make_gate, psql, user, tls, method):
    gate = make_gate(pg15, user=user, tls=TlsPolicy("require" if tls else "disable"))
    assert psql(gate, "select session_user", database="postgres").stdout == f"{user}\n"
    gate.wait_done()
    assert gate.of("start")[0]["login"] == method


def test_postgres_password_in_clear_is_not_sent(pg15, make_gate, psql):
    gate = make_gate(pg15, user="pass_user")
    done = psql(gate, "select 1", database="postgres")
    assert "the target asks for the password in clear, without TLS" in done.stderr


@pytest.mark.parametrize("user", ["scram_user", "md5_user"])
def test_postgres_wrong_credential_is_told_without_secrets(pg15, make_gate, psql, user):
    gate = make_gate(pg15, user=user, password="hunter2 wrong")
    done = psql(gate, "select 1", database="postgres")
    assert done.returncode == 2
    assert "the target refused the account's credential" in done.stderr
    assert "HINT:  ask an administrator" in done.stderr
    assert "hunter2" not in done.stderr + repr(gate.events) + repr(gate.errors) + repr(gate.opening)
    assert gate.of("refused")[0]["reason"] == "the target refused the account's credential"


def test_postgres_other_refusals_of_the_target_come_through(pg15, make_gate, psql):
    gate = make_gate(pg15)
    assert 'database "missing" does not exist' in psql(gate, "select 1", database="missing").stderr
    with pytest.raises(psycopg.OperationalError) as caught:
        psycopg.connect(gate.url("missing"))
    assert "missing" in str(caught.value)


def test_postgres_target_not_there(make_gate, psql):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        gate = make_gate(sock.getsockname()[1])
        done = psql(gate, "select 1")
    assert done.returncode == 2
    assert "the target cannot be used: Connection refused" in done.stderr


def _psql18(pg18, gate, version, command, tmp_path):
    return subprocess.run(
        [pg18.bin / "psql", "-XAtw", gate.url(max_protocol_version=version), "-c", command],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
    )


@pytest.mark.parametrize("version", ["3.0", "3.2"])
def test_postgres_18_protocol_versions(pg18, make_gate, tmp_path, version):
    gate = make_gate(pg18)
    done = _psql18(pg18, gate, version, "select 18", tmp_path)
    assert done.stdout == "18\n", done.stderr
    gate.wait_done()
    assert gate.of("start")[0]["protocol"] == version


def test_postgres_15_negotiates_down_from_3_2(pg15, pg18, make_gate, tmp_path):
    gate = make_gate(pg15)
    done = _psql18(pg18, gate, "3.2", "select 15", tmp_path)
    assert done.stdout == "15\n", done.stderr
    gate.wait_done()
    assert gate.of("start")[0]["protocol"] == "3.0"


@pytest.mark.parametrize(("version", "size"), [("3.0", 4), ("3.2", 32)])
def test_postgres_18_ctrl_c_cancels(pg18, make_gate, tmp_path, version, size):
    gate = make_gate(pg18)
    process = subprocess.Popen(
        [pg18.bin / "psql", "-XAtw", gate.url(max_protocol_version=version), "-c", "select pg_sleep(300)"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
    )
    try:
        while pg18.sleepers() != 1:
            assert process.poll() is None, process.stderr.read()
        assert gate.of("query")
        keys = list(gate.interceptor._keys._keys)
        assert [len(key) - 4 for key in keys] == [size]
        process.send_signal(2)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "canceling statement due to user request" in errors
    assert [event["known"] for event in gate.of("cancel")] == [True]


def test_postgres_unknown_options_and_versions_are_negotiated(pg18, make_gate):
    gate = make_gate(pg18)
    with socket.create_connection(("127.0.0.1", gate.port), timeout=60) as sock:
        body = struct.pack("!I", 3 << 16 | 9999) + b"user\0x\0database\0app\0_pq_.grease\0x\0\0"
        sock.sendall(struct.pack("!I", len(body) + 4) + body)
        answer = sock.recv(65536)
    expected = struct.pack("!II", 3 << 16 | 2, 1) + b"_pq_.grease\0"
    assert answer.startswith(b"v" + struct.pack("!I", len(expected) + 4) + expected)
