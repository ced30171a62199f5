"""Keys of an agent and a reviewer, and parts made with them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from nacl import bindings as sodium
from nacl.public import PrivateKey

from pam_common.keys import SigningKey, key_id
from pam_common.recording import PartReader, PartWriter, Recipient, VerifyReport, verify_part
from pam_common.recording.format import U32, Head, chain_next, chain_start

SESSION = "s-" + "a" * 26
CREATED = 1_900_000_000


@dataclass
class Parties:
    identity: SigningKey = field(default_factory=SigningKey.generate)
    secret: PrivateKey = field(default_factory=PrivateKey.generate)
    session: str = SESSION

    @property
    def private(self) -> bytes:
        return bytes(self.secret)

    @property
    def recipient(self) -> Recipient:
        public = bytes(self.secret.public_key)
        return Recipient(key_id(public), public)

    def writer(self, **changes: Any) -> PartWriter:
        fields: dict[str, Any] = {
            "session": SESSION,
            "part": 1,
            "agent": "a1",
            "identity_kid": self.identity.kid,
            "created": CREATED,
            "recipients": [self.recipient],
            "statement": "a.b.c",
        }
        return PartWriter(**{**fields, **changes})

    def trailer(self, writer: PartWriter, end: str) -> bytes:
        return writer.head(CREATED + 9, end).sign(self.identity).to_trailer(self.identity.kid)

    def part(self, batches: Sequence[Sequence[dict[str, Any]]], end: str = "closed", **changes: Any) -> bytes:
        """A whole file; event i of batch n is at n seconds on connection 1."""
        writer = self.writer(**changes)
        pieces = [writer.opening]
        pieces += [writer.append(second, 1, batch) for second, batch in enumerate(batches)]
        if end not in ("crash", "failed"):
            pieces.append(writer.finish())
        return b"".join([*pieces, self.trailer(writer, end)])

    def forge(self, plains: Sequence[tuple[bytes, int]], end: str = "closed", **changes: Any) -> bytes:
        """A file of an agent that writes whatever it wants: plaintexts and their tags, well signed."""
        key = sodium.crypto_secretstream_xchacha20poly1305_keygen()
        state = sodium.crypto_secretstream_xchacha20poly1305_state()
        writer = self.writer(**changes)
        stream = sodium.crypto_secretstream_xchacha20poly1305_init_push(state, key)
        recipient = self.recipient
        header = type(writer.header)(
            **{
                **vars(writer.header),
                "stream": stream,
                "recipients": {recipient.kid: sodium.crypto_box_seal(key, recipient.key)},
            }
        )
        out = header.to_bytes()
        link, count = chain_start(out), 0
        for plain, tag in plains:
            chunk = sodium.crypto_secretstream_xchacha20poly1305_push(state, plain, link, tag)
            size = U32.pack(len(chunk))
            link, count = chain_next(link, size, chunk), count + 1
            out += size + chunk
        head = Head(SESSION, 1, count, len(out), link, CREATED, end).sign(self.identity)
        return out + head.to_trailer(self.identity.kid)

    def read(self, data: bytes, **options: Any) -> list[dict[str, Any]]:
        return list(PartReader(io.BytesIO(data), [self.private], **options).events())

    def verify(self, data: bytes, **options: Any) -> VerifyReport:
        return verify_part(data, agent_keys={"a1": [self.identity.public]}, **options)


@pytest.fixture(scope="session")
def parties() -> Parties:
    return Parties()
