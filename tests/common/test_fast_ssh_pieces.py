"""What was received and not read yet: the same bytes, in little more memory."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pam_common.fast_ssh.pieces import SMALL, Pieces


@given(
    st.lists(st.one_of(st.binary(max_size=9), st.integers(1, 3 * SMALL).map(bytes), st.integers(0, SMALL)))
)
def test_what_is_kept_is_taken_in_order(steps: list[bytes | int]) -> None:
    """Bytes are kept, a number is how many are taken."""
    pieces, expected = Pieces(), b""
    for step in steps:
        if isinstance(step, bytes):
            pieces.keep(memoryview(step))
            expected += step
        else:
            assert pieces.take(step) == expected[:step]
            expected = expected[step:]
        assert pieces.size == len(expected)
    assert b"".join(iter(pieces.next, None)) == expected
    assert not pieces


def test_what_is_kept_is_a_copy() -> None:
    pieces, memory = Pieces(), bytearray(b"first")
    pieces.keep(memoryview(memory))
    memory[:] = b"other"
    pieces.keep(memoryview(memory))
    memory[:] = bytes(5)
    assert pieces.take(100) == b"firstother"


def test_small_pieces_are_put_together() -> None:
    pieces = Pieces()
    for _ in range(10 * SMALL):
        pieces.keep(memoryview(b"x"))
    assert pieces.count == 10


def test_a_whole_piece_is_given_out_without_a_copy() -> None:
    pieces = Pieces()
    pieces.keep(memoryview(bytes(SMALL)))
    kept = pieces._pieces[0]
    assert pieces.take(SMALL) is kept


def test_the_rest_of_a_large_piece_is_not_copied_each_time() -> None:
    pieces = Pieces()
    pieces.keep(memoryview(bytes(100 * SMALL)))
    pieces.take(1)
    rest = pieces._pieces[0]
    assert isinstance(rest, memoryview)
    pieces.take(1)
    assert isinstance(pieces._pieces[0], memoryview)
    assert pieces._pieces[0].obj is rest.obj


def test_what_is_cleared_is_gone() -> None:
    pieces = Pieces()
    pieces.keep(memoryview(b"x"))
    pieces.clear()
    assert (pieces.size, pieces.take(1), pieces.next()) == (0, b"", None)
