"""SFTP as it goes by: which files, how large, with what content. Versions 3 to 6, whose names agree.

https://datatracker.ietf.org/doc/html/draft-ietf-secsh-filexfer-02 and OpenSSH's PROTOCOL, chapter 4. The
stream passes unchanged; what cannot be parsed cannot be recorded, and ends the connection. What is asked is
an event without ``ok``, what came of it one with ``ok``; a file that is closed tells its bytes and, when they
came in order from the first one, their SHA-256: of what was written (``put``) and of what was read (``get``).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from pam_agent.protocols.base import Event
from pam_agent.protocols.ssh.channel import FAULTS, USER
from pam_agent.protocols.ssh.codec import Reader

#: OpenSSH's own limit of a message is 256 KiB; its longest has that much data and a header.
MAX_MESSAGE: Final = (256 << 10) + 1024
#: Messages under way: sftp has 64 by default, more with -R.
MAX_ASKED: Final = 4096
#: Files and folders open at once: OpenSSH's server has at most 100.
MAX_FILES: Final = 1024
#: A path has at most 4096 bytes on Linux.
MAX_PATH: Final = 8192

#: Content in one event, which may have 1 MiB with six bytes for each of these.
PIECE: Final = 64 << 10

_OPEN, _CLOSE, _READ, _WRITE, _FSETSTAT, _OPENDIR, _EXTENDED = 3, 4, 5, 6, 10, 11, 200
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


@dataclass
class File:
    """A file that is open: what was read of it and written to it. ``mode``: what it was opened for."""

    path: str
    folder: bool = False
    mode: list[str] = field(default_factory=list)
    budget: int = 0
    read: Flow = field(default_factory=Flow)
    written: Flow = field(default_factory=Flow)

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

    event: Event | None = None
    opens: File | None = None
    file: File | None = None
    writes: bool = False
    offset: int = 0


class SftpWatch:
    """Both directions of one SFTP subsystem on channel ``number``."""

    def __init__(self, number: int, budget: int) -> None:
        self._number = number
        self._version = 3
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
        events = [event for file in self._files.values() for event in self._done(file, whole=False)]
        self._files.clear()
        return events

    def _message(self, side: int, message: memoryview, events: list[Event]) -> None:
        reader = Reader(message, FAULTS[side])
        number = reader.uint32()
        if message[0] in (1, 2):  # INIT and VERSION have that of the protocol; the server's holds
            self._version = number
            return
        if side == USER:
            asked = self._request(message[0], reader, message, events)
            if len(self._asked) >= MAX_ASKED:
                raise FAULTS[side]("too many sftp requests at once")
            self._asked[number] = asked
            if asked.event is not None:
                events.append(asked.event)
            return
        found = self._asked.pop(number, None)
        if found is None:
            raise FAULTS[side]("an sftp answer to no request")
        self._answer(message[0], reader, message, found, events)

    # -- requests --------------------------------------------------------------------------------------

    def _request(self, kind: int, reader: Reader, message: memoryview, events: list[Event]) -> Asked:
        if kind == _OPENDIR:
            folder = File(reader.text(MAX_PATH), folder=True)
            return Asked(self._event("list", path=folder.path), opens=folder)
        if kind == _OPEN:
            file = File(reader.text(MAX_PATH), mode=self._mode(reader), budget=self._budget)
            return Asked(self._event("open", path=file.path, mode=file.mode), opens=file)
        if kind == _CLOSE:
            closed = self._files.pop(reader.string(), None)
            if closed is not None:
                events += self._done(closed)
            return Asked()
        if kind == _FSETSTAT:
            changed = self._files.get(reader.string())
            return Asked(self._event("setstat", path=changed.path if changed else ""))
        if kind in (_READ, _WRITE):
            return self._transfer(kind, reader, message, events)
        if kind in _PATHS:
            return Asked(self._event(_PATHS[kind], path=reader.text(MAX_PATH)))
        if kind in _PAIRS:
            return Asked(self._event(_PAIRS[kind], path=reader.text(MAX_PATH), to=reader.text(MAX_PATH)))
        if kind == _EXTENDED:
            return self._extended(reader)
        return Asked()

    def _mode(self, reader: Reader) -> list[str]:
        """What a file is opened for, in words."""
        if self._version < 5:
            flags = reader.uint32()
            return [word for bit, word in _FLAGS.items() if flags & bit]
        access, flags = reader.uint32(), reader.uint32()
        words = [word for bit, word in _ACCESS.items() if access & bit]
        if flags & _APPENDING and "append" not in words:
            words.append("append")
        disposition = flags & 7
        return words + list(_DISPOSITION[disposition] if disposition < len(_DISPOSITION) else ())

    def _transfer(self, kind: int, reader: Reader, message: memoryview, events: list[Event]) -> Asked:
        handle = reader.string()
        offset = reader.uint32() << 32 | reader.uint32()
        file = self._files.get(handle)
        if file is None:
            return Asked()  # the target will say that there is no such handle
        if kind == _WRITE:
            size = reader.uint32()
            start = len(message) - size
            if start != 1 + 4 + 4 + len(handle) + 8 + 4:
                raise FAULTS[USER]("an sftp write of another size than it says")
            self._take(file, file.written, offset, message[start:], events)
        return Asked(file=file, writes=kind == _WRITE, offset=offset)

    def _extended(self, reader: Reader) -> Asked:
        name = reader.text(MAX_PATH)
        if name in _EXTENDED_QUIET:
            return Asked()
        if name in _EXTENDED_PAIRS:
            paths = reader.text(MAX_PATH), reader.text(MAX_PATH)
            return Asked(self._event(_EXTENDED_PAIRS[name], path=paths[0], to=paths[1]))
        if name == "copy-data":
            source = self._files.get(reader.string())
            reader.uint32(), reader.uint32(), reader.uint32(), reader.uint32()
            target = self._files.get(reader.string())
            if target is not None:
                target.written.used, target.written.in_order = True, False
            paths = (source.path if source else "", target.path if target else "")
            return Asked(self._event("copy", path=paths[0], to=paths[1]))
        return Asked(self._event(name, path=""))

    # -- answers ---------------------------------------------------------------------------------------

    def _answer(
        self, kind: int, reader: Reader, message: memoryview, asked: Asked, events: list[Event]
    ) -> None:
        if kind == _HANDLE and asked.opens is not None:
            if len(self._files) >= MAX_FILES:
                raise FAULTS[1]("too many files open at once over sftp")
            self._files[reader.string()] = asked.opens
        elif kind == _DATA and asked.file is not None:
            size = reader.uint32()
            if size > len(message) - 9:
                raise FAULTS[1]("sftp data of another size than it says")
            self._take(asked.file, asked.file.read, asked.offset, message[9 : 9 + size], events)
        elif kind == _STATUS:
            status = reader.uint32()
            if asked.event is not None and (status or asked.opens is None):
                events.append({**asked.event, "ok": status == 0, "status": status})
            if asked.file is not None and asked.writes and status:
                asked.file.written.ok = False

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

    def _done(self, file: File, *, whole: bool = True) -> list[Event]:
        """What came of a file that was closed; ``whole``: by the user, not by the end of the channel."""
        if file.folder:
            return []
        events = []
        for op, flow in file.flows():
            fields: dict[str, Any] = {"path": file.path, "bytes": flow.size}
            if flow.in_order:
                fields["sha256"] = flow.hash.hexdigest()
            if op == "put" and "append" in file.mode:
                fields["append"] = True  # to what was there: the hash is of these bytes alone
            events.append(self._event(op, **fields, ok=whole and flow.ok))
        return events

    def _event(self, op: str, **fields: Any) -> Event:
        return {"kind": "file", "ch": self._number, "op": op, **fields}
