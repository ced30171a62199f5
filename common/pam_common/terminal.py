"""What programs wrote to a terminal, made safe for another one, or plain.

A recording may hold whatever its user let a program print, so it may be meant for whoever reviews it: a
terminal obeys title changes and clipboard writes (OSC), uploads and downloads (DCS), and answers questions
by typing into its own input (DSR, DA). So nothing passes but printable text, the few controls that move the
cursor, and an allow-list of sequences that draw. Everything else is dropped, whole.

    GROUND ──ESC──▶ ESCAPE ──[──▶ CSI ──final──▶ GROUND
                       └──] P X ^ _──▶ STRING ──BEL, ST──▶ GROUND

ECMA-48 (https://ecma-international.org/publications-and-standards/standards/ecma-48/) and
https://invisible-island.net/xterm/ctlseqs/ctlseqs.html; 8-bit controls (U+0080–U+009F) are taken as the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import Literal

#: Parameters of one CSI sequence: thirty-two numbers. A longer one is none that draws.
MAX_PARAMETERS = 160
#: A clipboard's or an image's worth; a string that never ends must not hide all that follows it.
MAX_STRING = 64 << 10
#: Larger than any terminal: the number of columns, rows or repetitions in one sequence.
MAX_NUMBER = 9999
#: Longest line of plain text; a program that never ends one gets it ended.
MAX_LINE = 8192

#: What a terminal shows as it is: no controls, no marks that turn the reading direction, no surrogates.
_RUN = re.compile("[^\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]+")
#: These move the cursor, and shift between the two character sets.
_CONTROLS = "\n\r\t\b\x0e\x0f"
_STRINGS = frozenset("]PX^_")
_STRINGS_8BIT = frozenset("\x90\x98\x9d\x9e\x9f")
_CSI = re.compile(r"([<=>?]?)([0-9;:]*)([ -/]*)")

#: Final characters that move, erase, insert, delete, scroll and colour.
_DRAWING = frozenset("@ABCDEFGHIJKLMPSTXZ`abdefgmrsu")
#: Modes that only draw: insert; and origin, wrapping, cursor shown, its blinking, the second screen.
_MODES = frozenset({"4"})
_PRIVATE_MODES = frozenset({"6", "7", "12", "25", "47", "1047", "1048", "1049"})
#: Save and restore the cursor, index, next line, tab stop, reverse index.
_SIMPLE = frozenset("78DEHM")
#: Line drawing, British and ASCII, as G0 or G1.
_CHARSETS = frozenset({"(0", "(A", "(B", ")0", ")A", ")B"})

#: Puts a terminal back in order after a recording that ended anywhere.
RESET = "\x1b[?1049l\x1b[r\x1b[m\x1b[4l\x1b[?6l\x1b[?7h\x1b[?25h\x1b(B\x0f"


class _State(Enum):
    GROUND = auto()
    ESCAPE = auto()
    CSI = auto()
    STRING = auto()
    STRING_ESCAPE = auto()  # ESC within a string: its end, if a backslash follows


@dataclass(frozen=True)
class Token:
    """Text (with controls), or a sequence without its introducer."""

    kind: Literal["text", "csi", "escape"]
    text: str


class Scanner:
    """Splits output into tokens; it may come in pieces of any size."""

    def __init__(self) -> None:
        self._state = _State.GROUND
        self._held = ""
        self._length = 0

    def feed(self, text: str) -> Iterator[Token]:
        """The tokens that ``text`` completes."""
        position = 0
        while position < len(text):
            if self._state is _State.GROUND and (run := _RUN.match(text, position)):
                yield Token("text", run.group())
                position = run.end()
                continue
            token = self._step(text[position])
            if token is not None:
                yield token
            position += 1

    def _step(self, char: str) -> Token | None:
        if char in "\x18\x1a":  # CAN and SUB end whatever has begun
            self._state = _State.GROUND
            return None
        match self._state:
            case _State.GROUND:
                return self._ground(char)
            case _State.ESCAPE:
                return self._escape(char)
            case _State.CSI:
                return self._csi(char)
            case _State.STRING:
                self._string(char)
            case _State.STRING_ESCAPE:
                if char != "\\":
                    self._begin(_State.ESCAPE)
                    return self._escape(char)
                self._state = _State.GROUND
        return None

    def _begin(self, state: _State) -> None:
        self._state, self._held, self._length = state, "", 0

    def _ground(self, char: str) -> Token | None:
        if char in _CONTROLS:
            return Token("text", char)
        if char == "\x1b":
            self._begin(_State.ESCAPE)
        elif char == "\x9b":
            self._begin(_State.CSI)
        elif char in _STRINGS_8BIT:
            self._begin(_State.STRING)
        return None

    def _escape(self, char: str) -> Token | None:
        if char == "[" and not self._held:
            self._begin(_State.CSI)
        elif char in _STRINGS and not self._held:
            self._begin(_State.STRING)
        elif char == "\x1b":
            self._begin(_State.ESCAPE)
        elif " " <= char <= "/" and len(self._held) < 2:
            self._held += char
        else:
            self._state = _State.GROUND
            if "0" <= char <= "~":
                return Token("escape", self._held + char)
        return None

    def _csi(self, char: str) -> Token | None:
        if " " <= char <= "?":
            # One character more than allowed is kept: it tells that there were too many.
            self._held += char if len(self._held) <= MAX_PARAMETERS else ""
        elif char == "\x1b":
            self._begin(_State.ESCAPE)
        elif "@" <= char <= "~":
            self._state = _State.GROUND
            return Token("csi", self._held + char) if len(self._held) <= MAX_PARAMETERS else None
        elif char > "\x7f":
            self._state = _State.GROUND
        return None

    def _string(self, char: str) -> None:
        self._length += 1
        if char == "\x1b":
            self._state = _State.STRING_ESCAPE
        elif char in "\x07\x9c" or self._length >= MAX_STRING:
            self._state = _State.GROUND


class Neutraliser:
    """Output that only draws: ``feed`` recorded text, write what it returns."""

    def __init__(self) -> None:
        self._scanner = Scanner()

    def feed(self, text: str) -> str:
        """What of ``text`` (and of a sequence it completes) is safe."""
        return "".join(map(_neutral, self._scanner.feed(text)))


class PlainText:
    """Output as lines of text, as a person saw them scroll by: corrections applied, drawing left out."""

    def __init__(self) -> None:
        self._scanner = Scanner()
        self._line: list[str] = []
        self._column = 0

    def feed(self, text: str) -> list[str]:
        """The lines that ``text`` completes."""
        found: list[str] = []
        for token in self._scanner.feed(text):
            if token.kind == "csi":
                self._edit(token.text)
            elif token.kind == "text":
                for start in range(0, len(token.text), MAX_LINE):
                    found += self._write(token.text[start : start + MAX_LINE])
        return found

    def rest(self) -> str:
        """The line that is not complete yet; it is begun anew."""
        line = "".join(self._line).rstrip()
        self._line, self._column = [], 0
        return line

    def _write(self, text: str) -> Iterator[str]:
        if text == "\r":
            self._column = 0
        elif text == "\b":
            self._column = max(0, self._column - 1)
        elif text == "\n" or self._column + len(text) > MAX_LINE:
            yield self.rest()
        if text not in ("\r", "\b", "\n", "\x0e", "\x0f"):
            self._line[self._column : self._column + len(text)] = text
            self._column += len(text)

    def _edit(self, sequence: str) -> None:
        """Erasing to the line's end, and moving within it: what a shell's line editor does."""
        number = int(sequence[:-1]) if sequence[:-1].isascii() and sequence[:-1].isdecimal() else None
        if sequence == "K" or sequence == "0K":
            del self._line[self._column :]
        elif sequence[-1] in "CDGP" and (number is not None or len(sequence) == 1):
            count = min(number or 1, MAX_LINE)
            match sequence[-1]:
                case "C":
                    self._column = min(self._column + count, len(self._line))
                case "D":
                    self._column = max(0, self._column - count)
                case "G":
                    self._column = min(count - 1, len(self._line))
                case "P":
                    del self._line[self._column : self._column + count]


def _neutral(token: Token) -> str:
    if token.kind == "text":
        return token.text
    if token.kind == "csi":
        return _neutral_csi(token.text)
    if token.text in _SIMPLE or token.text in _CHARSETS:
        return f"\x1b{token.text}"
    # A full reset would take the reviewer's own settings with it: what it draws is an empty screen.
    return "\x1b[m\x1b[r\x1b[H\x1b[2J" if token.text == "c" else ""


def _neutral_csi(sequence: str) -> str:
    body, final = sequence[:-1], sequence[-1]
    found = _CSI.fullmatch(body)
    if found is None or found[3]:
        return ""
    private, parameters = found[1], found[2]
    numbers = re.split("[;:]", parameters) if parameters else []
    if any(len(number) > 4 for number in numbers):
        return ""
    if final in "hl":
        return _neutral_mode(private, parameters, final)
    if private == "?" and final in "JK":
        return f"\x1b[?{parameters}{final}"
    if private or final not in _DRAWING:
        return ""
    # Not the reviewer's own scrolled lines (3 J), and no mouse highlighting (T with five numbers).
    if (final == "J" and parameters == "3") or (final == "T" and len(numbers) > 1):
        return ""
    return f"\x1b[{parameters}{final}"


def _neutral_mode(private: str, parameters: str, final: str) -> str:
    allowed = {"": _MODES, "?": _PRIVATE_MODES}.get(private, frozenset())
    kept = [number for number in parameters.split(";") if number in allowed]
    return f"\x1b[{private}{';'.join(kept)}{final}" if kept else ""
