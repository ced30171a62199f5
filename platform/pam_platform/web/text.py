"""Recorded text made safe to look at.

What a session recorded was typed by someone who may want to attack whoever reviews it: markup for a
browser, escape codes for a terminal the page is copied into, bidirectional overrides that make a
statement read as another one. Everything is escaped, and every character that is not itself visible
is shown by its code, marked so that it cannot be mistaken for typed text.
"""

from __future__ import annotations

import unicodedata
from itertools import groupby

from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString

# Control, format (bidi, zero width), surrogate, private use, line and paragraph separators.
_HIDDEN = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))
# A statement may be a megabyte; a page shows its beginning and says so.
MAX_SHOWN = 8192


def is_hidden(char: str) -> bool:
    """Whether a character would not show as itself. Newline and tab do, in preformatted text."""
    return char not in "\n\t" and unicodedata.category(char) in _HIDDEN


def code_of(char: str) -> str:
    """How a hidden character is written: ``\\x1b``, ``\\u202e``, ``\\U000e0001``."""
    number = ord(char)
    if number < 0x100:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def plain(text: str) -> str:
    """The text with hidden characters written as codes, newline and tab too: for one line."""
    return "".join(code_of(char) if is_hidden(char) or char in "\n\t" else char for char in text)


def visible(value: object, limit: int = MAX_SHOWN) -> SafeString:
    """HTML of the text: escaped, hidden characters as marked codes, cut at ``limit`` characters."""
    text = str(value)
    pieces = (_run(hidden, list(chars)) for hidden, chars in groupby(text[:limit], is_hidden))
    html = format_html_join("", "{}", ((piece,) for piece in pieces))
    if len(text) > limit:
        return format_html('{}<span class="ctl"> … {} more characters</span>', html, len(text) - limit)
    return html


def _run(hidden: bool, chars: list[str]) -> str | SafeString:
    if not hidden:
        return "".join(chars)
    return format_html('<span class="ctl">{}</span>', "".join(map(code_of, chars)))
