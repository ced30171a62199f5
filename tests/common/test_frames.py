"""The frame codec: however the bytes arrive, the same frames come out, or an error, and never other bytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pam_common import frames
from pam_common.errors import ProtocolError
from pam_common.fast_ssh.channel import PACKET
from pam_common.frames import (
    BATCH_DATA,
    MAX_CONTROL,
    MAX_DATA,
    PACKET_DATA,
    Frame,
    FrameReader,
    FrameType,
    FrameWriter,
    MessageReader,
)
from pam_common.noise import CipherState

KEY = bytes(range(32))
#: Data, or a control frame.
Item: TypeAlias = bytes | Frame


def writer() -> FrameWriter:
    return FrameWriter(CipherState(KEY))


def reader() -> FrameReader:
    return FrameReader(CipherState(KEY), MessageReader())


def sealed(items: Iterable[Item]) -> bytes:
    """What a writer sends for ``items``."""
    ours = writer()
    out = b""
    for item in items:
        if isinstance(item, Frame):
            out += ours.control(item.type, item.body)
        else:
            for start in range(0, len(item), BATCH_DATA):
                out += ours.data(memoryview(item)[start : start + BATCH_DATA])
    return out


def read(
    ours: FrameReader, chunks: Iterable[bytes], size: int = 1 << 20
) -> tuple[list[Item], ProtocolError | None]:
    """Return what a reader makes of ``chunks``, taken ``size`` bytes at a time, and what ended it."""
    items: list[Item] = []
    for chunk in chunks:
        ours.feed(chunk)
        while True:
            error = frame = None
            try:
                frame = ours.fill()
            except ProtocolError as caught:
                error = caught
            progress = ours.has_data or frame is not None
            while data := ours.take(size):
                items.append(data)
            if error is not None:
                return items, error
            if frame is not None:
                items.append(frame)
            if not progress:
                break
    return items, None


def joined(items: Iterable[Item]) -> list[Item]:
    """``items`` with neighbouring data put together, which is all that a byte stream promises."""
    out: list[Item] = []
    for item in items:
        if isinstance(item, bytes) and out and isinstance(out[-1], bytes):
            out[-1] += item
        elif item:
            out.append(item)
    return out


def split(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    ends = sorted({cut % (len(data) + 1) for cut in cuts} | {len(data)})
    return [data[start:end] for start, end in zip([0, *ends], ends, strict=False)]


CONTROL = st.builds(
    Frame, st.sampled_from([kind for kind in FrameType if kind is not FrameType.DATA]), st.binary(max_size=40)
)
SIZES = st.one_of(
    st.integers(0, 200), st.sampled_from([4079, 4080, 4081, MAX_DATA, MAX_DATA + 1, 3 * MAX_DATA])
)
DATA = st.builds(
    lambda size, salt: bytes([salt]) + bytes(i * 7 & 255 for i in range(251)) * (size // 251),
    SIZES,
    st.integers(0, 255),
)
ITEMS = st.lists(st.one_of(st.binary(max_size=300), DATA, CONTROL), max_size=12)
CUTS = st.lists(st.integers(0, 1 << 20), max_size=30)


# Where the machine is busy, time says nothing: no deadlines.
@settings(deadline=None)
@given(ITEMS, CUTS, st.sampled_from([1000, 4096, 100_000]))
def test_any_split_gives_the_same_frames(items: list[Item], cuts: list[int], size: int) -> None:
    ours = reader()
    received, error = read(ours, split(sealed(items), cuts), size)
    assert error is None
    assert joined(received) == joined(items)
    assert ours.received == sum(len(item) for item in items if isinstance(item, bytes))


@settings(deadline=None)
@given(st.lists(st.one_of(st.binary(min_size=1, max_size=40), CONTROL), max_size=4))
def test_one_byte_at_a_time(items: list[Item]) -> None:
    stream = sealed(items)
    received, error = read(reader(), [stream[i : i + 1] for i in range(len(stream))], size=1)
    assert (joined(received), error) == (joined(items), None)


@settings(deadline=None)
@given(st.lists(st.binary(max_size=3000), max_size=20))
def test_garbage_is_refused_and_not_kept(chunks: list[bytes]) -> None:
    ours = reader()
    received, _ = read(ours, chunks)
    assert received == []
    assert len(ours._messages._partial) <= 2 + 65535


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.binary(min_size=1, max_size=60), min_size=1, max_size=8),
    st.sampled_from(["flip", "drop", "repeat", "swap", "cut", "insert"]),
    st.data(),
    CUTS,
)
def test_nothing_but_a_true_beginning_is_delivered(
    items: list[bytes], attack: str, data: st.DataObject, cuts: list[int]
) -> None:
    ours = writer()
    messages = [bytes(ours.data(memoryview(item))) for item in items]
    at = data.draw(st.integers(0, len(messages) - 1))
    other = data.draw(st.integers(0, len(messages) - 1))
    stream = {
        "flip": lambda: (
            [*messages[:at], flipped(messages[at], data.draw(st.integers(0, 10**4))), *messages[at + 1 :]]
        ),
        "drop": lambda: messages[:at] + messages[at + 1 :],
        "repeat": lambda: [*messages[: at + 1], *messages[at:]],
        "swap": lambda: swapped(messages, at, other),
        "cut": lambda: [*messages[:at], messages[at][: data.draw(st.integers(0, len(messages[at]) - 1))]],
        "insert": lambda: [*messages[:at], data.draw(st.binary(min_size=1, max_size=80)), *messages[at:]],
    }[attack]()
    received, error = read(reader(), split(b"".join(stream), cuts))
    intact = next(
        (i for i, (a, b) in enumerate(zip(messages, stream, strict=False)) if a != b),
        min(len(messages), len(stream)),
    )
    delivered = b"".join(item for item in received if isinstance(item, bytes))
    assert delivered == b"".join(items[:intact])
    if b"".join(stream[intact:]) and attack in ("drop", "repeat"):
        assert error is not None


def flipped(message: bytes, bit: int) -> bytes:
    altered = bytearray(message)
    altered[bit // 8 % len(altered)] ^= 1 << bit % 8
    return bytes(altered)


def swapped(messages: list[bytes], a: int, b: int) -> list[bytes]:
    out = list(messages)
    out[a], out[b] = out[b], out[a]
    return out


def seal_by_hand(plaintext: bytes) -> bytes:
    message = CipherState(KEY).encrypt(b"", plaintext)
    return len(message).to_bytes(2, "big") + message


def test_the_format_to_the_byte() -> None:
    assert sealed([b"hello"]) == seal_by_hand(b"hello\x01")
    assert sealed([Frame(FrameType.EOF, bytes(8))]) == seal_by_hand(bytes(8) + b"\x02")
    assert {kind.name: kind.value for kind in FrameType} == {
        "DATA": 1,
        "EOF": 2,
        "ERROR": 3,
        "PING": 4,
        "PONG": 5,
        "ACK": 6,
    }


def test_a_full_frame_fills_a_message() -> None:
    assert sealed([bytes(MAX_DATA)])[:2] == b"\xff\xff"
    assert len(sealed([bytes(MAX_DATA)])) == 2 + 65535
    assert len(sealed([bytes(MAX_DATA + 1)])) == 2 + 65535 + 20


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (b"\x00\x00", "too short"),
        (b"\x00\x10" + bytes(16), "too short"),
        (b"\x00\x11" + bytes(17), "altered"),
        (seal_by_hand(b""), "too short"),
        (seal_by_hand(b"\x01"), "empty data"),
        (seal_by_hand(b"\x00"), "unknown frame type 0"),
        (seal_by_hand(b"x\x07"), "unknown frame type 7"),
        (seal_by_hand(b"x\xff"), "unknown frame type 255"),
        (seal_by_hand(bytes(MAX_CONTROL + 1) + b"\x03"), "too long"),
    ],
)
def test_what_is_no_frame(stream: bytes, message: str) -> None:
    received, error = read(reader(), [stream])
    assert received == []
    assert message in str(error)


def test_good_data_before_a_bad_frame_is_delivered_once() -> None:
    ours = writer()
    good, bad = bytes(ours.data(memoryview(b"good"))), flipped(bytes(ours.data(memoryview(b"bad"))), 100)
    received, error = read(reader(), [good + bad])
    assert received == [b"good"]
    assert error is not None


def test_a_slow_taker_holds_the_reader_back() -> None:
    ours = reader()
    ours.feed(sealed([bytes(6 * MAX_DATA)]))
    assert ours.fill() is None
    assert len(ours.take(1 << 30)) == BATCH_DATA  # no more than a batch is decrypted ahead
    assert ours.fill() is None
    assert len(ours.take(1 << 30)) == 2 * MAX_DATA


def test_what_is_kept_outlives_the_memory_it_was_fed_in() -> None:
    ours = reader()
    chunk = bytearray(sealed([b"a" * MAX_DATA] * 6))
    ours.feed(chunk)
    ours.fill()
    ours.keep()
    chunk[:] = bytes(len(chunk))
    assert ours.take(1 << 30) == b"a" * BATCH_DATA
    ours.fill()
    assert ours.take(1 << 30) == b"a" * (2 * MAX_DATA)
    assert ours.drained


def test_small_traffic_keeps_small_buffers() -> None:
    ours, theirs = writer(), reader()
    for _ in range(1000):
        theirs.feed(bytes(ours.data(memoryview(b"keystroke"))))
        theirs.fill()
        assert theirs.take(100) == b"keystroke"
    assert len(ours.memory) == len(theirs._plain) == frames.SMALL_BUFFER


def test_keys_change_in_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "REKEY_INTERVAL", 3)
    stream = sealed([b"%d" % number for number in range(10)])
    received, error = read(reader(), [stream])
    assert (joined(received), error) == ([b"0123456789"], None)
    # The fourth message is under the next key: Rekey() of the Noise specification, the nonce going on.
    expected = CipherState(KEY)
    for _ in range(3):
        expected.encrypt(b"", b"")
    expected.rekey()
    assert stream[60:80] == b"\x00\x12" + expected.encrypt(b"", b"3\x01")


@pytest.mark.parametrize(("size", "packets"), [(PACKET_DATA, 1), (BATCH_DATA, 2)])
def test_what_bulk_is_read_by_fills_ssh_packets_and_leaves_no_rest(size: int, packets: int) -> None:
    # A byte more would be one frame and one packet more, each time.
    assert len(writer().data(memoryview(bytes(size)))) == packets * PACKET
