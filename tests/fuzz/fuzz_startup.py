"""The first packets of a PostgreSQL client, and what of them goes to the target.

Input: flags of the account, then what the client sends.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from material import SESSION, Input, ScriptedStream, pieces

from pam_agent.protocols.base import ClientProtocolError, Credential, Opening, Target
from pam_agent.protocols.postgres import codec, startup
from pam_common.errors import RefusedError

REPLICATION, ANY_DATABASE = 1, 2


def TestOneInput(data: bytes) -> None:
    source = Input(data)
    flags = source.byte()
    sent = source.rest()
    whole, split = _read([sent]), _read(pieces(sent))
    if sent[4:8] not in _ALONE:
        assert (whole is None) == (split is None)
        if whole is not None and split is not None:
            assert whole[0] == split[0]
            assert whole[1].startswith(split[1])
    if whole is not None and isinstance(whole[0], codec.Startup):
        _narrow(whole[0], flags)


def seeds() -> Iterator[bytes]:
    parameters = {"user": "app", "database": "app", "application_name": "psql", "_pq_.x": "1"}
    packet = codec.startup(codec.VERSION_3_2, parameters)
    yield bytes([0]) + packet
    yield bytes([0]) + packet + codec.message(b"Q", b"select 1\0")
    for word in (b"true", b"database"):
        changed = codec.startup(codec.VERSION_3_0, {**parameters, "replication": word.decode()})
        yield bytes([REPLICATION | ANY_DATABASE]) + changed
    yield bytes([0]) + codec.cancel_request(7, b"1234")
    yield bytes([0]) + _ENCRYPTION_PACKETS[0]
    yield bytes([0]) + b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"


_ENCRYPTION = [codec.UINT32.pack(request) for request in (codec.SSL_REQUEST, codec.GSSENC_REQUEST)]
#: What must come alone; in pieces it seems to, as nobody waits for what is behind.
_ALONE = [*_ENCRYPTION, codec.UINT32.pack(codec.CANCEL_REQUEST)]
_ENCRYPTION_PACKETS = [codec.UINT32.pack(8) + request for request in _ENCRYPTION]


def _read(chunks: Iterable[bytes]) -> tuple[codec.Startup | codec.CancelRequest, bytes] | None:
    stream = ScriptedStream(iter(chunks))
    try:
        read = startup.read(stream)
    except ClientProtocolError:
        return None
    assert len(stream.sent) <= 2  # one no for each kind of encryption
    return read


def _narrow(asked: codec.Startup, flags: int) -> None:
    opening = Opening(
        session=SESSION,
        part=1,
        user="alice",
        account="prod-db/readonly",
        protocol="postgres",
        session_end=0,
        idle_limit=0,
        target=Target("127.0.0.1", 5432),
        credential=Credential("app_ro"),
        databases=None if flags & ANY_DATABASE else ("app", "other"),
        allow_replication=bool(flags & REPLICATION),
    )
    try:
        request = startup.narrow(asked, opening)
    except RefusedError:
        return
    names = {name.lower() for name in request.parameters}
    assert not names & {"user", "password"}
    assert not any(name.startswith("_pq_.") for name in request.parameters)
    if not flags & REPLICATION:
        assert "replication" not in request.parameters
    if not flags & ANY_DATABASE and request.parameters.get("replication", "").lower() not in startup._TRUE:
        assert request.database in ("app", "other")
    # What goes to the target says the same to a server as it says here.
    packet = codec.startup(request.version, {"user": "app_ro", **request.parameters})
    sent = codec.parse_startup(packet[4:])
    assert sent == codec.Startup(request.version, {"user": "app_ro", **request.parameters})
    codec.negotiate_version(request.version, request.unsupported)
