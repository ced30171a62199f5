"""Keys that Django needs before there is a database: files in the state folder, made by ``init``.

``secret-key`` holds one key a line, the current one first; the others are still believed, since second
factors are encrypted under them. ``oidc.pem`` is the RSA key that signs ID tokens.
"""

from __future__ import annotations

import secrets

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from pam_common.files import read_private, write_private
from pam_platform.config import PlatformConfig

SECRET_KEY = "secret-key"  # noqa: S105  # its name
OIDC = "oidc"
#: Each is tried for every cookie that does not verify; nobody rotates more often than people log in.
MAX_SECRET_KEYS = 8


def ensure(settings: PlatformConfig) -> None:
    """Make what is missing."""
    if not settings.secret_key_file.exists():
        write_private(settings.secret_key_file, _new_secret())
    if not settings.oidc_key_file.exists():
        write_private(settings.oidc_key_file, _new_rsa())


def rotate(settings: PlatformConfig, name: str) -> None:
    """Replace a key; a running server takes it up when it is restarted."""
    if name == OIDC:
        write_private(settings.oidc_key_file, _new_rsa())
        return
    old = read_private(settings.secret_key_file).split()
    write_private(settings.secret_key_file, b"\n".join([_new_secret(), *old[: MAX_SECRET_KEYS - 1]]))


def _new_secret() -> bytes:
    return secrets.token_urlsafe(48).encode()


def _new_rsa() -> bytes:
    # RSA, since OpenID Connect asks every client to know RS256 and no other.
    key = rsa.generate_private_key(public_exponent=65537, key_size=3072)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
