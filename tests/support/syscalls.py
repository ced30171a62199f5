"""System calls of a running program, by strace: watched, ordered, and cut off at a chosen one.

strace writes a call on one line, or on two when another thread's call came between:

    2571 1700000000.000001 sendto(15<TCP:[127.0.0.1:4321->127.0.0.1:5432]>, "Q"..., 50, 0 <unfinished ...>
    2571 1700000000.000009 <... sendto resumed>) = 50

It stops every thread at each call and writes the lines in the order in which it saw them, so the order of
lines is the order of events: a call begins at its first line and has returned at its last.
"""

from __future__ import annotations

import re
import signal
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from processes import Process, wait_for

SENDING = ("write", "pwrite64", "writev", "sendto", "sendmsg")
RECEIVING = ("read", "readv", "recvfrom", "recvmsg")

_LINE = re.compile(r"(?P<thread>\d+)\s+(?P<time>\d+\.\d+)\s+(?P<rest>.*)")
_BEGIN = re.compile(r"(?P<name>\w+)\((?P<fd>\d+)<(?P<where>.*?)>(?=[,)])")
_RESUMED = re.compile(r"<\.\.\. \w+ resumed>")
_RESULT = re.compile(r"\)\s+= (-?\d+)(?: .*)?$")


@dataclass
class Call:
    """One call on a file or socket. ``begin`` and ``end`` are line numbers; ``end`` is None, and so is
    ``result``, while it has not returned."""

    thread: int
    name: str
    where: str  #: the file's path, or ``TCP:[local->peer]``
    begin: int
    end: int | None = None
    result: int | None = None

    @property
    def size(self) -> int:
        """Bytes moved; 0 when it failed or has not returned."""
        return max(0, self.result or 0)


def parse(lines: Iterable[str]) -> list[Call]:
    """The calls of a trace with a descriptor, in the order in which they began."""
    calls: list[Call] = []
    open_: dict[int, Call] = {}
    for number, line in enumerate(lines):
        found = _LINE.match(line)
        if found is None:
            continue
        thread, rest = int(found["thread"]), found["rest"]
        if _RESUMED.match(rest):
            call = open_.pop(thread, None)
        elif begin := _BEGIN.match(rest):
            call = Call(thread, begin["name"], begin["where"], number)
            calls.append(call)
            if rest.endswith("<unfinished ...>"):
                open_[thread] = call
                continue
        else:
            continue
        result = _RESULT.search(rest)
        if call is not None and result is not None:
            call.end, call.result = number, int(result[1])
    return calls


@dataclass(frozen=True)
class Places:
    """How the three places look in a trace: text that is part of ``Call.where``."""

    spool: str
    target: str
    relay: str


def unrecorded(calls: Sequence[Call], places: Places, *, up: int, down: int) -> list[str]:
    """The sends of a lock-step conversation before which no write to the spool had returned.

    Each statement must hold at least ``up`` bytes that cannot be compressed, each result ``down``: what
    holds it cannot be smaller. The client asks again only when it has the result, so

        … → send(result) → write(spool) → send(target) → recv(target) → write(spool) → send(result) → …

    A write counts for a send when it is large enough, began after the last send in the other direction
    began, and has returned before this send begins. Which threads do it does not matter.
    """
    problems = []
    turn = -1  # where the last send in the other direction began
    going_up = True
    for call in calls:
        to_target = places.target in call.where
        if call.name not in SENDING or not (to_target or places.relay in call.where):
            continue
        least = up if to_target else down
        if call.size < least and call.end is not None:
            continue  # keepalives and window updates of ssh
        if to_target != going_up:
            problems.append(f"line {call.begin + 1}: the conversation is not in lock step")
        if not any(_covers(write, places.spool, turn, call.begin, least) for write in calls):
            what = "target" if to_target else "relay"
            problems.append(f"line {call.begin + 1}: sent to the {what} before it was written to the spool")
        turn, going_up = call.begin, not to_target
    return problems


def _covers(call: Call, spool: str, after: int, before: int, least: int) -> bool:
    returned = call.end is not None and call.end < before
    return (
        spool in call.where
        and call.name in SENDING
        and call.begin > after
        and returned
        and call.size >= least
    )


def sends(calls: Iterable[Call], where: str, least: int) -> Iterator[Call]:
    """The sends of at least so many bytes to ``where``."""
    return (call for call in calls if call.name in SENDING and where in call.where and call.size >= least)


class Strace:
    """strace attached to a running process (or, with ``follow=False``, to one thread of it).

    ``inject`` is strace's own expression, for example ``sendto:signal=SIGKILL:when=1``: the signal comes
    when the call is entered, before the kernel has done any of it. ``path`` leaves only calls on that file.
    """

    def __init__(
        self, pid: int, output: Path, *, follow: bool = True, inject: str = "", path: str = ""
    ) -> None:
        self.output = output
        command = ["strace", "-yy", "-ttt", "-s", "16", "-o", str(output), "-p", str(pid)]
        command += ["-f"] if follow else []
        command += ["-e", f"inject={inject}"] if inject else []
        command += ["-P", path] if path else []
        command += ["-e", "trace=" + ",".join((*SENDING, *RECEIVING)), "-e", "signal=none"]
        self._process = Process("strace", command, output.with_suffix(".log"))
        wait_for(lambda: "attached" in self._process.log.read_text() or not self.running(), "strace")
        if not self.running():
            raise RuntimeError(self._process.tail())

    def __enter__(self) -> Strace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def running(self) -> bool:
        return self._process.running()

    def stop(self) -> list[Call]:
        """Detach and return the calls."""
        self._process.stop(number=2)
        return self.calls()

    def calls(self) -> list[Call]:
        return parse(self.lines())

    def lines(self) -> list[str]:
        return self.output.read_text(errors="replace").splitlines()


def may_attach() -> bool:
    """Whether strace may attach to a process of ours that is not its child (ptrace_scope)."""
    with tempfile.TemporaryDirectory() as folder, subprocess.Popen(["sleep", "600"]) as child:
        log = Path(folder) / "strace.log"
        try:
            process = Process("strace", ["strace", "-p", str(child.pid)], log)
            wait_for(lambda: "attached" in log.read_text() or not process.running(), "strace")
            process.stop(number=signal.SIGINT)
        finally:
            child.kill()
        return "attached" in log.read_text()
