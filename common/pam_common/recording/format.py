"""The structures of a recording file and their bytes; ``docs/recording-format.md`` defines them.

No file, clock or thread here. Everything that is parsed is checked against the format's limits and
raises :class:`RecordingError` otherwise.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from nacl.exceptions import BadSignatureError
from nacl.signing import VerifyKey

from pam_common.errors import AuthenticationError, PamError
from pam_common.keys import SigningKey, b64decode, b64encode, is_label, is_session_id, key_id

VERSION = 1
MAGIC = b"PAMREC1\n"
U32 = struct.Struct(">I")

#: A 16 KiB statement, 16 recipients and room to spare.
MAX_HEADER = 32768
MAX_STATEMENT = 16384
#: Platform keys current and next, and a handful of auditors.
MAX_RECIPIENTS = 16
#: libsodium's buffers stay as large as the largest chunk for the life of a session.
MAX_PLAIN = 65536
#: A secretstream message is this much longer than its plaintext.
CHUNK_OVERHEAD = 17
MAX_CHUNK = MAX_PLAIN + CHUNK_OVERHEAD
#: One NDJSON line with its newline: what a reviewer's browser can still show.
MAX_EVENT = 1 << 20
#: It has about 400 bytes.
MAX_TRAILER = 4096
MAX_END = 200

HASH_SIZE = 32
SEALED_SIZE = 80
STREAM_HEADER_SIZE = 24
SIGNATURE_SIZE = 64

#: Ends with a meaning for the format: no FINAL chunk is there, the stream may stop anywhere.
END_CRASH = "crash"
END_FAILED = "failed"
ABRUPT_ENDS = frozenset((END_CRASH, END_FAILED))

HEAD_DOMAIN = b"pam-recording-head-v1\0"
_CHAIN_PERSON = b"pam-rec-chain-v1"
_CHUNK_PERSON = b"pam-rec-chunk-v1"

_KID = re.compile(r"[0-9a-f]{16}")
_PART_NAME = re.compile(r"(s-[a-z2-7]{26})\.([1-9][0-9]{0,8})\.pamrec")
MAX_PART = 999_999_999


class RecordingError(PamError):
    """A recording is damaged, was altered, or is not one; the message says where."""


@dataclass(frozen=True)
class Recipient:
    """Someone who can read recordings: an X25519 public key, 32 raw bytes, and its key id."""

    kid: str
    key: bytes

    def __post_init__(self) -> None:
        # Else a local list of allowed kids would not hold.
        if len(self.key) != HASH_SIZE or self.kid != key_id(self.key):
            raise RecordingError("a recipient's key id is not that of its key")

    @classmethod
    def from_json(cls, entry: object) -> Recipient:
        """From ``{"kid", "key"}``. Raises RecordingError."""
        if not isinstance(entry, dict) or set(entry) != {"kid", "key"}:
            raise RecordingError("a recipient has a kid and a key")
        key = unb64(entry["key"], HASH_SIZE, "recipient key")
        return cls(entry["kid"], key)


@dataclass(frozen=True)
class Header:
    """What a part begins with. ``recipients`` maps kid to the sealed part key (80 bytes)."""

    session: str
    part: int
    agent: str
    identity_kid: str
    created: int
    recipients: Mapping[str, bytes]
    statement: str
    stream: bytes

    def to_bytes(self) -> bytes:
        """Magic, length and canonical JSON: the first bytes of the file."""
        body = canonical(
            {
                "v": VERSION,
                "session": self.session,
                "part": self.part,
                "agent": self.agent,
                "identity_kid": self.identity_kid,
                "created": self.created,
                "recipients": [{"kid": kid, "sealed": b64encode(s)} for kid, s in self.recipients.items()],
                "statement": self.statement,
                "stream": b64encode(self.stream),
            }
        )
        header = self.parse(body)  # what we would not read we do not write
        if header != self:
            raise RecordingError("the header does not survive its encoding")
        return MAGIC + U32.pack(len(body)) + body

    @classmethod
    def parse(cls, body: bytes) -> Header:
        """From the canonical JSON. Raises RecordingError."""
        if not 1 <= len(body) <= MAX_HEADER:
            raise RecordingError(f"the header has {len(body)} bytes, not 1 to {MAX_HEADER}")
        fields = _object(body, "header", _HEADER_KEYS)
        if _number(fields["v"], 32, "v") != VERSION:
            raise RecordingError("the recording has another format version")
        return cls(
            session=check_session(fields["session"]),
            part=check_part(fields["part"]),
            agent=_label(fields["agent"]),
            identity_kid=_kid(fields["identity_kid"]),
            created=_number(fields["created"], 64, "created"),
            recipients=_recipients(fields["recipients"]),
            statement=_text(fields["statement"], MAX_STATEMENT, "statement"),
            stream=unb64(fields["stream"], STREAM_HEADER_SIZE, "stream"),
        )


_HEADER_KEYS = frozenset(
    ("v", "session", "part", "agent", "identity_kid", "created", "recipients", "statement", "stream")
)


@dataclass(frozen=True)
class Head:
    """A signed chain head: after ``count`` chunks and ``length`` bytes the chain was at ``hash``.

    ``end`` is None in a head witnessed during the session and says how the part ended in the final one.
    """

    session: str
    part: int
    count: int
    length: int
    hash: bytes
    time: int
    end: str | None = None
    signature: bytes = b""

    @property
    def final(self) -> bool:
        return self.end is not None

    def signed_bytes(self) -> bytes:
        """What the agent's identity signs."""
        session, end = self.session.encode("ascii"), (self.end or "").encode("utf-8")
        return b"".join(
            (
                HEAD_DOMAIN,
                struct.pack(">B", len(session)),
                session,
                struct.pack(">IQQ", self.part, self.count, self.length),
                self.hash,
                struct.pack(">QBH", self.time, self.final, len(end)),
                end,
            )
        )

    def sign(self, identity: SigningKey) -> Head:
        """The same head with the signature of ``identity``."""
        return replace(self, signature=identity.sign(self.signed_bytes()))

    def verify(self, identity: bytes) -> None:
        """Check the signature by the agent's Ed25519 public key (32 bytes); AuthenticationError."""
        try:
            VerifyKey(identity).verify(self.signed_bytes(), self.signature)
        except (BadSignatureError, ValueError):
            raise AuthenticationError("the signature is not the agent's") from None

    def to_json(self) -> dict[str, Any]:
        """As it is posted to the platform (session and part are in the URL)."""
        return {
            "count": self.count,
            "length": self.length,
            "hash": b64encode(self.hash),
            "time": self.time,
            "signature": b64encode(self.signature),
            "final": self.final,
            "end": self.end,
        }

    @classmethod
    def from_json(cls, session: str, part: int, body: object) -> Head:
        """From a posted head. Raises RecordingError; the signature is not yet checked."""
        if not isinstance(body, dict) or set(body) != _HEAD_KEYS:
            raise RecordingError("a chain head has exactly " + ", ".join(sorted(_HEAD_KEYS)))
        if not isinstance(body["final"], bool) or body["final"] != (body["end"] is not None):
            raise RecordingError("a chain head has an end if and only if it is final")
        return cls._from_fields(session, part, body)

    def to_trailer(self, identity_kid: str) -> bytes:
        """The last bytes of the file: zero, length and canonical JSON of this final head."""
        fields = {key: value for key, value in self.to_json().items() if key != "final"}
        body = canonical({**fields, "identity_kid": identity_kid})
        return U32.pack(0) + U32.pack(len(body)) + body

    @classmethod
    def parse_trailer(cls, header: Header, body: bytes) -> Head:
        """From the trailer's canonical JSON. Raises RecordingError; the signature is not yet checked."""
        fields = _object(body, "trailer", (_HEAD_KEYS - {"final"}) | {"identity_kid"})
        if fields["end"] is None:
            raise RecordingError("the trailer does not say how the part ended")
        if fields["identity_kid"] != header.identity_kid:
            raise RecordingError("header and trailer name different identity keys")
        return cls._from_fields(header.session, header.part, fields)

    @classmethod
    def _from_fields(cls, session: str, part: int, fields: Mapping[str, Any]) -> Head:
        return cls(
            session=check_session(session),
            part=check_part(part),
            count=_number(fields["count"], 64, "count"),
            length=_number(fields["length"], 64, "length"),
            hash=unb64(fields["hash"], HASH_SIZE, "hash"),
            time=_number(fields["time"], 64, "time"),
            end=None if fields["end"] is None else check_end(fields["end"]),
            signature=unb64(fields["signature"], SIGNATURE_SIZE, "signature"),
        )


_HEAD_KEYS = frozenset(("count", "length", "hash", "time", "signature", "final", "end"))


def chain_start(opening: bytes) -> bytes:
    """h(0), over magic, length and header JSON."""
    return hashlib.blake2b(opening, digest_size=HASH_SIZE, person=_CHAIN_PERSON).digest()


def chain_next(previous: bytes, size: bytes, ciphertext: bytes) -> bytes:
    """h(i) from h(i-1), the chunk's four length bytes and its ciphertext."""
    # In one piece: the calls would take longer than the copy of what is 64 KiB at most.
    return hashlib.blake2b(
        b"".join((previous, size, ciphertext)), digest_size=HASH_SIZE, person=_CHUNK_PERSON
    ).digest()


def part_name(session: str, part: int) -> str:
    """The file's name. Only ids of the right shape come through: no path can be built from them."""
    return f"{check_session(session)}.{check_part(part)}.pamrec"


def parse_part_name(name: str) -> tuple[str, int] | None:
    """Session and part of a file name, or None when it is not one of ours."""
    match = _PART_NAME.fullmatch(name)
    return (match[1], int(match[2])) if match else None


def canonical(fields: Mapping[str, Any]) -> bytes:
    """The one encoding of a header or trailer."""
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def check_session(value: object) -> str:
    if not isinstance(value, str) or not is_session_id(value):
        raise RecordingError("not a session id")
    return value


def check_part(value: object) -> int:
    number = _number(value, 32, "part")
    if not 1 <= number <= MAX_PART:
        raise RecordingError(f"part {number} is not 1 to {MAX_PART}")
    return number


def check_end(value: object) -> str:
    text = _text(value, MAX_END, "end")
    if not text or not text.isprintable() or len(text.encode("utf-8")) > MAX_END:
        raise RecordingError(f"an end is 1 to {MAX_END} bytes without control characters")
    return text


def unb64(value: object, size: int, what: str) -> bytes:
    """Exactly ``size`` bytes from canonical base64url. Raises RecordingError naming ``what``."""
    try:
        if isinstance(value, str):
            return b64decode(value, size)
    except ValueError:
        pass
    raise RecordingError(f"the {what} is not {size} bytes in base64url")


def _object(body: bytes, what: str, keys: frozenset[str]) -> dict[str, Any]:
    try:
        fields = json.loads(body)
        same = isinstance(fields, dict) and canonical(fields) == body
    except (ValueError, RecursionError):
        fields, same = None, False
    if not same:
        raise RecordingError(f"the {what} is not canonical JSON")
    assert isinstance(fields, dict)
    if set(fields) != keys:
        raise RecordingError(f"the {what} has other keys than {', '.join(sorted(keys))}")
    return fields


def _recipients(value: object) -> dict[str, bytes]:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_RECIPIENTS:
        raise RecordingError(f"a recording has 1 to {MAX_RECIPIENTS} recipients")
    recipients: dict[str, bytes] = {}
    for entry in value:
        if not isinstance(entry, dict) or set(entry) != {"kid", "sealed"}:
            raise RecordingError("a recipient in the header has a kid and a sealed key")
        kid = _kid(entry["kid"])
        if kid in recipients:
            raise RecordingError(f"recipient {kid} is there twice")
        recipients[kid] = unb64(entry["sealed"], SEALED_SIZE, "sealed key")
    return recipients


def _label(value: object) -> str:
    if not isinstance(value, str) or not is_label(value):
        raise RecordingError("the agent's name is not a label")
    return value


def _kid(value: object) -> str:
    if not isinstance(value, str) or not _KID.fullmatch(value):
        raise RecordingError("a key id is not 16 hexadecimal characters")
    return value


def _number(value: object, bits: int, what: str) -> int:
    # bool is an int in Python, and 1.0 equals 1: neither is a number of this format.
    if type(value) is not int or not 0 <= value < 1 << bits:
        raise RecordingError(f"{what} is not an unsigned {bits}-bit number")
    return value


def _text(value: object, limit: int, what: str) -> str:
    if not isinstance(value, str) or len(value) > limit:
        raise RecordingError(f"{what} is not a text of at most {limit} characters")
    return value
