"""What a PostgreSQL program is told, byte by byte. Real psql is in test_connect.py."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pam_client.refusal import MAX_STARTUP, PostgresRefusal, error_response, starts_postgres

SSL = struct.pack("!II", 8, 80877103)
GSSENC = struct.pack("!II", 8, 80877104)
CANCEL = struct.pack("!IIII", 16, 80877102, 1, 2)


def startup(body: bytes = b"user\0me\0\0") -> bytes:
    return struct.pack("!II", 8 + len(body), 196608) + body


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        ([startup()], ["E"]),
        ([SSL, startup()], ["N", "E"]),
        ([GSSENC, SSL, startup()], ["N", "N", "E"]),
        ([GSSENC + SSL + startup()], ["NNE"]),
        ([startup()[:5], startup()[5:]], ["", "E"]),
        ([CANCEL], [""]),
        ([SSL, CANCEL], ["N", ""]),
        ([SSL, SSL, SSL], ["N", "N", ""]),
        ([b"GET / HTTP/1.1\r\n"], [""]),
        ([struct.pack("!II", MAX_STARTUP + 1, 196608)], [""]),
        ([struct.pack("!II", 8, 131072)], [""]),
    ],
)
def test_conversations(said: list[bytes], heard: list[str]) -> None:
    refusal = PostgresRefusal("no", "try later")
    answers = [refusal.feed(data) for data in said]
    error = error_response("no", "try later")
    assert answers == [text.encode().replace(b"E", error) for text in heard]
    assert refusal.done
    assert refusal.feed(startup()) == b""


@given(
    requests=st.lists(st.sampled_from([SSL, GSSENC]), max_size=2),
    user=st.binary(max_size=200),
    data=st.data(),
)
def test_any_split_gives_the_same_answer(requests: list[bytes], user: bytes, data: st.DataObject) -> None:
    stream = b"".join(requests) + startup(b"user\0" + user + b"\0\0")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    pieces = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    refusal = PostgresRefusal("no")
    assert b"".join(map(refusal.feed, pieces)) == b"N" * len(requests) + error_response("no")


@given(st.lists(st.binary(max_size=64), max_size=8))
def test_anything_else_is_answered_with_little(pieces: list[bytes]) -> None:
    refusal = PostgresRefusal("no")
    assert sum(len(refusal.feed(piece)) for piece in pieces) <= 2 + len(error_response("no"))


@given(message=st.text(max_size=2000), hint=st.text(max_size=50))
def test_error_is_well_formed_and_plain(message: str, hint: str) -> None:
    packet = error_response(message, hint)
    kind, length = struct.unpack("!cI", packet[:5])
    assert (kind, length) == (b"E", len(packet) - 1)
    assert packet.endswith(b"\0\0")
    fields = packet[5:-2].split(b"\0")
    assert [field[:1] for field in fields] == [b"S", b"V", b"C", b"M", b"H"][: len(fields)]
    assert all(field[1:].decode().isprintable() for field in fields)


def test_an_http_request_is_not_postgres() -> None:
    for line in (b"GET / HT", b"POST / H", b"OPTIONS ", b"\x16\x03\x01\x02\x00\x01\x00\x01", b"SSH-2.0-"):
        assert not starts_postgres(line)
    assert starts_postgres(SSL)
    assert starts_postgres(startup()[:8])
