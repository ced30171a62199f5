"""AES-GCM as SSH uses it, in one direction (RFC 5647)."""

from __future__ import annotations

import struct
from typing import Any

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from paramiko import SSHException

TAG = 16
_COUNTER = struct.Struct(">Q")


class Key:
    """One key, with a fixed 4-byte and a counting 8-byte half of the nonce (RFC 5647, 7.1)."""

    def __init__(self, engine: AESGCM, iv: bytes) -> None:
        self.engine = engine
        self._fixed = iv[:4]
        self._counter = _COUNTER.unpack(iv[4:])[0]
        self.used_bytes = 0
        self.used_packets = 0

    @classmethod
    def of(cls, engine: Any, aead: bool, iv: bytes | None) -> Key:
        """What paramiko derived from a key exchange. Raises SSHException for any other cipher."""
        if not aead or iv is None or not isinstance(engine, AESGCM):
            raise SSHException("only AES-GCM is used")
        return cls(engine, iv)

    def nonce(self) -> bytes:
        """The next packet's nonce; never the same one twice."""
        nonce = self._fixed + _COUNTER.pack(self._counter)
        self._counter = (self._counter + 1) & 0xFFFF_FFFF_FFFF_FFFF
        return nonce

    def count(self, size: int) -> None:
        self.used_bytes += size
        self.used_packets += 1

    def beyond(self, size: int, packets: int) -> bool:
        return self.used_bytes >= size or self.used_packets >= packets
