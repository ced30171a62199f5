"""Certificates: what is accepted, and every way in which one is not (certificate trust confusion)."""

from __future__ import annotations

import shutil
import subprocess
import time

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import SSHCertificateBuilder, SSHCertificateType
from hypothesis import given
from hypothesis import strategies as st

from pam_common import ssh_certs
from pam_common.errors import AuthenticationError
from pam_common.ssh_certs import CertificateKey, verify_host_certificate, verify_user_certificate
from pam_common.tokens import KeyEntry, SigningKey, VerifyKeys

NOW = 1_800_000_000
SESSION = "s-abcdefghijklmnopqrstuvwxyz"
CA = SigningKey(b"\1" * 32)
NEXT_CA = SigningKey(b"\2" * 32)
FOREIGN_CA = SigningKey(b"\3" * 32)
USER = SigningKey(b"\4" * 32)
TRUSTED = VerifyKeys([KeyEntry(CA.kid, CA.public), KeyEntry(NEXT_CA.kid, NEXT_CA.public)])


def user_certificate(ca: SigningKey = CA, **changes: object) -> str:
    fields: dict = {
        "key_id": SESSION,
        "principals": ["connect:dc1"],
        "valid_after": NOW - 300,
        "valid_before": NOW + 600,
    }
    fields.update(changes)
    return ssh_certs.make_user_certificate(ca, USER.public, **fields)


def host_certificate(ca: SigningKey = CA, **changes: object) -> str:
    fields: dict = {
        "key_id": "r1",
        "principals": ["relay.example.com", "r1"],
        "valid_after": NOW - 300,
        "valid_before": NOW + 600,
    }
    fields.update(changes)
    return ssh_certs.make_host_certificate(ca, USER.public, **fields)


def custom(**changes: object) -> str:
    """A certificate that our own builder refuses to make, signed by our CA."""
    builder = (
        SSHCertificateBuilder()
        .public_key(changes.get("public_key") or Ed25519PublicKey.from_public_bytes(USER.public))
        .type(SSHCertificateType.USER)
        .key_id(changes.get("key_id", SESSION.encode()))
        .valid_after(NOW - 300)
        .valid_before(NOW + 600)
    )
    principals = changes.get("principals", [b"connect:dc1"])
    builder = builder.valid_principals(principals) if principals else builder.valid_for_all_principals()
    for name, value in changes.get("options", {}).items():
        builder = builder.add_critical_option(name, value)
    return builder.sign(changes.get("ca") or CA.private_key).public_bytes().decode()


def verify(line: str | bytes, **changes: object) -> ssh_certs.Certificate:
    options: dict = {"now": NOW, "principal": "connect:dc1"}
    options.update(changes)
    return verify_user_certificate(line, TRUSTED, **options)


def test_a_good_certificate_says_who_it_is_for() -> None:
    found = verify(user_certificate())
    assert found.key_id == SESSION
    assert found.principals == ("connect:dc1",)
    assert found.public_key == USER.public
    assert found.valid_before == NOW + 600
    assert found.ca_kid == CA.kid


def test_the_next_ca_key_is_trusted_too() -> None:
    assert verify(user_certificate(NEXT_CA)).ca_kid == NEXT_CA.kid


def test_the_blob_of_the_protocol_is_taken_like_the_line() -> None:
    blob = CertificateKey(USER.seed(), user_certificate()).asbytes()
    assert verify(blob) == verify(user_certificate())


def test_a_foreign_ca_is_refused_though_its_certificate_is_valid_in_itself() -> None:
    with pytest.raises(AuthenticationError):
        verify(user_certificate(FOREIGN_CA))


def test_a_foreign_certificate_that_names_our_ca_is_refused() -> None:
    """The key of our CA inside, the signature of another."""
    ours = CertificateKey(USER.seed(), user_certificate()).asbytes()
    foreign = CertificateKey(USER.seed(), user_certificate(FOREIGN_CA)).asbytes()
    for forged in (ours[:-64] + foreign[-64:], foreign.replace(FOREIGN_CA.public, CA.public)):
        with pytest.raises(AuthenticationError, match="signature"):
            verify(forged)


@given(position=st.integers(0, 10_000), flip=st.integers(1, 255))
def test_no_byte_of_a_certificate_can_be_changed(position: int, flip: int) -> None:
    blob = bytearray(CertificateKey(USER.seed(), user_certificate()).asbytes())
    blob[position % len(blob)] ^= flip
    with pytest.raises(AuthenticationError):
        verify(bytes(blob))


@given(st.binary(max_size=600))
def test_noise_is_refused_in_our_words(blob: bytes) -> None:
    for certificate in (blob, blob.decode("latin-1"), f"{ssh_certs.CERT_TYPE} {blob.hex()}"):
        with pytest.raises(AuthenticationError):
            verify(certificate)


def test_a_certificate_cut_short_is_refused_at_every_length() -> None:
    blob = CertificateKey(USER.seed(), user_certificate()).asbytes()
    for size in range(len(blob)):
        with pytest.raises(AuthenticationError):
            verify(blob[:size])


def test_a_host_certificate_is_not_a_user_certificate_and_vice_versa() -> None:
    with pytest.raises(AuthenticationError, match="not a user certificate"):
        verify(host_certificate(principals=["connect:dc1"]))
    with pytest.raises(AuthenticationError, match="not a host certificate"):
        verify_host_certificate(user_certificate(principals=["r1"]), TRUSTED, hostname="r1", now=NOW)


@pytest.mark.parametrize("principal", ["connect:dc2", "serve:dc1", "connect:dc", "connect:DC1", ""])
def test_another_principal_is_refused(principal: str) -> None:
    with pytest.raises(AuthenticationError, match="not for"):
        verify(user_certificate(), principal=principal)


def test_a_certificate_for_everybody_is_for_nobody() -> None:
    with pytest.raises(AuthenticationError, match="0 principals"):
        verify(custom(principals=None), principal=None)


def test_validity_is_half_open() -> None:
    line = user_certificate()
    verify(line, now=NOW - 300)
    verify(line, now=NOW + 599.9)
    with pytest.raises(AuthenticationError, match="not valid yet"):
        verify(line, now=NOW - 301)
    with pytest.raises(AuthenticationError, match="expired"):
        verify(line, now=NOW + 600)


def test_an_unknown_critical_option_is_refused() -> None:
    for options in (
        {b"force-command": b"/bin/true"},
        {b"source-address": b"10.0.0.1", b"verify-required": b""},
    ):
        with pytest.raises(AuthenticationError, match="critical option"):
            verify(custom(options=options), source_address="10.0.0.1")


@pytest.mark.parametrize(
    ("source", "allowed"),
    [
        ("192.0.2.1", True),
        ("::ffff:192.0.2.1", True),
        ("192.0.2.2", False),
        ("198.51.100.77", True),
        ("198.51.101.77", False),
        ("2001:db8::5", True),
        ("2001:db9::5", False),
        ("", False),
        ("relay.example.com", False),
        (None, False),
    ],
)
def test_source_addresses_are_honoured(source: str | None, allowed: bool) -> None:
    line = user_certificate(source_addresses=["192.0.2.1", "198.51.100.0/24", "2001:db8::/32"])
    if allowed:
        verify(line, source_address=source)
    else:
        with pytest.raises(AuthenticationError):
            verify(line, source_address=source)


@pytest.mark.parametrize("value", [b"", b"*", b"10.0.0.1,", b"10.0.0.1/8", b"10.0.0.1, 10.0.0.2", b"\xff"])
def test_a_source_address_that_cannot_be_read_lets_nobody_in(value: bytes) -> None:
    with pytest.raises(AuthenticationError):
        verify(custom(options={b"source-address": value}), source_address="10.0.0.1")


@pytest.mark.parametrize("key_id", [b"", b"x" * 129, b"s-\n", b"s-\x1b[2J", "sé".encode()])
def test_a_key_id_that_does_not_belong_in_a_log_is_refused(key_id: bytes) -> None:
    with pytest.raises(AuthenticationError):
        verify(custom(key_id=key_id))


def test_more_names_or_networks_than_any_of_ours_has_are_refused() -> None:
    names = [f"connect:dc{number}".encode() for number in range(1, ssh_certs.MAX_PRINCIPALS + 2)]
    with pytest.raises(AuthenticationError, match="17 principals"):
        verify(custom(principals=names))
    networks = ",".join(f"10.0.0.{number}" for number in range(ssh_certs.MAX_SOURCE_ADDRESSES + 1)).encode()
    with pytest.raises(AuthenticationError, match="too many source"):
        verify(custom(options={b"source-address": networks}), source_address="10.0.0.1")


def test_other_kinds_of_keys_are_refused() -> None:
    other = ec.generate_private_key(ec.SECP256R1())
    with pytest.raises(AuthenticationError):
        verify(custom(ca=other))
    with pytest.raises(AuthenticationError):
        verify(custom(public_key=other.public_key()))


def test_size_is_capped_before_anything_is_parsed() -> None:
    with pytest.raises(AuthenticationError, match="larger"):
        verify(custom(options={b"source-address": b"10.0.0.1," * 1000}))


def test_a_host_certificate_is_for_its_names_only() -> None:
    line = host_certificate()
    assert verify_host_certificate(line, TRUSTED, hostname="relay.example.com", now=NOW).key_id == "r1"
    assert verify_host_certificate(line, TRUSTED, hostname="r1", now=NOW)
    for name in ("r2", "example.com", "RELAY.example.com", ""):
        with pytest.raises(AuthenticationError, match="not for"):
            verify_host_certificate(line, TRUSTED, hostname=name, now=NOW)


def test_a_plain_host_key_is_refused() -> None:
    plain = b"\0\0\0\x0bssh-ed25519\0\0\0\x20" + USER.public
    for blob in (plain, b""):
        with pytest.raises(AuthenticationError):
            verify_host_certificate(blob, TRUSTED, hostname="r1", now=NOW)


def test_the_builder_refuses_what_no_verifier_takes() -> None:
    for changes in (
        {"principals": []},
        {"key_id": ""},
        {"key_id": "x" * 129},
        {"principals": [f"connect:dc{n}" for n in range(17)]},
        {"source_addresses": ["10.0.0.1/8"]},
        {"source_addresses": [f"10.0.0.{n}" for n in range(65)]},
    ):
        with pytest.raises(ValueError, match=r".+"):
            user_certificate(**changes)


def test_a_certificate_of_another_key_is_not_taken_as_ours() -> None:
    with pytest.raises(AuthenticationError, match="another key"):
        CertificateKey(FOREIGN_CA.seed(), user_certificate())


def test_a_key_does_not_show_itself() -> None:
    key = CertificateKey(USER.seed(), user_certificate())
    assert repr(key) == f"<CertificateKey {ssh_certs.CERT_TYPE}>"
    assert key == CertificateKey(USER.seed(), user_certificate()) or key.asbytes()


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs ssh-keygen")
def test_openssh_reads_what_we_make(tmp_path) -> None:
    now = int(time.time())
    line = user_certificate(
        valid_after=now - 300, valid_before=now + 600, source_addresses=["10.0.0.0/8", "::1"]
    )
    file = tmp_path / "id-cert.pub"
    file.write_text(line)
    shown = subprocess.run(
        ["ssh-keygen", "-L", "-f", str(file)], capture_output=True, text=True, check=True
    ).stdout
    assert "user certificate" in shown
    assert f'Key ID: "{SESSION}"' in shown
    assert "connect:dc1" in shown
    assert "source-address 10.0.0.0/8,::1/128" in shown


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs ssh-keygen")
def test_we_read_what_openssh_makes(tmp_path) -> None:
    def keygen(*words: str) -> None:
        subprocess.run(["ssh-keygen", "-q", *words], cwd=tmp_path, check=True, capture_output=True)

    keygen("-t", "ed25519", "-N", "", "-f", "ca")
    keygen("-t", "ed25519", "-N", "", "-f", "id")
    keygen(
        "-s", "ca", "-I", SESSION, "-n", "connect:dc1", "-V", "-5m:+10m", "-O", "source-address=127.0.0.0/8",
        "id.pub",
    )  # fmt: skip
    ca = (tmp_path / "ca.pub").read_text().split()[1]
    public = __import__("base64").b64decode(ca)[-32:]
    keys = VerifyKeys([KeyEntry(ssh_certs.key_id(public), public)])
    line = (tmp_path / "id-cert.pub").read_text()
    found = verify_user_certificate(
        line, keys, principal="connect:dc1", now=time.time(), source_address="127.0.0.1"
    )
    assert found.key_id == SESSION
