"""The reader against hostile files: bombs, endless lines, broken streams (abuse class 21)."""

from __future__ import annotations

import io
import json
import time
import tracemalloc
import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pam_common.recording import PartReader, RecordingError
from pam_common.recording.format import MAX_EVENT, Header, canonical
from pam_common.recording.reader import MAX_TOTAL

MESSAGE, FINAL = 0, 3
LINE = b'{"t":1,"c":1,"kind":"a"}\n'


def deflate(plain: bytes) -> bytes:
    return zlib.compress(plain, 9)


def until_it_breaks(reader: PartReader) -> tuple[list[dict[str, Any]], str]:
    """The events before the error, and its message."""
    events = []
    try:
        for event in reader.events():
            events.append(event)
    except RecordingError as error:
        return events, str(error)
    return events, ""


def test_an_endless_line_is_refused_in_bounded_memory(parties) -> None:
    data = parties.forge([(deflate(b" " * (50 << 20)), FINAL)])
    assert len(data) < 65536
    tracemalloc.start()
    with pytest.raises(RecordingError, match="longer than"):
        parties.read(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * MAX_EVENT


def test_a_line_in_many_small_chunks_takes_linear_time(parties) -> None:
    compressor = zlib.compressobj(0)
    pieces = [compressor.compress(b" " * 30) + compressor.flush(zlib.Z_SYNC_FLUSH) for _ in range(30_000)]
    reader = PartReader(io.BytesIO(parties.part([])), [parties.private])
    start = time.thread_time()
    for piece in pieces:  # as the chunks hold them
        assert list(reader._lines(piece)) == []
    assert time.thread_time() - start < 2  # 0.1 s; copying the line for each took 5 s


def test_endless_short_lines_stop_where_the_caller_says(parties) -> None:
    data = parties.forge([(deflate(LINE * 200_000), FINAL)])
    events, error = until_it_breaks(PartReader(io.BytesIO(data), [parties.private], max_bytes=1 << 20))
    assert "told to take" in error
    assert 0 < len(events) <= (1 << 20) // len(LINE)


def test_who_says_nothing_is_told_no_more_than_the_documented_total(parties) -> None:
    reader = PartReader(io.BytesIO(parties.forge([(deflate(LINE * 10), FINAL)])), [parties.private])
    assert reader._left == MAX_TOTAL
    reader._left = 5 * len(LINE)  # as if the rest of it had been read
    events, error = until_it_breaks(reader)
    assert "told to take" in error
    assert len(events) <= 5


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"[]\n",
        b'{"t":1,"c":1}\n',
        b'{"t":-1,"c":1,"kind":"a"}\n',
        b'{"t":NaN,"c":1,"kind":"a"}\n',
        b'{"t":1e999,"c":1,"kind":"a"}\n',
        b'{"t":true,"c":1,"kind":"a"}\n',
        b'{"t":1,"c":"1","kind":"a"}\n',
        b'{"t":1,"c":1,"kind":"\xc3\xa9"}\n',
        b'{"t":' + b"9" * 5000 + b',"c":1,"kind":"a"}\n',
        b'{"t":1' + b"0" * 400 + b',"c":1,"kind":"a"}\n',
        b"[" * 200_000 + b"\n",
        b"x" * MAX_EVENT + b"\n",
    ],
)
def test_a_line_that_is_no_event_is_refused(parties, line: bytes) -> None:
    with pytest.raises(RecordingError):
        parties.read(parties.forge([(deflate(LINE + line), FINAL)]))


@pytest.mark.parametrize(
    ("plains", "message"),
    [
        ([(deflate(LINE), MESSAGE)], "stops before the end"),
        ([(deflate(LINE)[:-3], FINAL)], "stops before the end"),
        ([(deflate(LINE + b'{"t"'), FINAL)], "stops before the end"),
        ([], "stops before the end"),
        ([(deflate(LINE), FINAL), (b"", FINAL)], "after the final one"),
        ([(deflate(LINE) + b"x", FINAL)], "after the end of the compressed"),
        ([(deflate(LINE), MESSAGE), (deflate(LINE), FINAL)], "after the end of the compressed"),
        ([(deflate(LINE), 1)], "a tag that the format does not use"),
        ([(deflate(LINE), 2)], "a tag that the format does not use"),
        ([(b"no zlib", FINAL)], "does not decompress"),
    ],
)
def test_a_stream_that_breaks_its_rules_is_refused(parties, plains, message: str) -> None:
    with pytest.raises(RecordingError, match=message):
        parties.read(parties.forge(plains))


def test_a_crash_may_stop_anywhere_in_the_stream(parties) -> None:
    whole = deflate(LINE * 3)
    for size in range(len(whole)):
        events = parties.read(parties.forge([(whole[:size], MESSAGE)], "crash"))
        assert len(events) <= 3


@given(cut=st.integers(0, 5000))
@settings(max_examples=40, deadline=None)
def test_a_cut_file_gives_what_was_before_the_cut(parties, cut: int) -> None:
    writer = parties.writer()
    data, ends = writer.opening, []
    for second in range(8):
        data += writer.append(second, 1, [{"kind": "a", "x": "text " * second}])
        ends.append(len(data))
    cut = len(writer.opening) + cut % (len(data) - len(writer.opening) + 1)
    events, error = until_it_breaks(PartReader(io.BytesIO(data[:cut]), [parties.private]))
    assert error
    assert [event["t"] for event in events] == [n for n, end in enumerate(ends) if end <= cut]


def test_every_altered_byte_of_the_content_is_refused(parties) -> None:
    # Without looking at the signature: a chunk decrypts only behind exactly what it was written behind.
    data = parties.part([[{"kind": "a"}], [{"kind": "b"}]])
    for at in range(len(data)):
        altered = bytearray(data)
        altered[at] ^= 0x01
        try:
            events = parties.read(bytes(altered))
        except RecordingError:
            continue
        assert b'"signature":' in data[:at] or b'"time":' in data[:at] or b'"end":' in data[:at], at
        assert [event["kind"] for event in events] == ["a", "b"]


@given(data=st.binary(max_size=200))
def test_garbage_raises_a_recording_error_only(parties, data: bytes) -> None:
    for start in (b"", b"PAMREC1\n"):
        with pytest.raises(RecordingError):
            parties.read(start + data)


@pytest.mark.parametrize("version", [0, 2, True, 1.0, "1", None])
def test_a_header_of_another_version_is_refused(parties, version: object) -> None:
    fields = json.loads(parties.writer().opening[12:])
    with pytest.raises(RecordingError):
        Header.parse(canonical({**fields, "v": version}))
