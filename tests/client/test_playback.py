"""A terminal's recording: the right frames, at their times, the same screen as the original, and exports."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import shutil
import stat
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyte
import pytest

from pam_client.export import EXPORTS
from pam_client.playback.frames import MAX_COLUMNS, MAX_ROWS, Frame, compressed, find, frames
from pam_client.playback.player import FASTEST, SLOWEST, STEP, Player
from pam_client.playback.transcript import MAX_TERMINALS, transcript
from pam_common.errors import PamError
from pam_common.terminal import RESET

SESSION = "s-" + "a" * 26


def shell(t: float = 1.0, ch: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "t": t,
        "c": 1,
        "part": 1,
        "kind": "shell",
        "ch": ch,
        "cols": 80,
        "rows": 24,
        "term": "xterm",
        **more,
    }


def o(t: float, data: str, ch: int = 1, **more: Any) -> dict[str, Any]:
    return {"t": t, "c": 1, "part": 1, "kind": "o", "ch": ch, "data": data, **more}


EVENTS: list[dict[str, Any]] = [
    {"t": 0.5, "c": 1, "part": 1, "kind": "ssh_login", "user": "deploy"},
    shell(),
    o(1.5, "$ "),
    shell(1.6, ch=2, cols=100, rows=30, kind="exec", command="top"),
    o(1.7, "second\r\n", ch=2),
    {"t": 2.0, "c": 1, "part": 1, "kind": "i", "ch": 1, "bytes": 2},
    {"t": 2.1, "c": 1, "part": 1, "kind": "i", "ch": 1, "data": "ls"},
    o(2.1, "ls\r\n\x1b[1mfile\x1b[0m\x1b]0;title\x07\x1b[6n\r\n"),
    {"t": 3.0, "c": 1, "part": 1, "kind": "resize", "ch": 1, "cols": 120, "rows": 40},
    o(20.0, "$ \x1b]52;c;AAAA\x07bye"),
    {"t": 21.0, "c": 1, "part": 1, "kind": "exit", "ch": 1, "status": 0},
    o(22.0, "a channel of the same number, later"),
]


# --- frames --------------------------------------------------------------------------------------------


def test_one_terminal_of_several() -> None:
    found = [(round(frame.at, 3), frame.kind, frame.data) for frame in frames(EVENTS)]
    assert found == [
        (0.5, "o", "$ "),
        (1.1, "i", "ls"),
        (1.1, "o", EVENTS[7]["data"]),
        (2.0, "r", "120x40"),
        (19.0, "o", EVENTS[9]["data"]),
    ]
    second = find(EVENTS, 2)
    assert second is not None
    assert (second.at, second.columns, second.rows, second.command) == (1.6, 100, 30, "top")
    assert [frame.data for frame in frames(EVENTS, 2)] == ["second\r\n"]
    assert find(EVENTS, 3) is None
    assert list(frames(EVENTS, 3)) == []


def test_pauses_are_cut() -> None:
    at = [round(frame.at, 3) for frame in compressed(frames(EVENTS), 1.0)]
    assert at == [0.5, 1.1, 1.1, 2.0, 3.0]


def test_time_goes_on_in_the_next_part() -> None:
    events = [shell(10.0), o(11.0, "a"), {**shell(0.5), "part": 2}, {**o(1.0, "b"), "part": 2}]
    found = find(events, 2)
    assert found is not None
    assert found.at == 11.5


def test_what_is_no_event_of_ours_is_passed_over() -> None:
    odd: list[dict[str, Any]] = [
        {},
        {"kind": "shell"},
        {"kind": "shell", "cols": "80", "rows": 24},
        {"kind": "o", "data": 5, "ch": 1},
        {"t": "x", "kind": "o"},
        {"t": float("nan"), "kind": "resize", "cols": None},
    ]
    assert find(odd) is None
    assert [frame.data for frame in frames([*odd, shell(), *odd, o(2, "x")])] == ["x"]


def test_a_size_that_is_none_is_not_believed() -> None:
    found = find([shell(cols=0, rows=-5)])
    assert found is not None
    assert (found.columns, found.rows) == (1, 1)
    found = find([shell(cols=10**9, rows=10**9)])
    assert found is not None
    assert (found.columns, found.rows) == (MAX_COLUMNS, MAX_ROWS)


# --- the player ----------------------------------------------------------------------------------------


class Hands:
    """Presses keys at moments of our clock, which runs only while somebody waits."""

    def __init__(self, *presses: tuple[float, str]) -> None:
        self.presses = list(presses)
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    def wait(self, seconds: float | None) -> str:
        if self.presses and (seconds is None or self.presses[0][0] <= self.now + seconds):
            at, key = self.presses.pop(0)
            self.now = max(self.now, at)
            return key
        assert seconds is not None, "it waits for a key that nobody presses"
        self.now += seconds
        return ""


def play(source: list[Frame], *presses: tuple[float, str], speed: float = 1.0) -> list[tuple[float, str]]:
    """What was written when, without what only cleans up."""
    hands, written = Hands(*presses), []
    player = Player(
        lambda: iter(source),
        lambda text: written.append((round(hands.now, 3), text)),
        hands,
        speed=speed,
        clock=hands.clock,
    )
    player.play()
    return [(at, text) for at, text in written if text and not text.startswith(RESET)]


TEN = [Frame(float(second), "o", str(second)) for second in range(1, 41)]


def test_frames_come_at_their_times() -> None:
    assert play(TEN[:3]) == [(1, "1"), (2, "2"), (3, "3")]
    assert play(TEN[:3], speed=2) == [(0.5, "1"), (1, "2"), (1.5, "3")]


def test_space_pauses_and_goes_on() -> None:
    assert play(TEN[:3], (1.5, " "), (60, " ")) == [(1, "1"), (60.5, "2"), (61.5, "3")]
    assert play(TEN[:3], (1.5, " "), (60, "q")) == [(1, "1")]


def test_seeking() -> None:
    assert play(TEN, (1.5, "right"), (2, "q"))[1:] == [(1.5, str(n)) for n in range(2, 12)]
    back = play(TEN, (15.5, "left"), (16, "q"))
    assert back[:15] == [(n, str(n)) for n in range(1, 16)]
    assert back[15:] == [(15.5, str(n)) for n in range(1, 6)], "all up to the moment, at once"
    assert play(TEN[:2], (0.5, "left"), (5, "q")) == [(1.5, "1"), (2.5, "2")]
    assert STEP == 10


def test_speed() -> None:
    assert play(TEN[:4], (1.5, "up")) == [(1, "1"), (1.75, "2"), (2.25, "3"), (2.75, "4")]
    assert play(TEN[:3], (1.5, "down")) == [(1, "1"), (2.5, "2"), (4.5, "3")]
    fastest = play(TEN, *[(0.1, "up")] * 20)
    assert fastest[-1][0] == pytest.approx(0.1 + 39.9 / FASTEST, abs=0.01)
    slowest = play(TEN[:1], *[(0.0, "down")] * 20)
    assert slowest[0][0] == pytest.approx(1 / SLOWEST)


def test_the_screen_is_the_originals() -> None:
    """Whenever one looks: what a real terminal emulator shows of it."""

    def screen(text: str) -> list[str]:
        made = pyte.Screen(80, 24)
        pyte.Stream(made).feed(text)
        return [line.rstrip() for line in made.display]

    parts = [
        "$ vi x\r\n\x1b[?1049h\x1b[2J\x1b[H~\r\n~\x1b[24;1H\x1b[7mx\x1b[0m",
        "\x1b[1;1Hhello\x1b[K",
        "\x1b[?1049l$ ",
    ]
    parts.append("\x1b(0lqk\x1b(B\r\n\x1b[3;5Hz\x1b[2L\x1b[P\x1b7\x1b[5;5Hq\x1b8w")
    source = [Frame(float(second), "o", text) for second, text in enumerate(parts, 1)]
    for moment in range(1, len(parts) + 1):
        shown = "".join(text for at, text in play(source, (moment + 0.5, "q")))
        assert screen(shown) == screen("".join(parts[:moment]))


@pytest.mark.parametrize("keys", [(), ((1.5, "q"),)], ids=["to its end", "q"])
def test_the_cursor_is_left_below_all_that_was_shown(keys: tuple[tuple[float, str], ...]) -> None:
    """Else the prompt, and the verdict, would be written over it."""
    made, hands = Screen(80, 24), Hands(*keys)
    stream = pyte.Stream(made)
    source = [
        Frame(1.0, "o", "".join(f"line {n}\r\n" for n in range(20))),
        Frame(2.0, "o", "\x1b[3;10r\x1b[?6h"),
    ]
    Player(lambda: iter(source), stream.feed, hands, clock=hands.clock).play()
    stream.feed("the recording is verified")
    lines = [line.rstrip() for line in made.display]
    assert lines[23] == "the recording is verified"
    assert lines[:19] == [f"line {n}" for n in range(1, 20)]


class Screen(pyte.Screen):
    """As terminals do, and pyte does not: to reset the margins moves the cursor home."""

    def set_margins(self, top: int | None = None, bottom: int | None = None) -> None:
        super().set_margins(top, bottom)
        if not top and bottom is None:
            self.cursor_position()


# --- lines ---------------------------------------------------------------------------------------------


def test_a_transcript_has_what_was_to_be_seen() -> None:
    text = "\n".join(transcript(EVENTS))
    assert "screen    $ ls" in text
    assert "screen    file" in text
    assert "screen    $ bye" in text
    assert "screen    second" in text
    assert "ssh_login" in text
    assert "command" not in text or "top" in text
    assert "\x1b" not in text
    assert "title" not in text


def test_a_transcript_keeps_so_many_unfinished_lines() -> None:
    events = [o(1.0, f"prompt{number}$ ", ch=number) for number in range(MAX_TERMINALS + 5)]
    lines = list(transcript(iter(events)))
    assert len(lines) == MAX_TERMINALS + 5
    assert "prompt0$" in lines[0]


# --- exports -------------------------------------------------------------------------------------------


def export(form: str, events: list[dict[str, Any]], number: int = 1) -> list[Any]:
    session = {"id": SESSION, "account": "web-01/deploy", "started": 1700000000}

    def source() -> Iterator[dict[str, Any]]:
        return iter(events)

    return [json.loads(line) for line in "".join(EXPORTS[form](source, session, number)).splitlines()]


def test_asciicast() -> None:
    header, *rest = export("asciicast", EVENTS)
    assert (header["version"], header["width"], header["height"]) == (2, 80, 24)
    assert header["timestamp"] == 1700000001
    assert header["title"] == f"web-01/deploy {SESSION}"
    assert rest == [
        [0.5, "o", "$ "],
        [1.1, "i", "ls"],
        [1.1, "o", "ls\r\n\x1b[1mfile\x1b[0m\r\n"],
        [2.0, "r", "120x40"],
        [19.0, "o", "$ bye"],
    ]


def test_an_export_without_a_terminal_says_so() -> None:
    with pytest.raises(PamError, match="has no terminal"):
        export("asciicast", EVENTS[:1])
    with pytest.raises(PamError, match="has no terminal 3"):
        export("asciicast", EVENTS, 3)


def test_ndjson() -> None:
    assert export("ndjson", EVENTS) == EVENTS


# --- the command ---------------------------------------------------------------------------------------


@pytest.fixture
def recorded(platform: Any) -> None:
    lines = b"".join(json.dumps(event).encode() + b"\n" for event in EVENTS)
    platform.answers["GET", f"/api/v1/sessions/{SESSION}/events"] = (200, lines)
    part = {"part": 1, "ok": True, "problems": [], "end": "closed", "chunks": 2, "bytes": 300}
    platform.answers["GET", f"/api/v1/sessions/{SESSION}/verify"] = (200, {"ok": True, "parts": [part]})
    platform.answers["GET", f"/api/v1/sessions/{SESSION}"] = (
        200,
        {"id": SESSION, "account": "web-01/deploy", "protocol": "ssh", "started": 1700000000},
    )


def test_in_a_pipe_it_is_printed(call: Any, home: Any, recorded: None) -> None:
    done = call("replay", SESSION)
    assert done.returncode == 0
    assert "screen    $ ls" in done.stdout
    assert "the recording is verified" in done.stdout


def test_a_file_for_asciinema(call: Any, home: Any, recorded: None, tmp_path: Path) -> None:
    file = tmp_path / "demo.cast"
    done = call("replay", SESSION, "--export", "asciicast", "-o", str(file))
    assert done.returncode == 0, done.stderr
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir() if "cast" in path.name] == ["demo.cast"]
    if shutil.which("asciinema") is None:
        pytest.skip("needs asciinema")
    env = {**os.environ, "LC_ALL": "C.UTF-8", "TERM": "xterm", "ASCIINEMA_CONFIG_HOME": str(tmp_path)}
    for words in (["cat", str(file)], ["play", "-s", "100", str(file)]):
        code, shown = in_terminal(["asciinema", *words], env)
        assert code == 0, shown
        assert "$ bye" in shown
        assert "\x1b]" not in shown


def in_terminal(words: list[str], env: dict[str, str]) -> tuple[int, str]:
    """Run a program to its end in a terminal of 120 by 40; its exit code and all it showed."""
    pid, fd = pty.fork()
    if pid == 0:
        termios.tcsetwinsize(0, (40, 120))  # before the program can look
        os.execvpe(words[0], words, env)
    seen, end = b"", time.monotonic() + 60
    with contextlib.suppress(OSError):  # which is how a terminal says that its program has gone
        while True:
            assert time.monotonic() < end, seen
            if select.select([fd], [], [], 0.1)[0]:
                seen += os.read(fd, 4096)
    os.close(fd)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), seen.decode()


def test_an_export_that_fails_leaves_nothing(call: Any, home: Any, recorded: None, tmp_path: Path) -> None:
    file = tmp_path / "demo.cast"
    done = call("replay", SESSION, "--export", "asciicast", "--terminal", "7", "-o", str(file))
    assert done.returncode == 1
    assert "no terminal 7" in done.stderr
    assert not [path.name for path in tmp_path.iterdir() if "cast" in path.name]
    assert call("replay", SESSION, "--export", "asciicast").returncode == 2
    done = call("replay", SESSION, "--export", "ndjson", "-o", str(tmp_path / "no" / "x"))
    assert "cannot write" in done.stderr


def test_on_a_terminal_it_is_played(
    command: Any, environment: dict[str, str], home: Any, recorded: None
) -> None:
    words = command("replay", SESSION, "--speed", "50", "--max-pause", "300")
    code, seen = in_terminal(words, environment | {"TERM": "xterm"})
    assert code == 0
    assert "the recording is verified" in seen
    assert "space pauses" in seen
    assert "\x1b[1mfile\x1b[0m" in seen
    assert "$ bye" in seen
    assert "another terminal: --terminal 2" in seen
    assert "\x1b]" not in seen
    assert "\x1b[6n" not in seen
