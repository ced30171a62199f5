"""Names, encodings and keys that every part agrees on.

Keys are 32 raw bytes; in JSON they are base64url without padding, and a public key is named by its
``kid``. Trust anchors are lists of such entries, so that any key can be rotated.
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from pam_common.errors import AuthenticationError

KEY_SIZE = 32
#: A trust list holds the current and the next key; more than this is a mistake, not a rotation.
MAX_KEYS = 64

_LABEL = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
_SESSION_ID = re.compile(r"s-[a-z2-7]{26}")
_B64URL = re.compile(r"[A-Za-z0-9_-]*")


# --- names and encodings -----------------------------------------------------------------------------


def is_label(text: object) -> bool:
    """Whether ``text`` names a gateway, relay, agent, resource, account …: a lower-case DNS label."""
    return isinstance(text, str) and _LABEL.fullmatch(text) is not None


def is_account(text: object) -> bool:
    """Whether ``text`` is ``resource/account``, both labels."""
    if not isinstance(text, str):
        return False
    parts = text.split("/")
    return len(parts) == 2 and all(map(is_label, parts))


def is_session_id(text: object) -> bool:
    """Whether ``text`` is a session id: ``s-`` and 26 characters. Such a text is safe in a path or a log."""
    return isinstance(text, str) and _SESSION_ID.fullmatch(text) is not None


def new_session_id() -> str:
    """Return a fresh session id: ``s-`` and 128 random bits in lower-case base32."""
    return "s-" + base64.b32encode(secrets.token_bytes(16)).decode().rstrip("=").lower()


def b64encode(data: bytes) -> str:
    """Return ``data`` in base64url without padding (RFC 4648, section 5)."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def b64decode(text: str, size: int | None = None) -> bytes:
    """Return the bytes of unpadded base64url ``text``; of exactly ``size`` bytes where that is given.

    Strict, so that every value has one spelling: other characters, padding, left-over bits and a wrong
    length raise ValueError.
    """
    if not isinstance(text, str) or not _B64URL.fullmatch(text) or len(text) % 4 == 1:
        raise ValueError("not base64url without padding")
    data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    if b64encode(data) != text:
        raise ValueError("base64url with left-over bits")
    if size is not None and len(data) != size:
        raise ValueError(f"{len(data)} bytes instead of {size}")
    return data


def key_id(public: bytes) -> str:
    """Return a public key's id: the first 16 hexadecimal digits of its BLAKE2b-256."""
    return hashlib.blake2b(public, digest_size=32).hexdigest()[:16]


# --- keys --------------------------------------------------------------------------------------------


class SigningKey:
    """An Ed25519 private key, from its 32 byte seed. Its representation shows the key id only."""

    __slots__ = ("kid", "private_key", "public")

    def __init__(self, private: bytes) -> None:
        self.private_key = Ed25519PrivateKey.from_private_bytes(private)
        self.public = self.private_key.public_key().public_bytes_raw()
        self.kid = key_id(self.public)

    @classmethod
    def generate(cls) -> SigningKey:
        """Return a new key."""
        return cls(secrets.token_bytes(KEY_SIZE))

    def seed(self) -> bytes:
        """Return the 32 secret bytes, to be stored in a private file."""
        return self.private_key.private_bytes_raw()

    def sign(self, data: bytes) -> bytes:
        """Return the 64 byte signature of ``data``, which must begin with a prefix that names its purpose."""
        return self.private_key.sign(data)

    def __repr__(self) -> str:
        return f"SigningKey(kid={self.kid!r})"


@dataclass(frozen=True)
class KeyEntry:
    """One key of a trust list: its id and 32 raw public bytes."""

    kid: str
    key: bytes


class VerifyKeys:
    """A trust list: the Ed25519 keys, current and next, that may sign one kind of thing.

    Raises AuthenticationError for a wrong size, a ``kid`` that is not the key's, a duplicate. An empty
    list is legal and verifies nothing.
    """

    def __init__(self, entries: Iterable[KeyEntry]) -> None:
        self.entries = tuple(entries)
        self._keys: dict[str, Ed25519PublicKey] = {}
        if len(self.entries) > MAX_KEYS:
            raise AuthenticationError(f"a key list with more than {MAX_KEYS} keys")
        for entry in self.entries:
            if len(entry.key) != KEY_SIZE or entry.kid != key_id(entry.key):
                raise AuthenticationError("a key list whose key id is not that of its key")
            if entry.kid in self._keys:
                raise AuthenticationError(f"a key list with key {entry.kid} twice")
            self._keys[entry.kid] = Ed25519PublicKey.from_public_bytes(entry.key)

    @classmethod
    def of(cls, *public: bytes) -> VerifyKeys:
        """Return the list of these public keys."""
        return cls(KeyEntry(key_id(key), key) for key in public)

    @classmethod
    def from_json(cls, value: object) -> VerifyKeys:
        """Return the list that JSON holds: ``[{"kid": …, "key": …}]``, with no other member."""
        if not isinstance(value, list):
            raise AuthenticationError("a key list that is not a list")
        return cls(_key_entry(item) for item in value)

    def to_json(self) -> list[dict[str, str]]:
        """Return what ``from_json`` reads."""
        return [{"kid": entry.kid, "key": b64encode(entry.key)} for entry in self.entries]

    def get(self, kid: str) -> Ed25519PublicKey:
        """Return the key with this id, or raise AuthenticationError."""
        key = self._keys.get(kid)
        if key is None:
            raise AuthenticationError(
                "signed by a key that is not trusted here",
                hint="If keys were rotated, the list of trusted keys here may be out of date.",
            )
        return key

    def __len__(self) -> int:
        return len(self._keys)

    def __repr__(self) -> str:
        return f"VerifyKeys({', '.join(self._keys)})"


def _key_entry(item: object) -> KeyEntry:
    if not isinstance(item, dict) or item.keys() != {"kid", "key"}:
        raise AuthenticationError("a key list entry that is not {kid, key}")
    try:
        return KeyEntry(item["kid"], b64decode(item["key"], KEY_SIZE))
    except ValueError as error:
        raise AuthenticationError(f"a key list entry whose key is {error}") from None
