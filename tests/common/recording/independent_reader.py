"""A second reader, written from docs/recording-format.md alone; shares no code with the product."""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import zlib
from typing import Any

import nacl.bindings
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from nacl.public import PrivateKey, SealedBox


def unb64(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def kid(public: bytes) -> str:
    return hashlib.blake2b(public, digest_size=32).hexdigest()[:16]


def person(name: bytes, data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=32, person=name).digest()


def read(data: bytes, private: bytes, identity: bytes) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    """Header, events and end of a part; checks chain and signature. Asserts instead of advising."""
    assert data[:8] == b"PAMREC1\n"
    (size,) = struct.unpack(">I", data[8:12])
    header = json.loads(data[12 : 12 + size])
    position = 12 + size
    link = person(b"pam-rec-chain-v1", data[:position])

    secret = PrivateKey(private)
    sealed = {entry["kid"]: unb64(entry["sealed"]) for entry in header["recipients"]}
    key = SealedBox(secret).decrypt(sealed[kid(bytes(secret.public_key))])
    state = nacl.bindings.crypto_secretstream_xchacha20poly1305_state()
    nacl.bindings.crypto_secretstream_xchacha20poly1305_init_pull(state, unb64(header["stream"]), key)

    plain, count, tag = b"", 0, 0
    while True:
        (size,) = struct.unpack(">I", data[position : position + 4])
        if size == 0:
            break
        chunk = data[position + 4 : position + 4 + size]
        assert 17 <= size == len(chunk) <= 65553
        assert tag == 0
        piece, tag = nacl.bindings.crypto_secretstream_xchacha20poly1305_pull(state, chunk, link)
        link = person(b"pam-rec-chunk-v1", link + data[position : position + 4] + chunk)
        plain += piece
        count += 1
        position += 4 + size

    (size,) = struct.unpack(">I", data[position + 4 : position + 8])
    assert position + 8 + size == len(data)
    trailer = json.loads(data[position + 8 :])
    assert (trailer["count"], trailer["length"], unb64(trailer["hash"])) == (count, position, link)
    assert trailer["identity_kid"] == header["identity_kid"] == kid(identity)
    session, end = header["session"].encode(), trailer["end"].encode()
    signed = b"pam-recording-head-v1\0" + bytes([len(session)]) + session
    signed += struct.pack(">IQQ", header["part"], count, position) + link
    signed += struct.pack(">QBH", trailer["time"], 1, len(end)) + end
    Ed25519PublicKey.from_public_bytes(identity).verify(unb64(trailer["signature"]), signed)

    stream = zlib.decompressobj(15)
    lines = stream.decompress(plain).split(b"\n")
    if trailer["end"] not in ("crash", "failed"):
        assert tag == 3
        assert stream.eof
        assert lines[-1] == b""
    return header, [json.loads(line) for line in lines[:-1]], trailer["end"]
