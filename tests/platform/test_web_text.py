"""Recorded text cannot attack the reviewer's browser or terminal (abuse case 22)."""

import html
import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pam_platform.web.text import MAX_SHOWN, plain, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("select 1", "select 1"),
        ("a\nb\tc", "a\nb\tc"),
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ("\x1b[2J", '<span class="ctl">\\x1b</span>[2J'),
        ("a\x00\x9bb", 'a<span class="ctl">\\x00\\x9b</span>b'),
        ("x\u202ey", 'x<span class="ctl">\\u202e</span>y'),
        ("x\u200by", 'x<span class="ctl">\\u200b</span>y'),
        ("\U000e0041", '<span class="ctl">\\U000e0041</span>'),
        ("größe ✓ 漢字", "größe ✓ 漢字"),
    ],
)
def test_visible(text, shown):
    assert visible(text) == shown


def test_a_typed_backslash_code_is_not_taken_for_a_hidden_character():
    assert visible(r"\x1b") == r"\x1b"


def test_long_text_is_cut_and_says_so():
    assert "… 5 more characters" in visible("x" * (MAX_SHOWN + 5))


@given(st.text())
def test_nothing_hidden_comes_through(text):
    for shown in (visible(text), plain(text)):
        assert not [
            c for c in shown if c not in "\n\t" and unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp")
        ]


@given(st.text(alphabet=st.characters(categories=("L", "N", "P", "S", "Zs"))))
def test_visible_text_survives(text):
    assert html.unescape(visible(text)) == text
    assert not re.search(r"<(?!span class=\"ctl\"|/span)", visible(text))
