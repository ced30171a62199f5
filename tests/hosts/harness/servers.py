"""PostgreSQL servers in the namespaces of a fleet, and the private CA of its platform."""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from harness.network import Network
from postgres_server import NOBODY, PostgresServer
from processes import Process

PORT = 5432


class NamespacedPostgres(PostgresServer):
    """A PostgreSQL on ``address``:5432 of a namespace; whoever gets there and has a password may log in."""

    def __init__(self, space: str, address: str) -> None:
        self.space, self.address = space, address
        super().__init__()
        self.port = PORT

    def _start(self, settings: dict[str, str]) -> Process:
        with (self.folder / "data/pg_hba.conf").open("a") as rules:
            rules.write("host all all 10.0.0.0/8 scram-sha-256\n")
        self.port = PORT
        drop = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
        command = [*drop, str(self.bin / "postgres"), "-D", str(self.folder / "data")]
        chosen = {"listen_addresses": f"127.0.0.1,{self.address}", "port": str(PORT), "fsync": "off"}
        for name, value in {**chosen, "unix_socket_directories": "", **settings}.items():
            command += ["-c", f"{name}={value}"]
        server = Process("postgres", Network.inside(self.space, command), self.folder / "postgres.log")
        server.ready_when(self._accepts)
        return server

    def sql(self, *statements: str, database: str = "postgres") -> str:
        command = Network.inside(self.space, [str(self.bin / "psql"), "-XAtq", "-v", "ON_ERROR_STOP=1"])
        for statement in statements:
            command += ["-c", statement]
        environment = self.environment(database=database)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"psql: {done.stderr}")
        return done.stdout.strip()


def certified(folder: Path, host: str) -> tuple[Path, Path, Path]:
    """A private CA's certificate, and a certificate for ``host`` with its key; three files."""
    now = datetime.now(UTC)
    ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    ca_name, name = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in ("ca", host))

    def certificate(subject: x509.Name, public: ec.EllipticCurvePublicKey, *, ca: bool) -> bytes:
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(ca_name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False
            )
        )
        if ca:
            usage = x509.KeyUsage(
                digital_signature=True,
                key_cert_sign=True,
                crl_sign=True,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                encipher_only=False,
                decipher_only=False,
            )
            builder = builder.add_extension(usage, critical=True)
        else:
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        return builder.sign(ca_key, hashes.SHA256()).public_bytes(Encoding.PEM)

    files = folder / "ca.pem", folder / "platform.pem", folder / "platform.key"
    files[0].write_bytes(certificate(ca_name, ca_key.public_key(), ca=True))
    files[1].write_bytes(certificate(name, key.public_key(), ca=False))
    files[2].touch(mode=0o600)
    files[2].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return files
