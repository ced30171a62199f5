"""The uploader against a real HTTP server that cuts lines, loses answers, and says no."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

import pytest

from pam_agent.recorder import Recorder
from pam_agent.spool import ReadyPart, Spool
from pam_agent.uploader import PIECE, Uploader
from pam_common.platform_client import PlatformClient

NOISE = random.Random(5).randbytes(1_200_000).hex()


@pytest.fixture
def uploader(spool: Spool, platform: PlatformClient, monkeypatch: pytest.MonkeyPatch) -> Iterator[Uploader]:
    monkeypatch.setattr("pam_agent.uploader.FIRST_WAIT", 0.005)
    monkeypatch.setattr("pam_agent.uploader.LONGEST_WAIT", 0.1)
    uploader = Uploader(spool, platform)
    yield uploader
    uploader.stop()


@pytest.fixture
def make(spool: Spool, parties, platform: PlatformClient) -> Any:
    """Make a finished part of about so many megabytes; the later the younger."""
    recorder = Recorder(spool, parties.identity, "a1", platform)
    clock = iter(range(1_000_000_000, 2_000_000_000))

    def make(megabytes: int = 0) -> ReadyPart:
        part = recorder.start_part(parties.opening(), [parties.recipient], "statement")
        part.record(1, [{"kind": "small"}])
        for _ in range(megabytes):
            part.record(1, [{"kind": "rows", "text": NOISE[: 1 << 19]}] * 2)
        part.finalise("closed")
        path = spool.root / "ready" / part.name
        second = next(clock)
        os.utime(path, (second, second))
        return next(ready for ready in spool.ready() if ready.path == path)

    return make


def place(ready: ReadyPart) -> tuple[str, int]:
    return ready.session, ready.part


def test_a_part_is_uploaded_and_deleted_after_the_receipt(
    uploader, make, server, spool, parties, wait_for
) -> None:
    ready = make(5)
    data = ready.path.read_bytes()
    kept: list[bool] = []
    server.check = lambda stored: not kept.append(ready.path.exists()) and parties.verify(stored).ok
    uploader.start()
    assert uploader.wait_until_empty(60)
    assert bytes(server.stored[place(ready)]) == data
    assert kept == [True]
    assert not ready.path.exists()
    assert server.largest <= PIECE
    assert len(data) > 2 * PIECE
    wait_for(lambda: uploader.status()["uploaded"] == 1)
    assert uploader.status()["uploaded_bytes"] == len(data)
    assert uploader.status()["pending"] == 0


@pytest.mark.parametrize("seed", range(4))
def test_an_upload_survives_whatever_the_line_does(uploader, make, server, parties, seed: int) -> None:
    parts = [make(3), make(0), make(2)]
    data = {place(ready): ready.path.read_bytes() for ready in parts}
    server.check = lambda stored: parties.verify(stored).ok
    server.faults.extend(random.Random(seed).choices(["", "503", "cut", "lost", "401", "lie"], k=12))
    uploader.start()
    assert uploader.wait_until_empty(60)
    assert {key: bytes(value) for key, value in server.stored.items()} == data
    assert sorted(set(server.complete)) == sorted(data)


def test_an_upload_goes_on_where_the_platform_is(uploader, make, server, parties) -> None:
    ready = make(4)
    data = ready.path.read_bytes()
    server.check = lambda stored: parties.verify(stored).ok
    server.stored[place(ready)] = bytearray(data[:1_234_567])
    uploader.start()
    assert uploader.wait_until_empty(60)
    assert bytes(server.stored[place(ready)]) == data
    assert uploader.status()["uploaded_bytes"] == len(data) - 1_234_567


def test_a_wrong_offset_is_corrected_by_the_answer(uploader, make, server) -> None:
    ready = make(3)
    data = ready.path.read_bytes()
    server.stored[place(ready)] = bytearray(data[:1_000_000])
    original = uploader._send

    # The platform has less than it said a moment ago (restored from a backup, say).
    def forget(part: Any, path: str, fd: int, offset: int) -> None:
        del server.stored[place(ready)][500_000:]
        original(part, path, fd, offset)

    uploader._send = forget
    uploader.start()
    assert uploader.wait_until_empty(60)
    assert bytes(server.stored[place(ready)]) == data


def test_a_refused_part_is_kept_and_blocks_no_other(uploader, make, server, spool, wait_for) -> None:
    refused, fine = make(1), make(1)
    server.refused[place(refused)] = "403"
    uploader.start()
    assert uploader.wait_until_empty(60)
    assert server.complete == [place(fine)]
    assert (spool.root / "refused" / refused.path.name).stat().st_size == refused.size
    # Moved back by hand, it is tried again.
    server.refused.clear()
    (spool.root / "refused" / refused.path.name).rename(refused.path)
    uploader.wake()
    assert uploader.wait_until_empty(60)
    wait_for(lambda: place(refused) in server.complete)


def test_a_part_the_platform_finds_wrong_is_put_aside(uploader, make, server, spool) -> None:
    ready = make(0)
    server.check = lambda stored: False
    uploader.start()
    assert uploader.wait_until_empty(60)
    assert (spool.root / "refused" / ready.path.name).exists()
    assert sum(1 for head in server.heads if head.final) == 5


def test_a_failing_part_does_not_block_the_others(uploader, make, server, wait_for) -> None:
    failing, fine = make(0), make(0)
    server.refused[place(failing)] = "503"
    uploader.start()
    wait_for(lambda: server.complete == [place(fine)])
    assert failing.path.exists()
    wait_for(lambda: uploader.status()["trouble"] == "no")
    server.refused.clear()
    assert uploader.wait_until_empty(60)


def test_the_oldest_part_goes_first(uploader, make, server) -> None:
    parts = [make(0) for _ in range(5)]
    uploader.start()
    assert uploader.wait_until_empty(60)
    assert server.complete == [place(ready) for ready in parts]


def test_a_damaged_part_is_put_aside(uploader, make, server, spool) -> None:
    ready = make(1)
    with ready.path.open("r+b") as file:
        file.truncate(ready.size - 5)
    uploader.start()
    assert uploader.wait_until_empty(60)
    assert server.complete == []
    assert (spool.root / "refused" / ready.path.name).exists()


def test_a_part_is_uploaded_once_the_platform_is_there(uploader, make, server, new_server, wait_for) -> None:
    port = server.server_port
    server.stop()
    ready = make(0)
    uploader.start()
    wait_for(lambda: "does not answer" in uploader.status()["trouble"])
    assert ready.path.exists()
    back = new_server(port)
    try:
        assert uploader.wait_until_empty(60)
        assert back.complete == [place(ready)]
    finally:
        back.stop()


def test_a_new_part_wakes_the_uploader(uploader, make, server, wait_for) -> None:
    uploader.start()
    wait_for(lambda: not uploader._wake.is_set())
    ready = make(0)
    uploader.wake()
    assert uploader.wait_until_empty(60)
    wait_for(lambda: server.complete == [place(ready)])
