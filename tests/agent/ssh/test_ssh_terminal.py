"""What of a terminal's input is recorded as text, and what only as a length."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pam_agent.protocols.ssh.terminal import MAX_TYPED, Terminal


def play(*steps: tuple[str, str]) -> list[str]:
    """``steps`` are (">", typed) and ("<", printed); what was found to be shown."""
    terminal, found = Terminal(), list[str]()
    for way, text in steps:
        if way == ">":
            assert terminal.typed(text.encode()) == {"bytes": len(text.encode())}
        else:
            printed, echoed = terminal.printed(text.encode())
            assert printed == text
            found += echoed
    return found


def typing(word: str) -> list[tuple[str, str]]:
    return [step for char in word for step in ((">", char), ("<", char))]


def test_an_echoed_line_is_text() -> None:
    assert play(*typing("ls -l"), (">", "\r"), ("<", "\r\ntotal 0\r\n")) == ["ls -l"]


def test_an_echo_that_comes_late_is_text() -> None:
    assert play((">", "ls -l\r"), ("<", "ls"), ("<", " -l\r\n")) == ["ls -l"]


def test_a_password_is_a_length_only() -> None:
    assert play(("<", "Password: "), (">", "hunter2\r"), ("<", "\r\n"), ("<", "hunter2 is wrong\r\n")) == []
    assert play(*[(">", char) for char in "hunter2"], (">", "\r"), ("<", "\r\nSorry.\r\nPassword: ")) == []


def test_stars_for_a_password_are_not_its_echo() -> None:
    steps = [step for char in "hunter2" for step in ((">", char), ("<", "*"))]
    assert play(*steps, (">", "\r"), ("<", "\r\n")) == []


def test_a_password_after_an_echoed_line_is_a_length_only() -> None:
    steps = [*typing("sudo ls"), (">", "\r"), ("<", "\r\n[sudo] password for me: ")]
    assert play(*steps, (">", "hunter2"), (">", "\r"), ("<", "\r\nfile\r\n")) == ["sudo ls"]


def test_colours_around_an_echo_are_ignored_even_when_cut() -> None:
    steps = [(">", "ls\r"), ("<", "\x1b[1"), ("<", "mls\x1b[0m\r\n")]
    assert play(*steps) == ["ls"]


@pytest.mark.parametrize("printed", ["lsx\r\n", "$ ls\r\n", "l\r\ns\r\n"])
def test_what_is_not_exactly_the_echo_is_a_length_only(printed) -> None:
    assert play((">", "ls\r"), ("<", printed)) == []


def test_typing_ahead_is_a_length_only() -> None:
    assert play((">", "one\rtwo\r"), ("<", "one\r\ntwo\r\n")) == []


def test_an_endless_line_is_not_kept() -> None:
    terminal = Terminal()
    for _ in range(100):
        terminal.typed(b"x" * MAX_TYPED)
        terminal.printed(b"x" * MAX_TYPED)
    assert len(terminal._typed) <= MAX_TYPED
    assert len(terminal._shown) <= 4 * MAX_TYPED


def test_a_character_in_two_pieces_is_one() -> None:
    terminal = Terminal()
    assert terminal.printed("ü".encode()[:1])[0] == ""
    assert terminal.printed("ü".encode()[1:])[0] == "ü"


@settings(deadline=None)
@given(
    st.text(st.characters(min_codepoint=97, max_codepoint=122), min_size=4, max_size=12),
    st.lists(st.sampled_from(["\r\n", "Sorry\r\n", "\x1b[0m", "$ ", "*", ""]), max_size=6),
    st.integers(0, 12),
)
def test_a_secret_that_is_never_printed_is_never_text(secret, output, cut) -> None:
    steps = [(">", secret[:cut]), (">", secret[cut:] + "\r")]
    found = play(*steps, *[("<", text) for text in output])
    assert secret not in found
