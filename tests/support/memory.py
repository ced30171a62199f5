"""Looks for secrets where they must not be: in a process's memory, command lines, environments, files.

A process is stopped (SIGSTOP) while its memory is read, so that a value cannot move from a part that is
still to be read into one that has been.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from urllib.parse import quote, quote_plus

Needles = Mapping[str, bytes]

#: One read of a process's memory. Larger ones only need more memory here.
PIECE = 16 << 20
PAGE = os.sysconf("SC_PAGE_SIZE")
#: Bits 63 and 62 of an entry of /proc/PID/pagemap: the page is in memory, or in swap.
_HELD = 0xC0


def forms(name: str, secret: str) -> dict[str, bytes]:
    """``secret`` as the ways of writing it that somebody might meet, by name.

    Base64 comes three times: the secret may begin at any of three offsets of an encoded text.
    """
    raw = secret.encode()
    found = {
        "raw": raw,
        "hex": raw.hex().encode(),
        "HEX": raw.hex().upper().encode(),
        "json": json.dumps(secret)[1:-1].encode(),
        "url": quote(secret, safe="").encode(),
        "form": quote_plus(secret).encode(),
        # What a Python str holds when another of its characters needs two or four bytes.
        "utf-16": secret.encode("utf-16-le"),
        "utf-32": secret.encode("utf-32-le"),
    }
    for offset in range(3):
        # Without the characters whose bits are partly those of the neighbours.
        text = base64.b64encode(b"\0" * offset + raw)[(0, 2, 3)[offset] : -4]
        found[f"base64-{offset}"] = text
        found[f"base64url-{offset}"] = text.replace(b"+", b"-").replace(b"/", b"_")
    unique: dict[bytes, str] = {}
    for form, value in found.items():
        unique.setdefault(value, form)
    return {f"{name} {form}": value for value, form in unique.items()}


def contained(data: bytes, needles: Needles) -> set[str]:
    """The names of the needles that ``data`` contains."""
    return {name for name, needle in needles.items() if needle in data}


def in_memory(pid: int, needles: Needles) -> set[str]:
    """The names of the needles in any readable mapping of ``pid``; nothing of a process that is gone."""
    with _stopped(pid):  # for the copy only: on a slow machine others wait for it
        pieces = list(_pieces(pid, max(map(len, needles.values()))))
    return {name for piece in pieces for name in contained(piece, needles)}


def clients(home: Path) -> list[int]:
    """Every process of the pam-client with this home, and what that started."""
    mark = f"PAM_CLIENT_HOME={home}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


@contextlib.contextmanager
def _stopped(pid: int) -> Iterator[None]:
    try:
        os.kill(pid, signal.SIGSTOP)
    except ProcessLookupError:
        yield
        return
    try:
        deadline = time.monotonic() + 5
        while not _rests(pid) and time.monotonic() < deadline:
            time.sleep(0.001)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def _rests(pid: int) -> bool:
    """Whether every thread is stopped, or is a zombie."""
    states = []
    with contextlib.suppress(OSError):  # it ends just now
        for task in Path(f"/proc/{pid}/task").glob("*/stat"):
            with contextlib.suppress(OSError):
                states.append(task.read_text().rpartition(")")[2].split()[0])
    return all(state in "TtZX" for state in states)


def _pieces(pid: int, overlap: int) -> Iterator[bytes]:
    """All that is held of the readable mappings; pieces of one run of pages overlap."""
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        mappings = Path(f"/proc/{pid}/maps").read_text().splitlines()
        memory = stack.enter_context(Path(f"/proc/{pid}/mem").open("rb", buffering=0))
        pagemap = stack.enter_context(Path(f"/proc/{pid}/pagemap").open("rb", buffering=0))
        for mapping in mappings:
            where, rights, *_ = mapping.split()
            start, end = (int(address, 16) for address in where.split("-"))
            if "r" not in rights or mapping.endswith(("[vvar]", "[vsyscall]", "[vvar_vclock]")):
                continue
            for first, last in _held(pagemap, start, end):
                for at in range(first, last, PIECE):
                    memory.seek(at)
                    with contextlib.suppress(OSError):
                        yield memory.read(min(PIECE + overlap, last - at))


def _held(pagemap: object, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Runs of pages between two addresses that exist; most of what is mapped was never touched."""
    pagemap.seek(start // PAGE * 8)  # type: ignore[attr-defined]
    entries = pagemap.read((end - start) // PAGE * 8)  # type: ignore[attr-defined]
    held = bytes(1 if byte & _HELD else 0 for byte in entries[7::8])
    first = held.find(1)
    while first >= 0:
        last = held.find(0, first)
        last = len(held) if last < 0 else last
        yield start + first * PAGE, start + last * PAGE
        first = held.find(1, last)


def in_files(folder: Path, needles: Needles, *, without: tuple[Path, ...] = ()) -> dict[str, set[str]]:
    """{file: needles} of all files below ``folder`` but those below ``without``."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and not any(path.is_relative_to(other) for other in without):
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                if names := contained(path.read_bytes(), needles):
                    found[str(path)] = names
    return found


def in_arguments(needles: Needles) -> dict[str, set[str]]:
    """{"PID cmdline" or "PID environ": needles} of every process that may be looked at."""
    found = {}
    for name in ("cmdline", "environ"):
        for path in Path("/proc").glob(f"[0-9]*/{name}"):
            with contextlib.suppress(OSError):
                if names := contained(path.read_bytes(), needles):
                    found[f"{path.parent.name} {name}"] = names
    return found


class Watch:
    """Makes the same looks again and again in a thread of its own; remembers all that was ever found.

    ``with Watch({"relay": lambda: in_memory(pid, needles)}) as watch: …``; then ``watch.found`` is
    {look: what it found}, with looks that found nothing left out, and ``watch.rounds`` says how often.
    """

    def __init__(self, looks: Mapping[str, Callable[[], object]], *, pause: float = 0.1) -> None:
        self.found: dict[str, list[object]] = defaultdict(list)
        self.rounds = 0
        self._looks = looks
        self._pause = pause
        self._stop = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while not self._stop.wait(self._pause) or not self.rounds:
                for name, look in self._looks.items():
                    if (found := look()) and found not in self.found[name]:
                        self.found[name].append(found)
                self.rounds += 1
        except Exception as error:  # noqa: BLE001 - handed to the test's own thread
            self._error = error
        finally:
            self.found = defaultdict(list, {name: all_ for name, all_ in self.found.items() if all_})
