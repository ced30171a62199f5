"""SFTP as it goes by: which files, how large, with what content. Versions 3 to 6, whose names agree.

https://datatracker.ietf.org/doc/html/draft-ietf-secsh-filexfer-02 and OpenSSH's PROTOCOL, chapter 4. The
stream passes unchanged; what cannot be parsed cannot be recorded, and ends the connection. What is asked is
an event without ``ok``, what came of it one with ``ok``; a file that is closed tells its bytes and, when they
came in order from the first one, their SHA-256: of what was written (``put``) and of what was read (``get``).

Many requests may be under way, a file's CLOSE among them: the file is told when all that is about it has been
answered. Each answer belongs to the one request under way that has its id. A handle may be guessed before the
target tells it (OpenSSH's are 0, 1, 2, ...); which file that would be is not known here, so that nothing is
changed by such a handle, and nothing comes back for it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from pam_agent.protocols.base import Event
from pam_agent.protocols.ssh.channel import FAULTS, TARGET, USER
from pam_agent.protocols.ssh.codec import Reader

#: OpenSSH's own limit of a message is 256 KiB; its longest has that much data and a header.
MAX_MESSAGE: Final = (256 << 10) + 1024
#: Messages under way: sftp has 64 by default, more with -R; paramiko asks for all of a file at once, 32 KiB
#: each time, and this is a GiB of them. Each costs some 250 bytes.
MAX_ASKED: Final = 32768
#: Files and folders open at once: OpenSSH's server has at most 100.
MAX_FILES: Final = 1024
#: A path has at most 4096 bytes on Linux.
MAX_PATH: Final = 8192
#: What is recorded of an extension that is not known here: names, mostly (bytes).
MAX_EXTENSION_TEXT: Final = 1024

#: Content in one event, which may have 1 MiB with six bytes for each of these.
PIECE: Final = 64 << 10

_INIT, _VERSION = 1, 2
_OPEN, _CLOSE, _READ, _WRITE, _FSETSTAT, _OPENDIR, _READDIR, _EXTENDED = 3, 4, 5, 6, 10, 11, 12, 200
_STATUS, _HANDLE, _DATA = 101, 102, 103
#: What a file is opened for, by the bits of versions 3 and 4.
_FLAGS: Final = {1: "read", 2: "write", 4: "append", 8: "create", 16: "truncate"}
#: Of versions 5 and 6: by the bits of the access that is wanted, and by what is to become of the file.
_ACCESS: Final = {1: "read", 2: "write", 4: "append"}
_DISPOSITION: Final = (("create",), ("create", "truncate"), (), ("create",), ("truncate",))
_APPENDING: Final = 0x8 | 0x10
#: Requests about one path, and those about two, by the word that the recording has for them.
_PATHS: Final = {9: "setstat", 13: "remove", 14: "mkdir", 15: "rmdir"}
_PAIRS: Final = {18: "rename", 20: "symlink", 21: "link"}
_EXTENDED_PATHS: Final = {"lsetstat@openssh.com": "setstat"}
_EXTENDED_PAIRS: Final = {
    "posix-rename@openssh.com": "rename",
    "hardlink@openssh.com": "link",
}
#: Of no consequence: they read names and sizes, or write what was written already.
_EXTENDED_QUIET: Final = frozenset(
    {"statvfs@openssh.com", "fstatvfs@openssh.com", "fsync@openssh.com", "limits@openssh.com",
     "expand-path@openssh.com", "home-directory", "users-groups-by-id@openssh.com"}
)  # fmt: skip
_LENGTH = struct.Struct(">I")


@dataclass
class Flow:
    """What went one way of a file."""

    size: int = 0  #: bytes
    ok: bool = True
    in_order: bool = True
    used: bool = False
    hash: Any = field(default_factory=hashlib.sha256)

    def take(self, offset: int, data: memoryview) -> None:
        self.used = True
        self.in_order &= offset == self.size
        self.size += len(data)
        if self.in_order:
            self.hash.update(data)


@dataclass(eq=False)
class File:
    """A file that is open: what was read of it and written to it. ``mode``: what it was opened for."""

    path: str
    folder: bool = False
    mode: list[str] = field(default_factory=list)
    budget: int = 0
    read: Flow = field(default_factory=Flow)
    written: Flow = field(default_factory=Flow)
    waiting: int = 0  #: requests about it that are not answered
    closed: bool | None = None  #: whether its CLOSE succeeded, once that is answered

    def flows(self) -> list[tuple[str, Flow]]:
        """What there is to tell of it, by the word that the recording has: one at least."""
        only_written = "write" in self.mode and "read" not in self.mode
        told = []
        if self.written.used or only_written or "truncate" in self.mode:
            told.append(("put", self.written))
        if self.read.used or not told:
            told.append(("get", self.read))
        return told


@dataclass(frozen=True)
class Asked:
    """A request that waits for its answer: the event of it, the file it is about, the place in it."""

    kind: int
    event: Event | None = None
    opens: File | None = None
    file: File | None = None
    offset: int = 0
    stray: bool = False  #: by a handle that is not known


class SftpWatch:
    """Both directions of one SFTP subsystem on channel ``number``."""

    def __init__(self, number: int, budget: int) -> None:
        self._number = number
        self._versions: list[int] = []  # of the user's INIT, of the target's VERSION: the lower one holds
        self._budget = budget  # bytes of each file's content to record
        self._buffers = (bytearray(), bytearray())
        self._asked: dict[int, Asked] = {}
        self._files: dict[bytes, File] = {}

    def feed(self, side: int, data: memoryview) -> Sequence[Event]:
        """Look at what ``side`` sent. Raises the side's fault for what is no SFTP."""
        buffer, events = self._buffers[side], list[Event]()
        buffer += data
        at = 0
        with memoryview(buffer) as view:
            while len(view) - at >= 4:
                size = _LENGTH.unpack_from(view, at)[0]
                if not 1 <= size <= MAX_MESSAGE:
                    raise FAULTS[side](f"an sftp message of {size} bytes")
                if len(view) - at - 4 < size:
                    break
                with view[at + 4 : at + 4 + size] as message:
                    self._message(side, message, events)
                at += 4 + size
        del buffer[:at]
        return events

    def closed(self) -> Sequence[Event]:
        """The channel is over; what was open is told as it is."""
        unanswered = [asked.file for asked in self._asked.values() if asked.file is not None]
        files = dict.fromkeys([*self._files.values(), *unanswered])
        self._files.clear()
        self._asked.clear()
        return [event for file in files for event in self._done(file, ok=False)]

    def _message(self, side: int, message: memoryview, events: list[Event]) -> None:
        reader = Reader(message, FAULTS[side])
        number = reader.uint32()
        if message[0] == (_INIT, _VERSION)[side]:
            self._greeted(side, number)
        elif side == USER:
            self._admit(number)
            asked = self._request(message[0], reader, message, events)
            self._asked[number] = asked
            if asked.file is not None:
                asked.file.waiting += 1
            if asked.event is not None:
                events.append(asked.event)
        else:
            found = self._asked.pop(number, None)
            if found is None:
                raise FAULTS[side]("an sftp answer to no request")
            self._answer(message[0], reader, message, found, events)

    def _greeted(self, side: int, version: int) -> None:
        """The user says its version, then the target. Once: another one would have requests read otherwise
        here than there."""
        if len(self._versions) != side:
            raise FAULTS[side]("an sftp version that is not asked for")
        self._versions.append(version)

    def _admit(self, number: int) -> None:
        """May the user make a request of that id now?"""
        if len(self._versions) < 2:
            raise FAULTS[USER]("an sftp request before the version is known")
        if number in self._asked:
            raise FAULTS[USER]("an sftp request with the id of one under way")
        if len(self._asked) >= MAX_ASKED:
            raise FAULTS[USER]("too many sftp requests at once")

    # -- requests --------------------------------------------------------------------------------------

    def _request(self, kind: int, reader: Reader, message: memoryview, events: list[Event]) -> Asked:
        if kind == _OPENDIR:
            folder = File(reader.text(MAX_PATH), folder=True)
            return Asked(kind, self._event("list", path=folder.path), opens=folder)
        if kind == _OPEN:
            file = File(reader.text(MAX_PATH), mode=self._mode(reader), budget=self._budget)
            return Asked(kind, self._event("open", path=file.path, mode=file.mode), opens=file)
        if kind in (_CLOSE, _READ, _READDIR):
            return self._asked_of_file(kind, reader)
        if kind == _WRITE:
            return self._write(reader, message, events)
        if kind == _FSETSTAT:
            return Asked(kind, self._event("setstat", path=self._given(reader.string()).path))
        if kind in _PATHS:
            return Asked(kind, self._event(_PATHS[kind], path=reader.text(MAX_PATH)))
        if kind in _PAIRS:
            paths = reader.text(MAX_PATH), reader.text(MAX_PATH)
            return Asked(kind, self._event(_PAIRS[kind], path=paths[0], to=paths[1]))
        if kind == _EXTENDED:
            return Asked(kind, self._extended(reader))
        return Asked(kind)

    def _mode(self, reader: Reader) -> list[str]:
        """What a file is opened for, in words."""
        if min(self._versions) < 5:
            flags = reader.uint32()
            return [word for bit, word in _FLAGS.items() if flags & bit]
        access, flags = reader.uint32(), reader.uint32()
        words = [word for bit, word in _ACCESS.items() if access & bit]
        if flags & _APPENDING and "append" not in words:
            words.append("append")
        disposition = flags & 7
        return words + list(_DISPOSITION[disposition] if disposition < len(_DISPOSITION) else ())

    def _given(self, handle: bytes) -> File:
        """What the user was given ``handle`` for, to change it."""
        file = self._files.get(handle)
        if file is None:
            raise FAULTS[USER]("an sftp change by a handle that was not given out")
        return file

    def _asked_of_file(self, kind: int, reader: Reader) -> Asked:
        """READ, READDIR, CLOSE. Real programs send them by handles that are closed already: sshj closes
        twice, paramiko reads ahead. The target refuses those; see :meth:`_answer` for what it does not."""
        handle = reader.string()
        offset = self._offset(reader) if kind == _READ else 0
        file = self._files.get(handle)
        if file is not None and kind == _CLOSE:
            del self._files[handle]
        return Asked(kind, file=file, offset=offset, stray=file is None)

    def _write(self, reader: Reader, message: memoryview, events: list[Event]) -> Asked:
        handle = reader.string()
        file, offset, size = self._given(handle), self._offset(reader), reader.uint32()
        start = len(message) - size
        if start != 1 + 4 + 4 + len(handle) + 8 + 4:
            raise FAULTS[USER]("an sftp write of another size than it says")
        self._take(file, file.written, offset, message[start:], events)
        return Asked(_WRITE, file=file)

    def _offset(self, reader: Reader) -> int:
        return reader.uint32() << 32 | reader.uint32()

    def _extended(self, reader: Reader) -> Event | None:
        name = reader.text(MAX_PATH)
        if name == "version-select":  # of version 6: what is under way would be read by one or the other
            raise FAULTS[USER]("another sftp version than the one that was agreed on")
        if name in _EXTENDED_QUIET:
            return None
        if name in _EXTENDED_PATHS:
            return self._event(_EXTENDED_PATHS[name], path=reader.text(MAX_PATH))
        if name in _EXTENDED_PAIRS:
            paths = reader.text(MAX_PATH), reader.text(MAX_PATH)
            return self._event(_EXTENDED_PAIRS[name], path=paths[0], to=paths[1])
        if name == "copy-data":
            return self._copied(reader)
        body = reader.rest()[:MAX_EXTENSION_TEXT].decode("utf-8", "replace")
        text = "".join(char if char.isprintable() else "." for char in body)
        return self._event(name, path="", text=text)

    def _copied(self, reader: Reader) -> Event:
        """From one open file to another: a handle, offset and length, a handle and offset."""
        source = self._given(reader.string())
        self._offset(reader), self._offset(reader)
        target = self._given(reader.string())
        target.written.used, target.written.in_order = True, False
        return self._event("copy", path=source.path, to=target.path)

    # -- answers ---------------------------------------------------------------------------------------

    def _answer(
        self, kind: int, reader: Reader, message: memoryview, asked: Asked, events: list[Event]
    ) -> None:
        status = reader.uint32() if kind == _STATUS else None
        if asked.stray and not status:  # no refusal: the handle was guessed, and of a file that is not known
            raise FAULTS[USER]("an sftp request by a handle that was not given out")
        if kind == _HANDLE and asked.opens is not None:
            self._opened(reader.string(), asked.opens)
        elif kind == _DATA:
            self._data(reader, message, asked, events)
        elif status is not None and asked.event is not None and (status or asked.opens is None):
            events.append({**asked.event, "ok": status == 0, "status": status})
        if asked.file is not None:
            events += self._answered(asked.file, asked.kind, status)

    def _opened(self, handle: bytes, file: File) -> None:
        if handle in self._files:
            raise FAULTS[TARGET]("an sftp handle that is in use")
        if len(self._files) >= MAX_FILES:
            raise FAULTS[TARGET]("too many files open at once over sftp")
        self._files[handle] = file

    def _data(self, reader: Reader, message: memoryview, asked: Asked, events: list[Event]) -> None:
        if asked.kind != _READ or asked.file is None:
            raise FAULTS[TARGET]("sftp data of what was not read")
        size = reader.uint32()
        if size > len(message) - 9:
            raise FAULTS[TARGET]("sftp data of another size than it says")
        self._take(asked.file, asked.file.read, asked.offset, message[9 : 9 + size], events)

    def _answered(self, file: File, kind: int, status: int | None) -> list[Event]:
        """A request of ``kind`` about ``file`` was. What is closed is told after the last of them: a target
        may answer in another order than it was asked."""
        file.waiting -= 1
        if kind == _WRITE:
            file.written.ok &= status == 0
        elif kind == _CLOSE:
            file.closed = status == 0
        if file.closed is None or file.waiting:
            return []
        return self._done(file, ok=file.closed)

    # -- events ----------------------------------------------------------------------------------------

    def _take(self, file: File, flow: Flow, offset: int, data: memoryview, events: list[Event]) -> None:
        flow.take(offset, data)
        kept = bytes(data[: file.budget])
        file.budget -= len(kept)
        way = "up" if flow is file.written else "down"
        for at in range(0, len(kept), PIECE):
            piece = kept[at : at + PIECE]
            text = piece.decode("utf-8", "replace")
            events.append(
                {"kind": "data", "ch": self._number, "dir": way, "stream": "file", "path": file.path,
                 "data": text, "bytes": len(piece)}
            )  # fmt: skip

    def _done(self, file: File, *, ok: bool) -> list[Event]:
        """What came of a file that was closed; ``ok``: by the user, not by the end of the channel."""
        if file.folder:
            return []
        events = []
        for op, flow in file.flows():
            fields: dict[str, Any] = {"path": file.path, "bytes": flow.size}
            if flow.in_order:
                fields["sha256"] = flow.hash.hexdigest()
            if op == "put" and "append" in file.mode:
                fields["append"] = True  # to what was there: the hash is of these bytes alone
            events.append(self._event(op, **fields, ok=ok and flow.ok))
        return events

    def _event(self, op: str, **fields: Any) -> Event:
        return {"kind": "file", "ch": self._number, "op": op, **fields}
