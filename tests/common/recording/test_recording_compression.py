"""The writer's zlib stream: one for every reader, whether or not the compressor was dropped in between."""

from __future__ import annotations

import zlib

from hypothesis import given
from hypothesis import strategies as st

from pam_common.recording.writer import _LEVEL, _MEMORY_LEVEL, _WINDOW_BITS, _ZlibStream

BATCHES = st.lists(st.binary(max_size=300).map(lambda data: data * 50) | st.binary(max_size=300), max_size=8)


@given(BATCHES)
def test_without_rests_it_is_what_zlib_writes(batches: list[bytes]) -> None:
    theirs = zlib.compressobj(_LEVEL, zlib.DEFLATED, _WINDOW_BITS, _MEMORY_LEVEL)
    ours = _ZlibStream()
    for batch in batches:
        assert ours.batch(batch) == theirs.compress(batch) + theirs.flush(zlib.Z_SYNC_FLUSH)
    assert ours.end() == theirs.flush(zlib.Z_FINISH)


@given(BATCHES, st.sets(st.integers(0, 8)))
def test_with_rests_it_is_one_stream_all_the_same(batches: list[bytes], rests: set[int]) -> None:
    ours, reader = _ZlibStream(), zlib.decompressobj(15)
    for number, batch in enumerate(batches):
        if number in rests:
            ours.rest()
        assert reader.decompress(ours.batch(batch)) == batch  # the flush makes each batch readable at once
    if len(batches) in rests:
        ours.rest()
    assert reader.decompress(ours.end()) == b""
    assert reader.eof
    assert not reader.unused_data
