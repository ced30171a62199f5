"""Is it the right target? Its host key is pinned, or certified by a CA that the resource names.

Nothing is ever learned here: without either, or with another key than these, there is no session.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    SSHCertificate,
    SSHCertificateType,
    load_ssh_public_identity,
)

from pam_agent.protocols.base import TargetIdentityError
from pam_agent.protocols.ssh.policy import texts
from pam_common.errors import ProtocolError

#: For each type of key the algorithms that prove it, best first. Without SHA-1.
ALGORITHMS: Final[Mapping[str, tuple[str, ...]]] = {
    "ssh-ed25519": ("ssh-ed25519",),
    "ecdsa-sha2-nistp256": ("ecdsa-sha2-nistp256",),
    "ecdsa-sha2-nistp384": ("ecdsa-sha2-nistp384",),
    "ecdsa-sha2-nistp521": ("ecdsa-sha2-nistp521",),
    "ssh-rsa": ("rsa-sha2-512", "rsa-sha2-256"),
}
_CERTIFICATE: Final = "-cert-v01@openssh.com"
#: Ours have about 500 bytes; RSA keys and lists of names make them larger. Bounds the parser.
MAX_CERTIFICATE: Final = 16 << 10


@dataclass(frozen=True)
class HostKeys:
    """What a host must show: one of ``pinned``, or a certificate of one of ``authorities`` (key blobs)."""

    pinned: frozenset[bytes]
    authorities: frozenset[bytes]
    algorithms: tuple[str, ...]

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> HostKeys:
        """From ``host_keys`` and ``host_ca``, lists of lines. Raises ProtocolError when there is none."""
        pinned = [parse_line(line) for line in texts(options, "host_keys")]
        authorities = [parse_line(line) for line in texts(options, "host_ca")]
        if not pinned and not authorities:
            raise ProtocolError(
                "no host key of the target is known, and none is learned by connecting",
                hint="an administrator reads it once with pam-platform resource scan.",
            )
        kinds = {kind for kind, _ in pinned}
        algorithms = [name for kind in ALGORITHMS if kind in kinds for name in ALGORITHMS[kind]]
        certified = [name + _CERTIFICATE for names in ALGORITHMS.values() for name in names]
        return cls(
            frozenset(blob for _, blob in pinned),
            frozenset(blob for _, blob in authorities),
            (*algorithms, *(certified if authorities else ())),
        )

    def check(self, shown: bytes, host: str, now: float) -> None:
        """Raise TargetIdentityError unless ``shown``, whose private half the peer holds, is the host's."""
        if shown in self.pinned:
            return
        if self.authorities and _is_certificate(shown):
            _check_certificate(shown, self.authorities, host, now)
            return
        raise TargetIdentityError(
            f"the target shows another host key than it should: {fingerprint(shown)}",
            hint="was it set up anew, or is something else answering? "
            "If it is right, an administrator reads it with pam-platform resource scan.",
        )


def fingerprint(blob: bytes) -> str:
    """``SHA256:…`` as ``ssh-keygen -l`` shows it."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def parse_line(line: str) -> tuple[str, bytes]:
    """A public key's type and blob from its line ``type base64 [comment]``. Raises ProtocolError."""
    words = line.split()
    try:
        blob = base64.b64decode(words[1], validate=True)
        kind = blob[4 : 4 + int.from_bytes(blob[:4])].decode("ascii")
    except (ValueError, IndexError):
        kind, blob = "", b""
    if kind not in ALGORITHMS or kind != words[0]:
        raise ProtocolError("the opening has a host key of no kind that can be checked")
    return kind, blob


def _is_certificate(blob: bytes) -> bool:
    return blob[4 : 4 + int.from_bytes(blob[:4])].endswith(_CERTIFICATE.encode())


def _check_certificate(blob: bytes, authorities: frozenset[bytes], host: str, now: float) -> None:
    """Whose signature, then which type, for whom, when. A certificate carries the key that signed it, so
    that its signature is valid says nothing before it is known whose it is."""
    parsed = _load(blob)
    signer = parsed.signature_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    if base64.b64decode(signer.split()[1]) not in authorities:
        raise _wrong("is signed by an unknown CA")
    if parsed.type is not SSHCertificateType.HOST:
        raise _wrong("is not one for hosts")
    # No principal means any host to OpenSSH; here it means none.
    if host.lower().encode() not in parsed.valid_principals:
        raise _wrong(f"is not for {host}")
    if not parsed.valid_after <= now < parsed.valid_before:
        raise _wrong("is not valid now")
    if parsed.critical_options:
        raise _wrong("has critical options")
    try:
        parsed.verify_cert_signature()
    except InvalidSignature:
        raise _wrong("has a wrong signature") from None


def _load(blob: bytes) -> SSHCertificate:
    kind = blob[4 : 4 + int.from_bytes(blob[:4])]
    try:
        if len(blob) > MAX_CERTIFICATE:
            raise ValueError
        parsed = load_ssh_public_identity(kind + b" " + base64.b64encode(blob))
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise _wrong("cannot be read") from None
    if not isinstance(parsed, SSHCertificate):
        raise _wrong("cannot be read")
    return parsed


def _wrong(what: str) -> TargetIdentityError:
    return TargetIdentityError(
        f"the target's host certificate {what}", hint="an administrator of the target can renew it."
    )
