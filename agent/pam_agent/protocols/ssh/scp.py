"""The old protocol of ``scp -O`` as it goes by: which files, how large, with what content.

It has no specification; the sender's half is ``source()`` and the taker's ``sink()`` in OpenSSH's scp.c.
The sender gives records, a line each (``C0644 SIZE NAME``, ``D0755 0 NAME``, ``E``, ``T…``), a file's
bytes behind its line, and a status behind those; the taker answers each record and each file. It is
spoken on the streams of a command, whose first bytes and hashes are recorded as those of any command;
what is followed here comes on top. So bytes that are not this protocol, or do not wait for their answer,
only end the following.
"""

from __future__ import annotations

import enum
import hashlib
import shlex
from collections.abc import Sequence
from typing import Any, Final

from pam_agent.protocols.base import Event
from pam_agent.protocols.ssh.channel import TARGET, USER

#: A record has a mode, a size and a name; an answer has a message.
MAX_LINE: Final = 8192
#: Folders in folders. Their names are of MAX_LINE together at most.
MAX_DEPTH: Final = 256

#: Answers and statuses: a zero byte, or one of the others with a message.
_OK: Final = b"\0"
_COMPLAINTS: Final = (b"\1", b"\2")


class _State(enum.Enum):
    RECORD = enum.auto()  #: the sender's next line
    ANSWER = enum.auto()  #: the taker's, to a line
    DATA = enum.auto()  #: the sender's bytes of a file
    STATUS = enum.auto()  #: the sender's, behind them
    TAKEN = enum.auto()  #: the taker's, to a file
    LOST = enum.auto()


def followed(number: int, command: str) -> ScpWatch | None:
    """What follows ``command`` on channel ``number``, if it is the server's half of an ``scp -O``."""
    try:
        words = shlex.split(command)
    except ValueError:
        return None
    if not words or words[0].rpartition("/")[2] != "scp":
        return None
    flags = ""
    for at, word in enumerate(words[1:], 1):
        if word == "--" or not word.startswith("-"):
            paths = words[at + (word == "--") :]
            break
        flags += word[1:]
    else:
        paths = []
    if ("t" in flags) == ("f" in flags):
        return None
    return ScpWatch(number, USER if "t" in flags else TARGET, paths)


class ScpWatch:
    """Both directions of one copy; ``sender`` is the side that the files come from."""

    def __init__(self, number: int, sender: int, paths: Sequence[str]) -> None:
        self._number = number
        self._sender = sender
        # Where files are put to is the command's to say; what is got has its name in its record.
        self._where = {"to": " ".join(paths)} if sender == USER else {}
        self._op = "put" if sender == USER else "get"
        self._state = _State.RECORD
        self._lines = (bytearray(), bytearray())
        self._folders: list[str] = []
        self._record = ""  # its letter
        self._path = ""
        self._size = self._left = 0  # bytes of the file: all of them, and those that are still to come
        self._hash = hashlib.sha256()
        self._whole = True

    def feed(self, side: int, data: memoryview) -> Sequence[Event]:
        """Look at what ``side`` sent."""
        events: list[Event] = []
        while data and self._state is not _State.LOST:
            if side == self._sender and self._state is _State.DATA:
                data = self._content(data)
            else:
                data = self._control(side, data, events)
        return events

    def closed(self) -> Sequence[Event]:
        """The channel is over; a file under way is told as it is."""
        events = self._lost()
        self._state = _State.LOST
        return events

    # -- the two kinds of bytes ------------------------------------------------------------------------

    def _content(self, data: memoryview) -> memoryview:
        piece = data[: self._left]
        self._hash.update(piece)
        self._left -= len(piece)
        if not self._left:
            self._state = _State.STATUS
        return data[len(piece) :]

    def _control(self, side: int, data: memoryview, events: list[Event]) -> memoryview:
        """Take one line or one answer, or what there is of it; returns the rest."""
        line = self._lines[side]
        if not line and data[0] == _OK[0]:
            taken, text = 1, _OK
        else:
            piece = bytes(data[: MAX_LINE - len(line)])
            end = piece.find(b"\n")
            line += piece if end < 0 else piece[:end]
            if end < 0:
                if len(line) >= MAX_LINE:
                    events += self._lost()
                return data[len(piece) :]
            taken, text = end + 1, bytes(line)
            line.clear()
        if side == self._sender:
            events += self._sent(text)
        else:
            events += self._answered(text)
        return data[taken:]

    # -- the sender ------------------------------------------------------------------------------------

    def _sent(self, text: bytes) -> Sequence[Event]:
        if self._state is _State.STATUS:
            self._whole = text == _OK
            self._state = _State.TAKEN
            return ()
        if self._state is not _State.RECORD:
            return self._lost()  # it did not wait
        if text[:1] in _COMPLAINTS:
            return ()  # a file that cannot be read; nobody answers
        self._record = text[:1].decode("ascii", "replace")
        if self._record in ("C", "D"):
            return self._named(text)
        if self._record not in ("E", "T"):
            return self._lost()
        self._state = _State.ANSWER
        return ()

    def _named(self, text: bytes) -> Sequence[Event]:
        _, _, rest = text.partition(b" ")
        size, _, name = rest.partition(b" ")
        if not size.isdigit() or len(size) > 19 or not name or len(self._folders) >= MAX_DEPTH:
            return self._lost()
        self._path = "/".join([*self._folders, name.decode("utf-8", "replace")])
        if len(self._path) > MAX_LINE:
            return self._lost()
        self._size = self._left = int(size)
        self._state = _State.ANSWER
        if self._record == "C":
            return [self._event(self._op)]
        return [self._event("mkdir")] if self._op == "put" else ()

    # -- the taker -------------------------------------------------------------------------------------

    def _answered(self, text: bytes) -> Sequence[Event]:
        ok = text == _OK
        if not ok and text[:1] not in _COMPLAINTS:
            return self._lost()
        if self._state is _State.TAKEN:
            self._state = _State.RECORD
            return [self._done(ok and self._whole)]
        if self._state is not _State.ANSWER:
            return ()  # its first word, or a complaint
        self._state = _State.RECORD
        if self._record == "E":
            del self._folders[-1:]
        elif self._record == "D":
            return self._entered(ok)
        elif self._record == "C":
            if not ok:
                return [self._event(self._op, ok=False)]
            self._hash = hashlib.sha256()
            self._state = _State.DATA if self._left else _State.STATUS
        return ()

    def _entered(self, ok: bool) -> Sequence[Event]:
        if ok:
            self._folders.append(self._path.rpartition("/")[2])
        return [self._event("mkdir", ok=ok)] if self._op == "put" else ()

    # -- events ----------------------------------------------------------------------------------------

    def _lost(self) -> Sequence[Event]:
        """Follow no further; what is known of the file at hand."""
        under_way = self._state in (_State.DATA, _State.STATUS, _State.TAKEN)
        self._state = _State.LOST
        return [self._done(False)] if under_way else []

    def _done(self, ok: bool) -> Event:
        return self._event(self._op, bytes=self._size - self._left, sha256=self._hash.hexdigest(), ok=ok)

    def _event(self, op: str, **fields: Any) -> Event:
        return {"kind": "file", "ch": self._number, "op": op, "path": self._path, **self._where, **fields}
