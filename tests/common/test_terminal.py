"""What a recorded program wrote must not act on the terminal of whoever looks at it."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pam_common.terminal import (
    MAX_LINE,
    MAX_NUMBER,
    MAX_PARAMETERS,
    MAX_STRING,
    RESET,
    Neutraliser,
    PlainText,
)

#: All that may ever come out.
SAFE = re.compile(
    "(?:[^\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
    "|[\n\r\t\b\x0e\x0f]"
    "|\x1b[78DEHM]|\x1b[()][0AB]"
    "|\x1b\\[[0-9;:]*[@ABCDEFGHIJKLMPSTXZ`abdefgmrsu]"
    "|\x1b\\[\\?[0-9]*[JK]"
    "|\x1b\\[\\??[0-9;]+[hl])*"
)
#: Pieces of which attacks are made, beside any text.
PIECES = st.lists(
    st.one_of(
        st.sampled_from(
            [
                *(
                    "\x1b",
                    "[",
                    "]",
                    "P",
                    "_",
                    "^",
                    "X",
                    "?",
                    ";",
                    "1",
                    "0",
                    "52",
                    "c",
                    "n",
                    "t",
                    "h",
                    "l",
                    "m",
                ),
                *("\x9b", "\x9d", "\x90", "\x9c", "\x07", "\x18", "\x1a", "\\", "!", " ", "$", "q", "\x05"),
                *("\x1b[", "\x1b]52;c;", "\x1bP", "\x1b[?1000h", "\x1b[6n", "\x1b[21t", "\x1bc", "\x1b(0"),
            ]
        ),
        st.text(max_size=5),
        st.characters(),
    ),
    max_size=40,
).map("".join)


def neutral(text: str) -> str:
    return Neutraliser().feed(text)


@given(PIECES)
def test_nothing_but_text_and_drawing_comes_out(text: str) -> None:
    assert SAFE.fullmatch(neutral(text))


@given(PIECES)
def test_what_is_safe_stays_as_it_is(text: str) -> None:
    once = neutral(text)
    assert neutral(once) == once


@given(PIECES, st.integers(0, 60))
def test_how_it_is_cut_makes_no_difference(text: str, at: int) -> None:
    whole, pieces = Neutraliser(), Neutraliser()
    assert whole.feed(text) == pieces.feed(text[:at]) + pieces.feed(text[at:])
    plain, cut = PlainText(), PlainText()
    assert [*plain.feed(text), plain.rest()] == [*cut.feed(text[:at]), *cut.feed(text[at:]), cut.rest()]


@given(PIECES)
def test_plain_text_has_no_controls(text: str) -> None:
    plain = PlainText()
    for line in [*plain.feed(text), plain.rest()]:
        assert all(char == "\t" or char >= " " for char in line)
        assert not any("\x7f" <= char <= "\x9f" for char in line)


@pytest.mark.parametrize(
    "attack",
    [
        "\x1b]0;title\x07",
        "\x1b]2;title\x1b\\",
        "\x1b]52;c;cm0gLXJmIH4=\x07",
        "\x9d52;c;cm0gLXJmIH4=\x9c",
        "\x1b]8;;file:///etc/passwd\x1b\\",
        "\x1b]1337;File=name=x:AAAA\x07",
        "\x1bP+q544e\x1b\\",
        "\x1bP$qm\x1b\\",
        "\x1b_Gf=100;AAAA\x1b\\",
        "\x1b^private\x1b\\",
        "\x1bXstring\x1b\\",
        "\x1b[6n",
        "\x1b[?6n",
        "\x1b[c",
        "\x1b[>c",
        "\x1b[=c",
        "\x1b[0c",
        "\x9bc",
        "\x1b[x",
        "\x1b[21t",
        "\x1b[20t",
        "\x1b[8;1;1t",
        "\x1b[5i",
        "\x1b[?5i",
        "\x1b[?1000h",
        "\x1b[?1006;2004h",
        "\x1b[?2004h",
        "\x1b[?9999h",
        "\x1b[20h",
        "\x1b[>4;2m",
        "\x1b[>1u",
        "\x1b[?1u",
        "\x1b[3J",
        "\x1b[1;2;3;4;5T",
        "\x1b[!p",
        "\x1b[2 q",
        '\x1b[61"p',
        "\x1b[1$r",
        "\x1bZ",
        "\x1b=",
        "\x1b>",
        "\x1b%G",
        "\x1b#8",
        "\x1b*0",
        "\x05",
        "\x07",
        "\x7f",
        "\x00",
        "\x85",
        "\u202e",
        "\u2066",
    ],
)
def test_what_acts_is_dropped_and_what_follows_is_not(attack: str) -> None:
    assert neutral(f"a{attack}b") == "ab"


@pytest.mark.parametrize(
    "drawing",
    [
        "\x1b[1;31mred\x1b[0m",
        "\x1b[38;2;1;2;3m\x1b[38:5:196m",
        "\x1b[2J\x1b[H\x1b[10;20H\x1b[K",
        "\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[4h",
        "\x1b[1;24r\x1b7\x1b8\x1bM\x1bD",
        "\x1b(0lqqk\x1b(B\x0e\x0f",
        "naïve 世界 👩\u200d💻\r\n\ttab\b",
        RESET,
    ],
)
def test_what_draws_stays(drawing: str) -> None:
    assert neutral(drawing) == drawing


def test_of_mixed_modes_the_harmless_stay() -> None:
    assert neutral("\x1b[?1;25;1000h") == "\x1b[?25h"
    assert neutral("\x1bc") == "\x1b[m\x1b[r\x1b[H\x1b[2J"
    assert neutral("\x9b31m") == "\x1b[31m"


def test_a_string_that_never_ends_hides_nothing_for_long() -> None:
    text = neutral("\x1b]0;" + "x" * MAX_STRING + "shown")
    assert text.endswith("shown")
    assert neutral("\x1b]0;" + "x" * 1000 + "\x18shown") == "shown"


def test_numbers_and_parameters_are_bounded() -> None:
    assert neutral(f"\x1b[{MAX_NUMBER}C") == f"\x1b[{MAX_NUMBER}C"
    assert neutral(f"\x1b[{MAX_NUMBER + 1}C") == ""
    assert neutral("\x1b[" + "1;" * (MAX_PARAMETERS // 2) + "m") != ""
    assert neutral("\x1b[" + "1;" * (MAX_PARAMETERS // 2) + "1mx") == "x"


@pytest.mark.parametrize(
    ("written", "lines"),
    [
        ("a\r\nb\n", ["a", "b", ""]),
        ("$ lz\b\x1b[Ks\r\n", ["$ ls", ""]),
        ("50%\r100%\r\n", ["100%", ""]),
        ("abc\x1b[2D\x1b[PX", ["aX"]),
        ("abcdef\x1b[3GX\x1b[CY\x1b[0K", ["abXdY"]),
        ("\x1b]0;t\x07\x1b[32muser\x1b[0m$ ", ["user$"]),
        ("a\x1b[99999Cb", ["ab"]),
    ],
)
def test_plain_text_is_what_was_to_be_seen(written: str, lines: list[str]) -> None:
    plain = PlainText()
    assert [*plain.feed(written), plain.rest()] == lines


def test_a_line_is_bounded() -> None:
    plain = PlainText()
    lines = [line for _ in range(100) for line in plain.feed("x" * 1000)]
    assert lines
    assert all(len(line) <= MAX_LINE for line in lines)
    assert plain.rest()
    lines = [*plain.feed("y" * (3 * MAX_LINE)), plain.rest()]
    assert [len(line) for line in lines] == [MAX_LINE] * 3
