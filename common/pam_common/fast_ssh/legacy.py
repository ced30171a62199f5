"""AES-CTR with HMAC (RFC 4253, 4344, 6668), for servers that have no AES-GCM: only where a resource says so.

Encrypt-and-MAC as the RFCs have it, and OpenSSH's encrypt-then-MAC where the server can. Half the speed of
AES-GCM, and a length that is trusted before it is authenticated; a MAC that does not fit ends the connection
without saying which part of the packet was wrong.
"""

from __future__ import annotations

import hmac
import os
import struct
from typing import Any

from paramiko import SSHException
from paramiko.common import MSG_KEXINIT

from pam_common.fast_ssh.cipher import Key
from pam_common.fast_ssh.packets import MAX_PACKET, Packets
from pam_common.stream import Data

_BLOCK = 16
_LENGTH = struct.Struct(">I")
_HEADER = struct.Struct(">IB")


class CtrKey(Key):
    """One direction's keys: a stream cipher that goes on from packet to packet, and a MAC."""

    def __init__(self, engine: Any, mac: Any, mac_key: bytes, mac_size: int, *, etm: bool) -> None:
        self._update = engine.update
        self._digest = mac().name
        self._mac_key = mac_key
        self.mac_size = mac_size
        self.etm = etm
        self.restart = False  # packets are numbered from 0 with this key: strict key exchange
        self.used_bytes = 0
        self.used_packets = 0

    def crypt(self, data: Data) -> bytes:
        return bytes(self._update(bytes(data)))

    def mac(self, number: int, data: bytes) -> bytes:
        whole = hmac.digest(self._mac_key, _LENGTH.pack(number) + data, self._digest)
        return whole[: self.mac_size]

    def require(self, number: int, data: bytes, shown: Data) -> None:
        if not hmac.compare_digest(self.mac(number, data), bytes(shown)):
            raise SSHException("a packet was forged or damaged")


class LegacyPackets(Packets):
    """Packets that may be sealed with either kind of key."""

    _sequence_out = 0
    _restart_out = False

    def reset_seqno_out(self) -> None:
        self._restart_out = True  # with the key that comes next; what is queued has the old one

    def set_inbound_cipher(self, block_engine: Any, *, aead: bool, iv_in: bytes | None, **other: Any) -> None:
        if aead:
            super().set_inbound_cipher(block_engine, aead=aead, iv_in=iv_in)
            return
        self._count_exchange(self._key_in)
        self._key_in = _key(block_engine, other)
        self._note_new_key(1)

    def set_outbound_cipher(
        self, block_engine: Any, *, aead: bool, iv_out: bytes | None, **other: Any
    ) -> None:
        if aead:
            super().set_outbound_cipher(block_engine, aead=aead, iv_out=iv_out)
            return
        key = _key(block_engine, other)
        key.restart, self._restart_out = self._restart_out, False
        self._queue.append(key)
        self.flush_soon()
        self._note_new_key(2)

    def _use_key(self, key: Key) -> None:
        if isinstance(key, CtrKey) and key.restart:
            self._sequence_out = 0
        super()._use_key(key)

    # -- writing ---------------------------------------------------------------------------------------

    def _seal(self, head: bytes, body: Data = b"") -> memoryview:
        key, number = self._key_out, self._sequence_out
        self._sequence_out = (number + 1) & 0xFFFF_FFFF
        if not isinstance(key, CtrKey):
            return super()._seal(head, body)
        if head[0] == MSG_KEXINIT:
            self._open.clear()
        payload = len(head) + len(body)
        padding = 3 + _BLOCK - (payload + (4 if key.etm else 8)) % _BLOCK
        size = 1 + payload + padding
        plain = b"".join((_HEADER.pack(size, padding), head, body, os.urandom(padding)))
        if key.etm:
            sealed = plain[:4] + key.crypt(plain[4:])
            packet = sealed + key.mac(number, sealed)
        else:
            packet = key.crypt(plain) + key.mac(number, plain)
        key.count(len(packet))
        if key.beyond(self.rekey_bytes, self.rekey_packets):
            self._need_rekey = True
        return memoryview(packet)

    # -- reading ---------------------------------------------------------------------------------------

    def _next_payload(self) -> memoryview:
        key = self._key_in
        if not isinstance(key, CtrKey):
            return super()._next_payload()
        plain = self._read_etm(key) if key.etm else self._read_sealed(key)
        size, padding = _HEADER.unpack_from(plain)
        if padding < 4 or padding > size - 2:
            raise SSHException(f"impossible padding {padding}")
        self._count_in(key, len(plain) + key.mac_size)
        return memoryview(plain)[5 : 4 + size - padding]

    def _read_sealed(self, key: CtrKey) -> bytes:
        self._need(_BLOCK, between=True)
        first = key.crypt(self._view[self._start : self._start + _BLOCK])
        size = _LENGTH.unpack_from(first)[0]
        # Nothing vouches for it yet: bounded before the first byte is waited for.
        if not _BLOCK - 4 <= size <= MAX_PACKET or (size + 4) % _BLOCK:
            raise SSHException("a packet was forged or damaged")
        whole = 4 + size + key.mac_size
        self._need(whole)
        at = self._start
        plain = first + key.crypt(self._view[at + _BLOCK : at + 4 + size])
        key.require(self._sequence_in, plain, self._view[at + 4 + size : at + whole])
        self._start += whole
        return plain

    def _read_etm(self, key: CtrKey) -> bytes:
        self._need(4, between=True)
        size = _LENGTH.unpack_from(self._buffer, self._start)[0]
        if not _BLOCK <= size <= MAX_PACKET or size % _BLOCK:
            raise SSHException(f"impossible packet length {size}")
        whole = 4 + size + key.mac_size
        self._need(whole)
        at = self._start
        sealed = bytes(self._view[at : at + 4 + size])
        key.require(self._sequence_in, sealed, self._view[at + 4 + size : at + whole])
        self._start += whole
        return sealed[:4] + key.crypt(sealed[4:])


def _key(engine: Any, other: dict[str, Any]) -> CtrKey:
    """What paramiko derived, from the arguments of its Packetizer."""
    return CtrKey(
        engine, other["mac_engine"], other["mac_key"], other["mac_size"], etm=other.get("etm", False)
    )
