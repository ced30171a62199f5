"""OpenSSH certificates: made by the platform, shown by clients, agents and relays, checked by their peers.

Ed25519 only, for subjects and CAs alike. The format is OpenSSH's PROTOCOL.certkeys:
https://cvsweb.openbsd.org/src/usr.bin/ssh/PROTOCOL.certkeys

A certificate carries the key that signed it, so its signature alone says nothing: *anyone* can make one
that is valid in itself. Every check here therefore starts with the question whose key that is.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass

import paramiko
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    SSHCertificate,
    SSHCertificateBuilder,
    SSHCertificateType,
    load_ssh_public_identity,
)
from paramiko.pkey import PublicBlob

from pam_common.errors import AuthenticationError
from pam_common.tokens import SigningKey, VerifyKeys, key_id

#: Name of the key type, the algorithm and the first word of a certificate's line.
CERT_TYPE = "ssh-ed25519-cert-v01@openssh.com"
PLAIN_TYPE = "ssh-ed25519"

#: Ours are about 500 bytes; this leaves room for a long list of source addresses and bounds the parser.
MAX_CERTIFICATE = 8192
#: A session id has 28 characters, an agent's name at most 63.
MAX_KEY_ID = 128
MAX_PRINCIPALS = 16
#: OpenSSH's own limit is the size of the option; nobody lists more networks than this.
MAX_SOURCE_ADDRESSES = 64

_SOURCE_ADDRESS = b"source-address"


@dataclass(frozen=True)
class Certificate:
    """What a verified certificate says. ``public_key`` and times as in the JSON API: raw, UNIX seconds."""

    key_id: str
    principals: tuple[str, ...]
    public_key: bytes
    valid_before: int
    ca_kid: str


def make_user_certificate(
    ca: SigningKey,
    public_key: bytes,
    *,
    key_id: str,
    principals: Iterable[str],
    valid_after: int,
    valid_before: int,
    source_addresses: Iterable[str] = (),
    extensions: Iterable[str] = (),
) -> str:
    """Return one line ``ssh-ed25519-cert-v01@openssh.com AAAA…`` that lets ``public_key`` log in.

    ``public_key`` is 32 raw Ed25519 bytes; ``source_addresses`` are addresses or networks in CIDR form
    (empty: from anywhere); ``extensions`` are what an OpenSSH server grants to its user, such as
    ``permit-pty`` (our relays grant nothing by them). Raises ValueError for what no verifier would accept.
    """
    builder = _builder(SSHCertificateType.USER, public_key, key_id, principals, valid_after, valid_before)
    networks = [str(ipaddress.ip_network(address)) for address in source_addresses]
    if len(networks) > MAX_SOURCE_ADDRESSES:
        raise ValueError(f"more than {MAX_SOURCE_ADDRESSES} source addresses")
    if networks:
        builder = builder.add_critical_option(_SOURCE_ADDRESS, ",".join(networks).encode())
    for name in extensions:
        builder = builder.add_extension(name.encode("ascii"), b"")
    return _signed(builder, ca)


def make_host_certificate(
    ca: SigningKey,
    public_key: bytes,
    *,
    key_id: str,
    principals: Iterable[str],
    valid_after: int,
    valid_before: int,
) -> str:
    """Return the line of a certificate that makes ``public_key`` the host key of ``principals``."""
    builder = _builder(SSHCertificateType.HOST, public_key, key_id, principals, valid_after, valid_before)
    return _signed(builder, ca)


def verify_user_certificate(
    certificate: str | bytes,
    ca_keys: VerifyKeys,
    *,
    now: float,
    principal: str | None = None,
    source_address: str | None = None,
) -> Certificate:
    """Check a user certificate (its line, or the blob of the SSH protocol) and return what it says.

    ``principal`` must be among its principals unless it is None: then the caller decides by what it finds.
    A certificate bound to source addresses is refused when ``source_address`` is not one of them or not
    known. Raises AuthenticationError.
    """
    parsed = _load(certificate)
    verified = _check(parsed, SSHCertificateType.USER, ca_keys, principal, now)
    for name, value in parsed.critical_options.items():
        if name != _SOURCE_ADDRESS:
            raise AuthenticationError(f"the certificate has an unknown critical option {_printable(name)}")
        _check_source(value, source_address)
    return verified


def verify_host_certificate(
    certificate: str | bytes, ca_keys: VerifyKeys, *, hostname: str, now: float
) -> Certificate:
    """Check that ``certificate`` is a host certificate for ``hostname`` (or relay name).

    To be called after key exchange, which proved that the peer holds the key, and before anything is sent
    to it. Raises AuthenticationError; a plain host key is refused like any other wrong blob.
    """
    parsed = _load(certificate)
    verified = _check(parsed, SSHCertificateType.HOST, ca_keys, hostname, now)
    if parsed.critical_options:
        raise AuthenticationError("the host certificate has critical options")
    return verified


class CertificateKey(paramiko.PKey):
    """A private Ed25519 key that shows its certificate, as a client's login key or a server's host key.

    paramiko asks a login key for ``public_blob`` and a host key for ``get_name`` and ``asbytes``: all of
    them speak of the certificate here, while signatures are plain Ed25519 ones, as OpenSSH has it.
    """

    def __init__(self, private: bytes, certificate: str) -> None:
        """``private`` is the 32-byte seed. Raises AuthenticationError when they do not belong together."""
        parsed = _load(certificate)
        self._private = Ed25519PrivateKey.from_private_bytes(private)
        if _raw(parsed.public_key(), "subject") != self._private.public_key().public_bytes_raw():
            raise AuthenticationError("the certificate is for another key")
        self.certificate = parsed.public_bytes().decode()
        self.valid_before = parsed.valid_before
        self._blob = base64.b64decode(self.certificate.split()[1])
        self.public_blob = PublicBlob(CERT_TYPE, self._blob)

    def get_name(self) -> str:
        return CERT_TYPE

    def asbytes(self) -> bytes:
        return self._blob

    def get_bits(self) -> int:
        return 256

    def can_sign(self) -> bool:
        return True

    def sign_ssh_data(self, data: bytes, algorithm: str | None = None) -> paramiko.Message:
        signature = paramiko.Message()
        signature.add_string(PLAIN_TYPE)
        signature.add_string(self._private.sign(data))
        return signature

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CertificateKey) and self._blob == other._blob

    def __hash__(self) -> int:
        return hash(self._blob)

    def __repr__(self) -> str:
        return f"<CertificateKey {self.get_name()}>"


def _builder(
    kind: SSHCertificateType,
    public_key: bytes,
    key_id: str,
    principals: Iterable[str],
    valid_after: int,
    valid_before: int,
) -> SSHCertificateBuilder:
    names = list(principals)
    # OpenSSH reads a certificate without principals as one for every name: never make one.
    if not 1 <= len(names) <= MAX_PRINCIPALS:
        raise ValueError(f"expected 1 to {MAX_PRINCIPALS} principals, got {len(names)}")
    if not 1 <= len(key_id) <= MAX_KEY_ID:
        raise ValueError(f"a key id has 1 to {MAX_KEY_ID} characters")
    return (
        SSHCertificateBuilder()
        .public_key(Ed25519PublicKey.from_public_bytes(public_key))
        .type(kind)
        .key_id(key_id.encode("ascii"))
        .valid_principals([name.encode("ascii") for name in names])
        .valid_after(valid_after)
        .valid_before(valid_before)
    )


def _signed(builder: SSHCertificateBuilder, ca: SigningKey) -> str:
    return builder.sign(ca.private_key).public_bytes().decode()


def _load(certificate: str | bytes) -> SSHCertificate:
    """Parse a line or a blob. Raises AuthenticationError for all that is not an Ed25519 certificate."""
    if len(certificate) > MAX_CERTIFICATE:
        raise AuthenticationError(f"the certificate is larger than {MAX_CERTIFICATE} bytes")
    if isinstance(certificate, str):
        words = certificate.split()
        if len(words) < 2 or words[0] != CERT_TYPE:
            raise AuthenticationError(f"not a certificate of type {CERT_TYPE}")
        try:
            blob = base64.b64decode(words[1], validate=True)
        except (binascii.Error, ValueError):
            raise AuthenticationError("the certificate is not base64") from None
    else:
        blob = bytes(certificate)
    try:
        # The line is put together anew, so that nothing but the blob is left to the parser.
        parsed = load_ssh_public_identity(CERT_TYPE.encode() + b" " + base64.b64encode(blob))
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise AuthenticationError(f"not a certificate of type {CERT_TYPE}") from None
    if not isinstance(parsed, SSHCertificate):
        raise AuthenticationError(f"not a certificate of type {CERT_TYPE}")
    return parsed


def _check(
    parsed: SSHCertificate,
    kind: SSHCertificateType,
    ca_keys: VerifyKeys,
    principal: str | None,
    now: float,
) -> Certificate:
    """Whose signature, then which type, for whom, when. The critical options are left to the caller."""
    ca_kid = _check_signer(parsed, ca_keys)
    if parsed.type is not kind:
        raise AuthenticationError(f"not a {kind.name.lower()} certificate")
    principals = tuple(_text(name, "principal") for name in parsed.valid_principals)
    # No principal means "any" to OpenSSH; here it means nobody.
    if not 1 <= len(principals) <= MAX_PRINCIPALS:
        raise AuthenticationError(f"the certificate has {len(principals)} principals")
    if principal is not None and principal not in principals:
        raise AuthenticationError(f"the certificate is not for {principal}")
    if now < parsed.valid_after:
        raise AuthenticationError("the certificate is not valid yet", hint="is the clock right here?")
    if now >= parsed.valid_before:
        raise AuthenticationError("the certificate has expired", hint="is the clock right here?")
    name = _text(parsed.key_id, "key id")
    if not 1 <= len(name) <= MAX_KEY_ID:
        raise AuthenticationError("the certificate has no usable key id")
    return Certificate(
        key_id=name,
        principals=principals,
        public_key=_raw(parsed.public_key(), "subject"),
        valid_before=parsed.valid_before,
        ca_kid=ca_kid,
    )


def _check_signer(parsed: SSHCertificate, ca_keys: VerifyKeys) -> str:
    """Return the kid of the configured CA key that signed; AuthenticationError when none of them did."""
    try:
        signer = _raw(parsed.signature_key(), "CA")
    except (ValueError, UnsupportedAlgorithm):
        raise AuthenticationError("the certificate's CA key is not Ed25519") from None
    kid = key_id(signer)
    if ca_keys.get(kid).public_bytes_raw() != signer:
        raise AuthenticationError("the certificate is signed by an unknown CA")
    try:
        parsed.verify_cert_signature()
    except InvalidSignature:
        raise AuthenticationError("the certificate's signature is wrong") from None
    return kid


def _check_source(option: bytes, source_address: str | None) -> None:
    """Raise AuthenticationError unless ``source_address`` is in the option's comma-separated list."""
    entries = _text(option, "source-address").split(",")
    if len(entries) > MAX_SOURCE_ADDRESSES:
        raise AuthenticationError("the certificate lists too many source addresses")
    try:
        networks = [ipaddress.ip_network(entry) for entry in entries]
        source = ipaddress.ip_address((source_address or "").partition("%")[0])
    except ValueError:
        raise AuthenticationError(
            "the certificate is bound to source addresses that cannot be checked"
        ) from None
    # A dual-stack listener sees IPv4 peers as ::ffff:a.b.c.d.
    mapped = source.ipv4_mapped if isinstance(source, ipaddress.IPv6Address) else None
    if not any((mapped or source) in network for network in networks):
        raise AuthenticationError("the certificate may not be used from this address")


def _raw(key: object, whose: str) -> bytes:
    if not isinstance(key, Ed25519PublicKey):
        raise AuthenticationError(f"the certificate's {whose} key is not Ed25519")
    return key.public_bytes_raw()


def _text(value: bytes, what: str) -> str:
    """Printable ASCII, since these words reach logs, comparisons and routing."""
    try:
        text = value.decode("ascii")
    except UnicodeDecodeError:
        text = "\0"
    if not text.isprintable():
        raise AuthenticationError(f"the certificate's {what} is not printable ASCII")
    return text


def _printable(value: bytes) -> str:
    return value[:64].decode("ascii", "backslashreplace")
