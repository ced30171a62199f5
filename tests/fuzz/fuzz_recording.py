"""Recordings: a file that was altered, and one that a hostile agent has written and signed.

Input: a mode. FILE: the file's bytes. HEADER and TRAILER: that part's JSON in an otherwise right file.
CHUNKS: the plaintexts of the chunks (each a tag and bytes behind two bytes of length). EVENTS: lines, which
are compressed and signed as they should be. HEAD: the JSON of a chain head as it is posted.
"""

from __future__ import annotations

import contextlib
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from material import AGENT, NOW, PLATFORM, SESSION, TRUSTED, Input, sized
from nacl import bindings as sodium

from pam_common.errors import AuthenticationError
from pam_common.keys import b64encode, key_id
from pam_common.recording import (
    Head,
    Header,
    PartReader,
    PartWriter,
    Recipient,
    RecordingError,
    StatementTrust,
    VerifyReport,
    chain_heads,
    verify_part,
)
from pam_common.recording.format import ABRUPT_ENDS, MAGIC, U32, canonical, chain_next, chain_start
from pam_common.recording.scan import final_head
from pam_common.tokens import AgentStatement

FILE, HEADER, TRAILER, CHUNKS, EVENTS, HEAD = range(6)
PRIVATE = b"r" * 32
PUBLIC = sodium.crypto_scalarmult_base(PRIVATE)
ISSUER = "https://pam.example.com"
STATEMENT = AgentStatement("a1", "dc1", b"n" * 32, AGENT.public).issue(PLATFORM, issuer=ISSUER, now=NOW)
TRUST = StatementTrust(TRUSTED, ISSUER)
#: Whole files that were written as they should be: the only ones that may ever verify as they are.
GENUINE = [
    path.read_bytes()[1:] for path in sorted((Path(__file__).parent / "corpus/recording").glob("genuine-*"))
]
#: What a reader takes here, so that a bomb of zeros ends soon.
MOST = 4 << 20
#: Test inputs need few bytes; a compressor makes a thousand of each.
KEY = b"k" * sodium.crypto_secretstream_xchacha20poly1305_KEYBYTES


def TestOneInput(data: bytes) -> None:
    source = Input(data)
    mode = source.byte() % 6
    if mode == FILE:
        file = source.rest()
        read, report = _read(file), _verify(file)
        if report.ok:
            assert file in GENUINE
            assert read is not None
    elif mode == HEADER:
        body = source.rest()
        opening = MAGIC + U32.pack(len(body)) + body
        with contextlib.suppress(RecordingError):
            header = Header.parse(body)
            assert header.to_bytes() == opening
        _verify(opening)
        _read(opening)
    elif mode == TRAILER:
        body = source.rest()
        file = OPENING + U32.pack(0) + U32.pack(len(body)) + body
        if _verify(file).ok:
            assert body == EMPTY.to_trailer(AGENT.kid)[8:]
        _read(file)
    elif mode == HEAD:
        _head(source.rest())
    elif mode == CHUNKS:
        plains = []
        while source:
            plains.append((source.byte() % 4, source.sized()))
        _signed(plains)
    else:
        _events(source.rest())


def seeds() -> Iterator[bytes]:
    for file in GENUINE:
        yield bytes([FILE]) + file
    yield bytes([HEADER]) + OPENING[12:]
    fields = json.loads(OPENING[12:])
    for name in fields:
        for odd in (None, -1, 1.0, True, [], {}, "\ud800", 10**400, "[" * 9000):
            yield bytes([HEADER]) + canonical({**fields, name: odd})
    # A statement that is hard to read is no token.
    for payload in (b"[" * 9000, b"9" * 5000, b'{"aud": "\xff"}'):
        token = ".".join(map(b64encode, (b'{"alg":"EdDSA"}', payload, b"")))
        yield bytes([HEADER]) + canonical({**fields, "statement": token})
    yield bytes([TRAILER]) + EMPTY.to_trailer(AGENT.kid)[8:]
    yield bytes([HEAD]) + json.dumps(EMPTY.to_json()).encode()
    plain = zlib.compress(EVENT)
    yield bytes([CHUNKS, 0]) + sized(plain[:9]) + b"\3" + sized(plain[9:])
    yield bytes([CHUNKS, 3]) + sized(zlib.compress(bytes(3 << 20)))
    for line in (EVENT, b'{"t":1e999,"c":1,"kind":"x"}\n', b'{"t":1' + b"0" * 400 + b',"c":1,"kind":"x"}\n'):
        yield bytes([EVENTS]) + line
    yield bytes([EVENTS]) + b"[" * 9000 + b"\n"


def write() -> bytes:
    """A whole file as the agent writes it."""
    writer = PartWriter(
        session=SESSION,
        part=1,
        agent="a1",
        identity_kid=AGENT.kid,
        created=NOW,
        recipients=[Recipient(key_id(PUBLIC), PUBLIC)],
        statement=STATEMENT,
    )
    events = [{"kind": "query", "id": 1, "sql": "select 1"}, {"kind": "result", "id": 1, "tag": "SELECT 1"}]
    file = writer.opening + writer.append(0.5, 1, events) + writer.append(1.5, 1, events) + writer.finish()
    return file + writer.head(NOW + 2, "closed").sign(AGENT).to_trailer(AGENT.kid)


EVENT = b'{"t":0.5,"c":1,"kind":"query","sql":"select 1"}\n'


def _opening() -> tuple[bytes, bytes]:
    """The first bytes of a file whose key we know, and its cipher's state."""
    state = sodium.crypto_secretstream_xchacha20poly1305_state()
    header = Header(
        session=SESSION,
        part=1,
        agent="a1",
        identity_kid=AGENT.kid,
        created=NOW,
        recipients={key_id(PUBLIC): sodium.crypto_box_seal(KEY, PUBLIC)},
        statement=STATEMENT,
        stream=sodium.crypto_secretstream_xchacha20poly1305_init_push(state, KEY),
    )
    return header.to_bytes(), state


OPENING = GENUINE[0][: 12 + U32.unpack_from(GENUINE[0], 8)[0]]
#: The end of a recording without chunks.
EMPTY = Head(SESSION, 1, 0, len(OPENING), chain_start(OPENING), NOW, "closed").sign(AGENT)


def _read(file: bytes) -> list[dict[str, object]] | None:
    """The events, or None where there is something wrong."""
    try:
        return list(PartReader(io.BytesIO(file), [PRIVATE], max_bytes=MOST).events())
    except RecordingError:
        return None


def _verify(file: bytes) -> VerifyReport:
    """Check it by what is known of the agent, and by the statement in its header."""
    with contextlib.suppress(RecordingError):
        final_head(io.BytesIO(file))
    with contextlib.suppress(RecordingError):
        chain_heads(file, (0, 1, 7))
    stated = verify_part(file, trust=TRUST, session=SESSION, part=1)
    known = verify_part(file, agent_keys={"a1": [AGENT.public]}, session=SESSION, part=1)
    assert known.ok or not stated.ok
    return known


def _signed(plains: list[tuple[int, bytes]], end: str = "closed") -> list[dict[str, object]] | None:
    """Chunks of a hostile agent verify, as they are signed; reading them has an end all the same."""
    file, state = _opening()
    link = chain_start(file)
    for tag, plain in plains:
        chunk = sodium.crypto_secretstream_xchacha20poly1305_push(state, plain, link, tag)
        size = U32.pack(len(chunk))
        link = chain_next(link, size, chunk)
        file += size + chunk
    head = Head(SESSION, 1, len(plains), len(file), link, NOW, end).sign(AGENT)
    file += head.to_trailer(AGENT.kid)
    assert _verify(file).ok
    assert final_head(io.BytesIO(file)) == head
    return _read(file)


def _events(lines: bytes) -> None:
    events = _signed([(sodium.crypto_secretstream_xchacha20poly1305_TAG_FINAL, zlib.compress(lines))])
    whole = not lines or lines.endswith(b"\n")
    if events is not None:
        assert whole
        assert len(events) == lines.count(b"\n")
        json.dumps(events, allow_nan=False)


def _head(body: bytes) -> None:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return
    with contextlib.suppress(RecordingError, AuthenticationError):
        head = Head.from_json(SESSION, 1, fields)
        assert head.to_json() == fields
        assert head.end not in ABRUPT_ENDS or head.final
        head.verify(AGENT.public)
