"""The private known_hosts file: one ``@cert-authority`` line per key of the interceptor-host CA."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

from pam_client.home import Home
from pam_common.errors import PamError
from pam_common.files import make_private_dir, read_private, write_private
from pam_common.keys import VerifyKeys

#: Under this domain every gateway has its name: ``dc1.pam``. It exists in no DNS.
DOMAIN = "pam"


def folder(home: Home) -> Path:
    """Where the files for ``ssh`` are, existing and private."""
    return make_private_dir(home.make() / "ssh")


def path(home: Home, platform: str) -> Path:
    """The platform's file: another platform has another CA, which must not vouch for this one's servers."""
    digest = hashlib.blake2b(platform.encode(), digest_size=4).hexdigest()
    return folder(home) / f"known_hosts-{digest}"


def write(home: Home, platform: str, ca: VerifyKeys) -> Path:
    """Make the platform's file say ``ca``, whole or not at all. Raises PamError when there is no CA."""
    if not len(ca):
        raise PamError("the platform names no CA for SSH servers", hint="it may need an update.")
    content = "".join(
        f"@cert-authority *.{DOMAIN} {public_line(entry.key)}\n" for entry in ca.entries
    ).encode()
    file = path(home, platform)
    with contextlib.suppress(OSError):
        if read_private(file) == content:
            return file
    write_private(file, content)
    return file


def public_line(key: bytes) -> str:
    """``ssh-ed25519 AAAA…`` of 32 raw bytes."""
    return (
        Ed25519PublicKey.from_public_bytes(key).public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    )


def read(file: Path) -> VerifyKeys:
    """The CA keys in a file that :func:`write` made. Raises PamError for anything else."""
    keys = []
    for line in read_private(file).decode().splitlines():
        key = load_ssh_public_key(" ".join(line.split()[2:]).encode())
        if not isinstance(key, Ed25519PublicKey):
            raise PamError(f"{file} is not as pam-client writes it")
        keys.append(key.public_bytes_raw())
    return VerifyKeys.of(*keys)
