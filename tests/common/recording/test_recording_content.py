"""What is written can be read: by the product's reader and by one that shares no code with it."""

from __future__ import annotations

import importlib.util
import io
import json
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nacl.public import PrivateKey

from pam_common.keys import key_id
from pam_common.recording import PartReader, Recipient, RecordingError
from pam_common.recording.format import MAX_EVENT, MAX_PLAIN
from pam_common.recording.writer import encode_event

KINDS = st.from_regex(r"[a-z][a-z0-9_]{0,31}", fullmatch=True)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
EVENTS = st.builds(
    lambda kind, fields: {**fields, "kind": kind},
    KINDS,
    st.dictionaries(st.text(min_size=1).filter(lambda key: key not in ("t", "c")), VALUES, max_size=4),
)
BATCHES = st.lists(st.lists(EVENTS, min_size=1, max_size=4), max_size=6)


@pytest.fixture(scope="module")
def second() -> ModuleType:
    path = Path(__file__).with_name("independent_reader.py")
    assert "pam_common" not in path.read_text()
    spec = importlib.util.spec_from_file_location("independent_reader", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stamped(batches: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [{"t": n, "c": 1, **event} for n, batch in enumerate(batches) for event in batch]


@given(batches=BATCHES, end=st.sampled_from(["closed", "session expired – é", "crash", "failed"]))
@settings(max_examples=60, deadline=None)
def test_both_readers_give_what_was_written(parties, second, batches, end) -> None:
    data = parties.part(batches, end)
    assert parties.verify(data).problems == []
    assert parties.verify(data).end == end
    assert parties.read(data) == stamped(batches)
    header, events, stated = second.read(data, parties.private, parties.identity.public)
    assert events == stamped(batches)
    assert (header["session"], header["part"], stated) == (parties.session, 1, end)


def test_a_large_batch_is_split_over_chunks(parties, second) -> None:
    noise = random.Random(1).randbytes(400_000).hex()
    data = parties.part([[{"kind": "rows", "text": noise}]])
    report = parties.verify(data)
    assert report.ok
    assert report.chunks >= 400_000 // MAX_PLAIN
    assert parties.read(data)[0]["text"] == noise
    assert second.read(data, parties.private, parties.identity.public)[1][0]["text"] == noise


def test_every_recipient_can_read_and_nobody_else(parties) -> None:
    other, stranger = PrivateKey.generate(), PrivateKey.generate()
    public = bytes(other.public_key)
    both = [parties.recipient, Recipient(key_id(public), public)]
    data = parties.part([[{"kind": "a"}]], recipients=both)
    for private in (parties.private, bytes(other)):
        assert len(list(PartReader(io.BytesIO(data), [bytes(stranger), private]).events())) == 1
    with pytest.raises(RecordingError, match="not sealed to any"):
        PartReader(io.BytesIO(data), [bytes(stranger)])


def test_a_recipient_key_that_seals_nothing_is_refused(parties) -> None:
    weak = Recipient(key_id(bytes(32)), bytes(32))
    with pytest.raises(RecordingError, match="not usable"):
        parties.writer(recipients=[parties.recipient, weak])


@given(text=st.text(st.characters(codec=None)))
def test_a_line_is_printable_ascii_whatever_it_records(text: str) -> None:
    # Escape codes in a recording must not reach the terminal of who looks at the NDJSON.
    line = encode_event(0.5, 1, {"kind": "out", "text": text + "\x1b[2J\x9b\r\n"})
    assert line.endswith(b"\n")
    assert all(0x20 <= byte < 0x7F for byte in line[:-1])
    assert json.loads(line)["text"] == text + "\x1b[2J\x9b\r\n"


@given(event=EVENTS, seconds=st.floats(0, 1e9))
def test_a_line_is_what_the_documented_encoder_makes(event: dict[str, Any], seconds: float) -> None:
    """The C encoder is used without the class around it, which no document promises to work."""
    whole = {"t": round(seconds, 6), "c": 7, **event}
    expected = json.dumps(whole, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    assert encode_event(seconds, 7, event) == expected.encode("ascii") + b"\n"


def test_an_event_within_itself_is_refused() -> None:
    event: dict[str, Any] = {"kind": "a"}
    event["x"] = [event]
    with pytest.raises(RecordingError, match="not JSON"):
        encode_event(0, 1, event)


@pytest.mark.parametrize(
    "event",
    [
        {},
        {"kind": "Upper"},
        {"kind": "x" * 33},
        {"kind": "a", "t": 3},
        {"kind": "a", "c": 1},
        {"kind": "a", "x": b"bytes"},
        {"kind": "a", "x": float("nan")},
        {"kind": "a", "x": [float("inf")]},
        {"kind": "a", "x": "y" * MAX_EVENT},
    ],
)
def test_what_the_format_cannot_hold_is_refused_and_the_part_goes_on(parties, event) -> None:
    writer = parties.writer()
    with pytest.raises(RecordingError) as caught:
        writer.append(1, 1, [{"kind": "first"}, event])
    assert "yyyy" not in str(caught.value)
    data = writer.opening + writer.append(2, 1, [{"kind": "second"}]) + writer.finish()
    data += parties.trailer(writer, "closed")
    assert parties.verify(data).ok
    assert parties.read(data) == [{"t": 2, "c": 1, "kind": "second"}]


def test_the_longest_event_fits(parties) -> None:
    size = MAX_EVENT - len(encode_event(0, 1, {"kind": "a", "x": ""}))
    assert len(parties.read(parties.part([[{"kind": "a", "x": "y" * size}]]))[0]["x"]) == size


def test_an_abrupt_end_and_a_final_chunk_exclude_each_other(parties) -> None:
    writer = parties.writer()
    with pytest.raises(RecordingError):
        writer.head(0, "closed")
    writer.finish()
    with pytest.raises(RecordingError):
        writer.head(0, "crash")
    with pytest.raises(RecordingError):
        writer.append(0, 1, [{"kind": "late"}])


def test_nothing_secret_in_the_representation(parties) -> None:
    assert repr(parties.writer()) == f"<PartWriter {parties.session}.1 chunks=0>"
