"""A real nginx: TLS, client certificates, files, ranges, compression, early refusals; curl as the program."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from processes import Process, free_port, listens

from pam_agent.protocols.base import TlsPolicy

pytestmark = pytest.mark.slow

NGINX = shutil.which("nginx") or "/usr/sbin/nginx"
_CONFIG = """
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log; {user}
events {{ worker_connections 64; }}
http {{
  access_log off; client_max_body_size 100k; types {{ text/plain txt; text/html html; }}
  client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
  uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
  gzip on; gzip_min_length 1; gzip_types text/plain; root {folder}/files;
  ssl_certificate {folder}/server.pem; ssl_certificate_key {folder}/server.key;
  server {{ listen 127.0.0.1:{plain}; location /new {{ return 201 "made"; }} }}
  server {{ listen 127.0.0.1:{strict} ssl; ssl_client_certificate {folder}/ca.pem; ssl_verify_client on;
            location / {{ return 200 "$ssl_client_s_dn $host"; }} }}
}}
"""


class Ca:
    """A certificate authority of our own."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ca")])
        basic = x509.BasicConstraints(True, 0)
        self.pem = self._sign(self._builder(self._name, self._key).add_extension(basic, critical=True))

    def _builder(self, name: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        builder = x509.CertificateBuilder(self._name, name, key.public_key(), x509.random_serial_number())
        return builder.not_valid_before(now - timedelta(minutes=5)).not_valid_after(now + timedelta(hours=3))

    def _sign(self, builder: x509.CertificateBuilder) -> str:
        return builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM).decode()

    def issue(self, common: str) -> tuple[str, str]:
        """A certificate for the name and its key, in PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])
        names = x509.SubjectAlternativeName([x509.DNSName(common)])
        certificate = self._sign(self._builder(name, key).add_extension(names, critical=False))
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return certificate, pem.decode()


class Nginx:
    """Debian's nginx with files, and a port that asks for client certificates."""

    def __init__(self, folder: Path) -> None:
        self.ca = Ca()
        self.files = folder / "files"
        self.files.mkdir()
        certificate, key = self.ca.issue("files.corp.test")
        (folder / "ca.pem").write_text(self.ca.pem)
        (folder / "server.pem").write_text(certificate)
        (folder / "server.key").write_text(key)
        self.plain, self.strict = free_port(), free_port()
        user = "user root;" if os.geteuid() == 0 else ""
        text = _CONFIG.format(folder=folder, user=user, plain=self.plain, strict=self.strict)
        (folder / "nginx.conf").write_text(text)
        self._process = Process("nginx", [NGINX, "-c", folder / "nginx.conf", "-p", folder], folder / "log")
        self._process.ready_when(lambda: listens(self.strict), timeout=60)

    def stop(self) -> None:
        self._process.stop()


@pytest.fixture(scope="module")
def nginx(tmp_path_factory) -> Iterator[Nginx]:
    made = Nginx(tmp_path_factory.mktemp("nginx"))
    yield made
    made.stop()


def curl(*arguments: str, data: bytes | None = None) -> bytes:
    done = subprocess.run(
        ["curl", "-sS", "--noproxy", "*", "--max-time", "120", *arguments],
        input=data,
        capture_output=True,
        check=False,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_http_nginx_files_ranges_and_conditions(make_gate, nginx):
    (nginx.files / "a.txt").write_text("0123456789")
    gate = make_gate(nginx.plain)
    url = f"http://{gate.host}/a.txt"
    assert curl(url, url) == b"0123456789" * 2
    assert len(gate.conversations) == 1
    assert curl("-r", "2-4", url) == b"234"
    head = curl("-I", url)
    assert b"200 OK" in head
    etag = re.search(rb"(?i)etag: (\S+)", head)
    assert etag
    assert b"304" in curl("-i", "-H", f"If-None-Match: {etag[1].decode()}", url)
    assert b"404" in curl("-i", f"http://{gate.host}/none")
    assert [e["status"] for e in gate.of("response")] == [200, 200, 206, 200, 304, 404]
    assert gate.of("response")[0]["body"] == "0123456789"


def test_http_nginx_compressed_text_is_recorded_as_text(make_gate, nginx):
    text = "compress me " * 100
    (nginx.files / "b.txt").write_text(text)
    gate = make_gate(nginx.plain)
    raw = curl("-H", "Accept-Encoding: br, gzip", f"http://{gate.host}/b.txt")
    assert gzip.decompress(raw).decode() == text
    gate_text = gate.of("response")[0].get("body", "") + "".join(e.get("data", "") for e in gate.of("body"))
    assert gate_text == text


def test_http_nginx_a_large_file_is_the_same_at_the_end(make_gate, nginx):
    data = os.urandom(1 << 20) * 64
    (nginx.files / "large").write_bytes(data)
    gate = make_gate(nginx.plain)
    assert hashlib.sha256(curl(f"http://{gate.host}/large")).digest() == hashlib.sha256(data).digest()
    gate.wait_done()
    (end,) = [e for e in gate.of("body") if e.get("done")]
    assert end["sha256"] == hashlib.sha256(data).hexdigest()


def test_http_nginx_refuses_an_upload_and_is_heard(make_gate, nginx):
    gate = make_gate(nginx.plain)
    for more, status in (
        ((), b" 413 "),
        (("-H", "Expect:"), b" 413 "),
        # Of unknown length, and answered without having been read.
        (("-H", "Transfer-Encoding: chunked"), b" 201 "),
    ):
        post = ["-i", "-X", "POST", *more, "--data-binary", "@-"]
        assert status in curl(*post, f"http://{gate.host}/new", data=bytes(5 << 20))
    assert b"made" in curl("-d", "small", f"http://{gate.host}/new")


def test_http_nginx_asks_for_the_accounts_certificate(make_gate, nginx):
    certificate, key = nginx.ca.issue("viewer")
    tls = TlsPolicy("verify-full", ca_pem=nginx.ca.pem)
    gate = make_gate(
        nginx.strict, tls=tls, host="files.corp.test", secrets={"client_cert": f"{key}{certificate}"}
    )
    assert curl(f"http://{gate.host}/") == b"CN=viewer files.corp.test"
    assert key.split("\n")[1] not in json.dumps(gate.events)
    without = make_gate(nginx.strict, tls=tls, host="files.corp.test", secrets={})
    assert b"400 No required SSL certificate" in curl(f"http://{without.host}/")


@pytest.mark.parametrize(
    ("host", "own_ca", "words"),
    [("other.corp.test", True, b"Hostname mismatch"), ("files.corp.test", False, b"certificate is refused")],
)
def test_http_nginx_with_another_certificate_is_refused(make_gate, nginx, host, own_ca, words):
    tls = TlsPolicy("verify-full", ca_pem=(nginx.ca if own_ca else Ca()).pem)
    gate = make_gate(nginx.strict, tls=tls, host=host, account={"login": "basic"})
    answer = curl("-i", f"http://{gate.host}/")
    assert b" 502 " in answer
    assert words in answer
