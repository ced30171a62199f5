"""A terminal: its output as text, and of its input what the terminal showed.

What a person types is sent before anything shows whether the terminal echoes it. So its length is recorded at
once, and its text only when the output that follows repeats it: character by character, with nothing else
printed in between, up to the key that ends it (Enter, Tab, an arrow). A password prompt prints nothing, so a
password's characters are never found. What this costs: where a program redraws while one types (an editor, a
shell's suggestions, output of a job in the background), only lengths are recorded. The screen itself is in
the output either way. What it cannot see: a password typed while the echo was still on, which is on the
screen, too.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from typing import Any, Final

#: Characters of one line that wait for their echo; beyond it only the length is recorded.
MAX_TYPED: Final = 4096

#: Sequences that move or colour but print nothing: CSI, OSC, and the two-character ones.
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[ -/]*[0-~])")
#: One of those that the end of a piece cut off; its rest comes with the next one.
_CUT = re.compile(r"\x1b(?:\[[0-?]*[ -/]*|\][^\x07\x1b]*\x1b?|[ -/]*)?\Z")
_LONGEST_CUT: Final = 256


class Terminal:
    """Both directions of one terminal. Texts out of bytes; no bytes are kept back that others must see."""

    def __init__(self) -> None:
        self._output = codecs.getincrementaldecoder("utf-8")("replace")
        self._input = codecs.getincrementaldecoder("utf-8")("replace")
        self._typed = ""  # since the last key that ended a run
        self._sealed: str | None = None  # a run that is complete, waiting for the rest of its echo
        self._shown = ""  # printed since the first character of the run was typed
        self._cut = ""
        self._found: list[str] = []  # runs that were shown, to be told with the next batch

    def typed(self, data: bytes) -> dict[str, Any]:
        """Input went by: what can be said of it at once."""
        for char in self._input.decode(data):
            self._type(char)
        return {"bytes": len(data)}

    def _type(self, char: str) -> None:
        if char.isprintable():
            if not self._typed and self._sealed is None:
                self._shown = ""
            if self._sealed is not None:
                # Typed ahead, while the run before it is not shown yet: whose echo comes cannot be told.
                self._sealed = None
                self._shown = ""
            self._typed = (self._typed + char) if len(self._typed) < MAX_TYPED else ""
        else:
            if self._typed and self._shown == self._typed:
                self._found.append(self._typed)  # all of it is on the screen before the key that ends it
            elif self._typed:
                self._sealed = self._typed
            self._typed = ""

    def printed(self, data: bytes) -> tuple[str, Sequence[str]]:
        """Output went by: its text, and what was typed and is now known to have been shown."""
        text = self._output.decode(data)
        if self._typed or self._sealed is not None:
            self._show(text)
        found, self._found = [*self._found, *self._echoed()], []
        return text, found

    def _show(self, text: str) -> None:
        text, self._cut = self._cut + text, ""
        cut = _CUT.search(text[-_LONGEST_CUT:])
        if cut is not None and cut.group():
            self._cut = cut.group()
            text = text[: len(text) - len(self._cut)]
        if len(self._shown) <= 2 * MAX_TYPED:
            self._shown += _ESCAPES.sub("", text)

    def _echoed(self) -> Sequence[str]:
        run = self._sealed
        if run is None:
            return ()
        if len(self._shown) < len(run) and run.startswith(self._shown):
            return ()  # the rest of its echo may still come
        self._sealed = None
        shown, self._shown = self._shown, ""
        # Whatever follows it, the run itself was printed, and nothing before it.
        return (run,) if shown.startswith(run) and _ends_there(shown[len(run) :]) else ()


def _ends_there(rest: str) -> bool:
    """Whether the echo ends where the run does: nothing printed behind it, or a key's own effect."""
    return not rest or not rest[0].isprintable()
