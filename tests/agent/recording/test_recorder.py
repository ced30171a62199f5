"""The Recorder: acknowledged means written, a dead recorder ends the session, heads get witnessed."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pam_agent.recorder import Recorder
from pam_common.errors import PamError
from pam_common.platform_client import PlatformClient
from pam_common.recording import PartReader, Recipient, RecordingError

EVENTS: list[dict[str, Any]] = [{"kind": "query", "sql": "select 1"}]


def start(recorder: Recorder, parties, **options: Any) -> Any:
    return recorder.start_part(parties.opening(), [parties.recipient], "statement", **options)


def active(recorder: Recorder, part: Any) -> Path:
    return recorder.spool.root / "active" / part.name


def readable(parties, path: Path) -> list[dict[str, Any]]:
    """What can be read of a part that is still being written."""
    events: list[dict[str, Any]] = []
    with path.open("rb") as file, contextlib.suppress(RecordingError):
        for event in PartReader(file, [bytes(parties.secret)]).events():
            events.append(event)
    return events


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writes beyond ``size`` bytes of a file fail with EFBIG, after a short write up to it."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_what_is_acknowledged_is_in_the_file(recorder: Recorder, parties) -> None:
    before = recorder.now()
    part = start(recorder, parties)
    for count in range(1, 6):
        part.record(count, EVENTS)
        assert [event["c"] for event in readable(parties, active(recorder, part))] == list(
            range(1, count + 1)
        )
    part.record(1, [])
    part.finalise("closed by the user")
    (ready,) = recorder.spool.ready()
    report = parties.verify(ready.path)
    assert (report.problems, report.end, report.chunks) == ([], "closed by the user", 6)
    assert before - 5 < report.header.created < recorder.now() + 5


def test_connections_share_a_part(recorder: Recorder, parties) -> None:
    part = start(recorder, parties)
    threads = [
        threading.Thread(target=lambda n=n: [part.record(n, [{"kind": "n", "n": i}]) for i in range(200)])
        for n in range(1, 9)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    part.finalise("closed")
    path = recorder.spool.ready()[0].path
    assert parties.verify(path).ok
    events = parties.read(path)
    assert [event["t"] for event in events] == sorted(event["t"] for event in events)
    for number in range(1, 9):
        assert [event["n"] for event in events if event["c"] == number] == list(range(200))


def test_a_kid_of_another_key_is_no_recipient(parties) -> None:
    # Else the platform could give an allowed kid with a key of its own.
    with pytest.raises(RecordingError):
        Recipient(parties.recipient.kid, b"x" * 32)
    with pytest.raises(RecordingError):
        Recipient.from_json({"kid": parties.recipient.kid, "key": "eHh4"})


def test_without_recipients_there_is_no_recording(recorder: Recorder, parties) -> None:
    with pytest.raises(PamError, match="1 to 16 recipients"):
        recorder.start_part(parties.opening(), [], "statement")
    assert recorder.spool.counts()["active"] == 0


def test_an_event_that_cannot_be_held_does_not_kill_the_part(recorder: Recorder, parties) -> None:
    part = start(recorder, parties)
    with pytest.raises(RecordingError):
        part.record(1, [*EVENTS, {"kind": "bad", "x": object()}])
    part.record(1, EVENTS)
    part.finalise("closed")
    assert len(parties.read(recorder.spool.ready()[0].path)) == 1


def test_a_full_disk_ends_the_session_and_loses_nothing(recorder: Recorder, parties, wait_for) -> None:
    failures: list[PamError] = []
    part = start(recorder, parties, on_failure=failures.append)
    for _ in range(20):
        part.record(1, EVENTS)
    size = active(recorder, part).stat().st_size
    noise = random.Random(3).randbytes(20_000).hex()
    with file_size_limit(size + 10):
        with pytest.raises(PamError, match="cannot be recorded: File too large") as caught:
            part.record(1, [{"kind": "rows", "text": noise}])
        assert "disk" in caught.value.hint
        assert active(recorder, part).stat().st_size == size
        with pytest.raises(PamError, match="cannot be recorded"):
            part.record(1, EVENTS)
        assert [str(failure) for failure in failures] == [str(caught.value)]
        part.finalise("recorder failed")
        assert recorder.status()["unfinished"] == 1
    wait_for(lambda: recorder.spool.ready())  # signed by itself as soon as there is room
    path = recorder.spool.ready()[0].path
    report = parties.verify(path)
    assert (report.problems, report.end) == ([], "failed")
    assert len(parties.read(path)) == 20
    wait_for(lambda: recorder.status()["unfinished"] == 0)


def test_a_short_write_goes_on(recorder: Recorder, parties, monkeypatch) -> None:
    write = os.write
    monkeypatch.setattr("pam_agent.recorder.os.write", lambda fd, data: write(fd, bytes(data[:7])))
    part = start(recorder, parties)
    part.record(1, EVENTS)
    part.finalise("closed")
    assert len(parties.read(recorder.spool.ready()[0].path)) == 1


def test_the_spool_limit_ends_sessions_and_lifts_by_itself(recorder: Recorder, parties, monkeypatch) -> None:
    monkeypatch.setattr("pam_agent.spool.RECOUNT_INTERVAL", 0.0)
    recorder.spool.max_bytes = 150_000
    failures: list[PamError] = []
    part = start(recorder, parties, on_failure=failures.append)
    noise = random.Random(3).randbytes(60_000).hex()
    rows = [{"kind": "rows", "text": noise}]
    part.record(1, rows)
    part.record(1, rows)
    with pytest.raises(PamError, match="spool is full"):
        part.record(1, rows)
    assert len(failures) == 1
    with pytest.raises(PamError, match="spool is full"):
        start(recorder, parties)
    part.finalise("failed")
    (ready,) = recorder.spool.ready()
    assert parties.verify(ready.path).end == "failed"
    assert len(parties.read(ready.path)) == 2
    recorder.spool.delete(ready)
    start(recorder, parties).finalise("closed")


def test_a_disk_that_cannot_sync_kills_the_part(recorder: Recorder, parties, monkeypatch, wait_for) -> None:
    def broken(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("pam_agent.recorder.os.fdatasync", broken)
    failures: list[PamError] = []
    part = start(recorder, parties, on_failure=failures.append)
    wait_for(lambda: failures)
    with pytest.raises(PamError, match="Input/output error"):
        part.record(1, EVENTS)
    assert part.failure


def test_a_part_that_cannot_be_created_is_no_session(recorder: Recorder, parties) -> None:
    with file_size_limit(5), pytest.raises(PamError, match="cannot be recorded"):
        start(recorder, parties)
    assert recorder.status()["recording"] == 0
    assert recorder.spool.counts()["active"] == 0  # a full disk must not fill with empty files


def test_the_spool_counts_what_is_on_disk(recorder: Recorder, parties) -> None:
    for _ in range(5):
        part = start(recorder, parties)
        part.record(1, EVENTS)
        part.finalise("closed")
    assert recorder.spool.used == sum(ready.size for ready in recorder.spool.ready())
    for ready in recorder.spool.ready():
        recorder.spool.delete(ready)
    assert recorder.spool.used == 0


def test_the_end_is_made_fit_for_the_trailer(recorder: Recorder, parties) -> None:
    ends = {"": "ended", "crash": "session crash", "a\x1b[2Jb\n": "a?[2Jb?", "é" * 300: "é" * 100}
    for given in ends:
        part = start(recorder, parties)
        part.finalise(given)
        part.finalise("again")
        with pytest.raises(PamError, match="has ended"):
            part.record(1, EVENTS)
    reports = [parties.verify(ready.path) for ready in recorder.spool.ready()]
    assert [report.problems for report in reports] == [[]] * 4
    assert {report.end for report in reports} == set(ends.values())


def test_heads_are_witnessed_and_the_part_extends_them(recorder: Recorder, parties, server, wait_for) -> None:
    part = start(recorder, parties)
    for count in (1, 2, 3):
        part.record(1, EVENTS)
        wait_for(lambda count=count: any(head.count == count for head in server.heads))
    head = part.head()
    head.verify(parties.identity.public)
    part.finalise("closed")
    report = parties.verify(recorder.spool.ready()[0].path, witnesses=[*server.heads, head])
    assert report.problems == []
    assert not any(head.final for head in server.heads)


def test_a_platform_that_comes_back_gets_the_newest_head(
    recorder: Recorder, parties, server, wait_for
) -> None:
    server.faults.extend(["503", "lost", "401"])
    part = start(recorder, parties)
    part.record(1, EVENTS)
    part.record(1, EVENTS)
    wait_for(lambda: any(head.count == 2 for head in server.heads))
    part.record(1, EVENTS)
    wait_for(lambda: any(head.count == 3 for head in server.heads))


def test_a_refused_head_does_not_stop_the_next(recorder: Recorder, parties, server, wait_for) -> None:
    server.faults.extend(["409", "403"])
    part = start(recorder, parties)
    part.record(1, EVENTS)
    wait_for(lambda: not server.faults or part.record(1, EVENTS))
    part.record(1, EVENTS)
    wait_for(lambda: server.heads)


def test_stopping_finalises_what_is_open(spool, parties, platform: PlatformClient) -> None:
    recorder = Recorder(spool, parties.identity, "a1", platform)
    recorder.start()
    part = start(recorder, parties)
    part.record(0, EVENTS)
    recorder.stop()
    assert parties.verify(spool.ready()[0].path).end == "agent stopped"


def test_a_start_recovers_and_tells_the_uploader(spool, parties, platform: PlatformClient) -> None:
    told: list[int] = []
    first = Recorder(spool, parties.identity, "a1", platform)
    start(first, parties).record(1, EVENTS)  # and is never finalised
    second = Recorder(
        spool, parties.identity, "a1", platform, on_ready=lambda: told.append(len(spool.ready()))
    )
    second.start()
    second.stop()
    assert told == [1]
    assert parties.verify(spool.ready()[0].path).end == "crash"


def test_a_head_that_crosses_the_end_is_no_trouble(
    recorder: Recorder, parties, server, wait_for, caplog
) -> None:
    part = start(recorder, parties)
    with server.lock:  # the server answers nothing while we hold it
        part.record(1, EVENTS)
        wait_for(lambda: recorder._witness._posting is not None)
        server.faults.append("409")
        part.finalise("closed")
    wait_for(lambda: not server.faults)
    recorder.stop()
    assert "refuses to witness" not in caplog.text
