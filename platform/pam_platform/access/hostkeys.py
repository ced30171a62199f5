"""Public SSH keys of targets, as lines: ``ssh-ed25519 AAAA…``."""

from __future__ import annotations

import base64
import hashlib

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

KEY_TYPES = (
    "ssh-ed25519",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "ssh-rsa",
)
#: An RSA key of 16384 bits has about 2800 characters.
MAX_LINE = 4096
#: Smaller ones can be factored; OpenSSH refuses them, too.
MIN_RSA_BITS = 1024


def public_line(text: str) -> str:
    """The key's type and value without its comment. Raises ValueError with words for whoever wrote it."""
    words = text.split()
    if len(text) > MAX_LINE or len(words) < 2 or words[0] not in KEY_TYPES:
        raise ValueError("expected a line with a public key of type " + ", ".join(KEY_TYPES))
    line = " ".join(words[:2])
    try:
        key = load_ssh_public_key(line.encode())
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ValueError("the public key is damaged") from None
    if isinstance(key, RSAPublicKey) and key.key_size < MIN_RSA_BITS:
        raise ValueError(f"an RSA key of {key.key_size} bits protects nothing")
    return line


def fingerprint(line: str) -> str:
    """``SHA256:…`` as ``ssh-keygen -l`` prints it."""
    digest = hashlib.sha256(base64.b64decode(line.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def line_of(key: bytes) -> str:
    """``ssh-ed25519 AAAA…`` of 32 raw bytes."""
    public = Ed25519PublicKey.from_public_bytes(key)
    return public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
