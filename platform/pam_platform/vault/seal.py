"""Envelope encryption of one secret. No database, no files.

    entry key    32 random bytes, new with every version of an entry
    ciphertext   nonce ‖ XChaCha20-Poly1305(entry key, secret), bound to "pam-vault-v1" entry version
    wrapped key  nonce ‖ XChaCha20-Poly1305(master key, entry key), bound to "pam-vault-key-v1", the same, id

The 24 byte nonces are random: with this cipher that is safe for any number of entries. Re-keying opens and
seals the wrapped key only. Associated data are joined with NUL bytes, which no id contains.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from nacl import bindings
from nacl.exceptions import CryptoError
from nacl.utils import random

from pam_common.errors import AuthenticationError
from pam_common.keys import KEY_SIZE, key_id

_NONCE = bindings.crypto_aead_xchacha20poly1305_ietf_NPUBBYTES
_ENTRY = b"pam-vault-v1"
_WRAP = b"pam-vault-key-v1"


@dataclass(frozen=True)
class MasterKey:
    """One 32 byte master key. ``kid`` names it and tells nothing about it."""

    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.secret) != KEY_SIZE:
            raise ValueError(f"a master key has {KEY_SIZE} bytes")

    @property
    def kid(self) -> str:
        # A hash under a name of its own, so that the id is of no use for anything else.
        return key_id(b"pam-vault-master-id\0" + self.secret)


@dataclass(frozen=True)
class Sealed:
    """A sealed secret as it is stored."""

    master_kid: str
    wrapped_key: bytes
    ciphertext: bytes


def seal(secret: bytes, master: MasterKey, entry: str, version: int) -> Sealed:
    """Seal ``secret`` as version ``version`` of ``entry``."""
    entry_key = random(KEY_SIZE)
    return Sealed(
        master.kid,
        _encrypt(master.secret, entry_key, _wrap_data(entry, version, master.kid)),
        _encrypt(entry_key, secret, _entry_data(entry, version)),
    )


def unseal(sealed: Sealed, master: MasterKey, entry: str, version: int) -> bytes:
    """Return the secret. Raises AuthenticationError unless all is as it was sealed."""
    return _decrypt(_unwrap(sealed, master, entry, version), sealed.ciphertext, _entry_data(entry, version))


def rewrap(sealed: Sealed, old: MasterKey, new: MasterKey, entry: str, version: int) -> Sealed:
    """Return the same secret under another master key."""
    entry_key = _unwrap(sealed, old, entry, version)
    wrapped = _encrypt(new.secret, entry_key, _wrap_data(entry, version, new.kid))
    return Sealed(new.kid, wrapped, sealed.ciphertext)


def _unwrap(sealed: Sealed, master: MasterKey, entry: str, version: int) -> bytes:
    return _decrypt(master.secret, sealed.wrapped_key, _wrap_data(entry, version, master.kid))


def _entry_data(entry: str, version: int) -> bytes:
    return b"\0".join((_ENTRY, entry.encode(), b"%d" % version))


def _wrap_data(entry: str, version: int, master_kid: str) -> bytes:
    return b"\0".join((_WRAP, entry.encode(), b"%d" % version, master_kid.encode()))


def _encrypt(key: bytes, plain: bytes, data: bytes) -> bytes:
    nonce = random(_NONCE)
    return nonce + bindings.crypto_aead_xchacha20poly1305_ietf_encrypt(plain, data, nonce, key)


def _decrypt(key: bytes, sealed: bytes, data: bytes) -> bytes:
    try:
        return bindings.crypto_aead_xchacha20poly1305_ietf_decrypt(
            sealed[_NONCE:], data, sealed[:_NONCE], key
        )
    except (CryptoError, ValueError, TypeError):
        # Too short, altered, moved from another row, or an older version put back.
        raise AuthenticationError("a vault entry is damaged or not where it belongs") from None
