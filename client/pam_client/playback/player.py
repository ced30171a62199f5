"""Frames on this terminal at their times.

The recording's clock runs ``speed`` times as fast as ours and stops while paused. Going back means from the
beginning, silently, up to the moment: what a screen shows is the sum of all that was written to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Protocol

from pam_client.playback.frames import Frame
from pam_common.terminal import RESET, Neutraliser

#: Seconds that an arrow key goes back or forth.
STEP = 10.0
#: The arrow keys for speed double and halve between these.
SLOWEST, FASTEST = 1 / 16, 256.0
#: To the last row and one further: to reset the margins moves the cursor to the top, onto what was shown.
_BELOW = "\x1b[999;1H\r\n"
HELP = "space pauses, left and right seek, up and down change the speed, q ends"


class KeySource(Protocol):
    """Where keys come from: :class:`pam_client.playback.keys.Keys`."""

    def wait(self, seconds: float | None) -> str: ...


class _Stopped(Exception):  # noqa: N818  # not an error: the person has seen enough
    pass


class Player:
    """Plays what ``source()`` gives, which is asked again for going back."""

    def __init__(
        self,
        source: Callable[[], Iterator[Frame]],
        write: Callable[[str], None],
        keys: KeySource,
        *,
        speed: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source = source
        self._write = write
        self._keys = keys
        self._speed = speed
        self._clock = clock
        self._moment = 0.0  # of the recording

    def play(self) -> None:
        """To the end, or until ``q``; the terminal is left in order."""
        try:
            while self._play_from_start():
                self._write(RESET + "\x1b[H\x1b[2J")
        except _Stopped:
            pass
        finally:
            self._write(RESET + _BELOW)

    def _play_from_start(self) -> bool:
        """Show everything up to the moment at once and the rest in time; True to go back."""
        screen = Neutraliser()
        for frame in self._source():
            if frame.at > self._moment and self._wait_for(frame.at):
                return True
            if frame.kind == "o":
                self._write(screen.feed(frame.data))
        return False

    def _wait_for(self, at: float) -> bool:
        """Wait until the recording's clock shows ``at``; True when it was set back before that."""
        while self._moment < at:
            started, moment = self._clock(), self._moment
            key = self._keys.wait((at - moment) / self._speed)
            self._moment = min(at, moment + (self._clock() - started) * self._speed) if key else at
            if key == " ":
                key = self._pause()
            if self._press(key):
                return True
        return False

    def _pause(self) -> str:
        """Wait for the next key; a second space just goes on."""
        key = self._keys.wait(None)
        return "" if key == " " else key

    def _press(self, key: str) -> bool:
        match key:
            case "q":
                raise _Stopped
            case "right":
                self._moment += STEP
            case "left":
                self._moment = max(0.0, self._moment - STEP)
                return True
            case "up":
                self._speed = min(FASTEST, self._speed * 2)
            case "down":
                self._speed = max(SLOWEST, self._speed / 2)
        return False
