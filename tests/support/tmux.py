"""A command in a real terminal (tmux), and the same screen made from an exported recording (pyte)."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import pyte
from processes import wait_for

COLUMNS, ROWS = 100, 30


class Tmux:
    """``command`` in a terminal of COLUMNS by ROWS."""

    def __init__(self, command: list[str], environment: Mapping[str, str]) -> None:
        self._socket = f"pam-{os.getpid()}-{time.monotonic_ns()}"
        self._environment = {**environment, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}
        # As most terminals call themselves; tmux' own name is unknown to small systems.
        self.do("set-option", "-g", "default-terminal", "xterm-256color", ";",
                "new-session", "-d", "-x", str(COLUMNS), "-y", str(ROWS), shlex.join(command))  # fmt: skip

    def do(self, *words: str) -> str:
        command = ["tmux", "-L", self._socket, "-f", "/dev/null", *words]
        done = subprocess.run(
            command, capture_output=True, text=True, env=self._environment, check=False, timeout=60
        )
        return done.stdout

    def type(self, text: str, *keys: str) -> None:
        """Type ``text`` as it is, then ``keys`` by their tmux names."""
        self.do("send-keys", "-l", text)
        if keys:
            self.do("send-keys", *keys)

    def press(self, *keys: str) -> None:
        self.do("send-keys", *keys)

    def screen(self) -> list[str]:
        return [line.rstrip() for line in self.do("capture-pane", "-p").splitlines()]

    def wait(self, text: str) -> None:
        def shows() -> bool:
            return text in "\n".join(self.screen())

        try:
            wait_for(shows, f"{text!r} on the screen", timeout=120)
        except TimeoutError as error:
            raise AssertionError("\n".join([str(error), *self.screen()])) from None

    def ended(self) -> bool:
        return not self.do("list-sessions")

    def close(self) -> None:
        self.do("kill-server")


class Replayed:
    """The screen of an asciicast ``file`` at any time."""

    def __init__(self, file: Path) -> None:
        header, *events = [json.loads(line) for line in file.read_text().splitlines()]
        self._size = (header["width"], header["height"])
        self.events: list[tuple[float, str, str]] = [(at, kind, data) for at, kind, data in events]

    def when(self, text: str) -> float:
        """Seconds from the beginning until ``text`` was put out."""
        seen = ""
        for at, kind, data in self.events:
            seen += data if kind == "o" else ""
            if text in seen:
                return at
        raise AssertionError(f"{text!r} was never put out")

    def screen(self, at: float) -> list[str]:
        """What it shows ``at`` seconds after the beginning, without empty lines."""
        screen = pyte.Screen(*self._size)
        stream = pyte.Stream(screen)
        for when, kind, data in self.events:
            if when > at:
                break
            if kind == "r":
                columns, rows = map(int, data.split("x"))
                screen.resize(rows, columns)
            elif kind == "o":
                stream.feed(data)
        return [line.rstrip() for line in screen.display if line.strip()]
