"""Where messages begin: any split of the bytes gives the same, garbage gives a protocol error."""

from __future__ import annotations

import contextlib
import hashlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pam_agent.protocols.base import ClientProtocolError, TargetProtocolError
from pam_agent.protocols.postgres import codec
from pam_agent.protocols.postgres.codec import CLIENT_KINDS, TARGET_KINDS, message
from pam_agent.protocols.postgres.framing import Framer


class Heard:
    """A Sink that puts the pieces together again."""

    def __init__(self):
        self.messages = []
        self.partial = b""

    def control(self, kind, body, length, digest):
        self.messages.append((chr(kind), bytes(body), length, digest))

    def run(self, kind, view, count):
        assert not self.partial
        position = 0
        for _ in range(count):
            (length,) = struct.unpack_from("!I", view, position + 1)
            self.messages.append((chr(kind), bytes(view[position + 5 : position + 1 + length])))
            position += 1 + length
        assert position == len(view)

    def piece(self, kind, view, first, last):
        assert first == (not self.partial)
        self.partial += bytes(view)
        if last:
            self.messages.append((chr(kind), self.partial[5:]))
            self.partial = b""


def target_framer():
    heard = Heard()
    return heard, Framer(TARGET_KINDS, frozenset(b"Dd"), heard, TargetProtocolError)


def feed_all(framer, data, sizes):
    """Feed as the pump does: what is held back comes in front of the next buffer."""
    kept = b""
    forwarded = b""
    position = 0
    for size in [*sizes, len(data)]:
        buffer = kept + data[position : position + size]
        position += size
        safe = framer.feed(buffer, len(buffer))
        assert len(buffer) - safe < 5
        forwarded += buffer[:safe]
        kept = buffer[safe:]
    assert forwarded + kept == data
    return kept


MESSAGES = st.one_of(
    st.binary(min_size=2, max_size=40).map(lambda body: message(b"D", body)),
    st.binary(max_size=40).map(lambda body: message(b"d", body)),
    st.just(message(b"1")),
    st.just(message(b"Z", b"I")),
    st.binary(min_size=1, max_size=300).map(lambda body: message(b"E", body)),
    st.binary(min_size=1, max_size=300).map(lambda body: message(b"N", body)),
    st.binary(min_size=1, max_size=300).map(lambda body: message(b"C", body)),
)


@given(st.lists(MESSAGES, max_size=12), st.lists(st.integers(0, 60), max_size=60))
def test_postgres_framing_any_split_gives_the_same(messages, sizes):
    data = b"".join(messages)
    whole, framer = target_framer()
    feed_all(framer, data, [])
    split, framer = target_framer()
    assert feed_all(framer, data, sizes) == b""
    assert split.messages == whole.messages
    assert len(whole.messages) == len(messages)
    assert framer.at_boundary


@given(st.binary(max_size=400), st.lists(st.integers(0, 50), max_size=10), st.booleans())
def test_postgres_framing_garbage_is_a_protocol_error_or_waits(data, sizes, from_client):
    kinds, bulk, error = (
        (CLIENT_KINDS, frozenset(b"d"), ClientProtocolError)
        if from_client
        else (TARGET_KINDS, frozenset(b"Dd"), TargetProtocolError)
    )
    with contextlib.suppress(error):
        feed_all(Framer(kinds, bulk, Heard(), error), data, sizes)


@pytest.mark.parametrize("kind", [chr(kind) for kind in TARGET_KINDS])
@pytest.mark.parametrize("length", [0, 1, 3, 0x3FFFFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_postgres_framing_impossible_lengths(kind, length):
    _, framer = target_framer()
    data = struct.pack("!BI", ord(kind), length) + b"x" * 20
    with pytest.raises(TargetProtocolError, match="impossible length"):
        framer.feed(data, len(data))


@pytest.mark.parametrize("kind", ["R", "K", "v", "p", "\0", "Q"])
def test_postgres_framing_kinds_a_target_may_not_send(kind):
    _, framer = target_framer()
    data = message(kind.encode(), b"12345678")
    with pytest.raises(TargetProtocolError, match="unexpected message"):
        framer.feed(data, len(data))


def test_postgres_framing_captures_and_hashes_what_is_long():
    heard = Heard()
    framer = Framer({ord("Q"): codec.Limit(5, codec.LARGE, 10)}, frozenset(), heard, ClientProtocolError)
    body = bytes(range(256)) * 4
    for sizes in ([], [3, 5, 100, 900], [1] * 1029):
        feed_all(framer, message(b"Q", body), sizes)
    expected = ("Q", body[:10], len(body), hashlib.sha256(body).hexdigest())
    assert heard.messages == [expected] * 3


def test_postgres_framing_holds_no_more_than_it_captures():
    """A message of a gigabyte is followed without being kept."""
    _, framer = target_framer()
    header = struct.pack("!BI", ord("N"), 0x3FFFFFFE)
    framer.feed(header, len(header))
    part = bytes(1 << 20)
    for _ in range(20):
        assert framer.feed(part, len(part)) == len(part)
    assert len(framer._body) == 0
    assert not framer.at_boundary


# --- start-up packets ------------------------------------------------------------------------------------


def startup_packet(*parameters, version=codec.VERSION_3_0):
    return struct.pack("!I", version) + b"".join(p.encode() + b"\0" for p in parameters) + b"\0"


def test_postgres_startup_round_trip():
    packet = codec.startup(codec.VERSION_3_2, {"user": "é", "database": "d", "options": ""})
    parsed = codec.parse_startup(packet[4:])
    assert parsed == codec.Startup(codec.VERSION_3_2, {"user": "é", "database": "d", "options": ""})
    assert len(packet) == struct.unpack("!I", packet[:4])[0]
    with pytest.raises(ValueError, match="zero byte"):
        codec.startup(codec.VERSION_3_0, {"user": "a\0database\0b"})


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"\0\0",
        struct.pack("!I", 2 << 16),
        struct.pack("!I", 4 << 16),
        startup_packet("user", "a", "user", "b"),
        startup_packet("user", "a")[:-1],
        startup_packet("user", "a") + b"x",
        startup_packet("user"),
        struct.pack("!I", codec.VERSION_3_0) + b"user\0\xff\xfe\0\0",
        struct.pack("!I", codec.SSL_REQUEST) + b"x",
        struct.pack("!II", codec.CANCEL_REQUEST, 1) + b"abc",
        struct.pack("!II", codec.CANCEL_REQUEST, 1) + b"x" * 257,
    ],
)
def test_postgres_startup_packets_refused(packet):
    with pytest.raises(ClientProtocolError):
        codec.parse_startup(packet)


@given(st.binary(max_size=200))
def test_postgres_startup_garbage(packet):
    with contextlib.suppress(ClientProtocolError):
        codec.parse_startup(packet)


@given(st.binary(max_size=200))
def test_postgres_error_and_columns_never_raise_anything_else(body):
    codec.parse_error(body)
    with contextlib.suppress(TargetProtocolError):
        codec.parse_columns(body)


def test_postgres_error_response_reads_back():
    packet = codec.error_response("57P01", "killed\0", "ask")
    assert packet[0:1] == b"E"
    assert codec.parse_error(packet[5:]) == {
        "severity": "FATAL",
        "code": "57P01",
        "message": "killed",
        "hint": "ask",
    }
