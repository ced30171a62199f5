"""What the platform acknowledged is remembered, and asked for again."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from pam_agent.receipts import BATCH, MAX_RECEIPTS, Receipts
from pam_common.keys import b64encode, new_session_id
from pam_common.platform_client import PlatformClient
from pam_common.recording import Head

HASH = bytes(range(32))


def head(session: str, part: int = 1) -> Head:
    return Head(session, part, 1, 100, HASH, 1_900_000_000, "closed")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "receipts"


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_lost_part_is_told_once_and_found_again_by_the_next_start(
    path: Path, platform: PlatformClient, server, caplog
) -> None:
    kept, gone = new_session_id(), new_session_id()
    receipts = Receipts(path, platform)
    for session in (kept, gone):
        receipts.add(head(session))
    receipts.check()
    assert receipts.lost == []
    server.lost.add((gone, 1))
    receipts.check()  # not yet due
    assert receipts.lost == []
    for _ in range(2):
        receipts.soon()
        receipts.check()
        assert receipts.lost == [f"{gone}.1.pamrec"]
    assert errors(caplog) == ["platform has lost a recording that it acknowledged"]
    assert path.stat().st_mode & 0o777 == 0o600
    again = Receipts(path, platform)
    again.check()
    assert again.lost == receipts.lost
    server.lost.clear()  # a later backup was found
    again.soon()
    again.check()
    assert again.lost == []


def test_what_a_crash_left_of_a_write_is_removed_by_the_next_start(
    path: Path, platform: PlatformClient
) -> None:
    session = new_session_id()
    Receipts(path, platform).add(head(session))
    (path.parent / ".receipts.0123456789ab").write_bytes(b"cut sho")
    again = Receipts(path, platform)
    assert [file.name for file in path.parent.iterdir()] == ["receipts"]
    again.add(head(new_session_id()))
    assert session in path.read_text(), "what was kept is"


def test_the_newest_are_kept_and_asked_for_in_batches(path: Path, platform: PlatformClient, server) -> None:
    sessions = [new_session_id() for _ in range(MAX_RECEIPTS + 5)]
    lines = [json.dumps([f"{session}.1.pamrec", b64encode(HASH)]) for session in sessions[:-1]]
    path.write_text("\n".join(lines))
    receipts = Receipts(path, platform)
    receipts.add(head(sessions[-1]))
    server.lost.add((sessions[-1], 1))
    receipts.check()
    assert [entry["session"] for entry in server.receipts] == sessions[5:]
    assert len(server.receipts) == MAX_RECEIPTS > BATCH
    assert receipts.lost == [f"{sessions[-1]}.1.pamrec"]


def test_a_damaged_file_costs_receipts_and_no_start(path: Path, platform: PlatformClient, server) -> None:
    session = new_session_id()
    good = json.dumps([f"{session}.1.pamrec", b64encode(HASH)])
    bad = ["\xff", "[]", "7", "{}", '["../x", "y"]', json.dumps([f"{session}.2.pamrec", "no hash"])]
    path.write_text("\n".join([*bad, good]), encoding="latin-1")
    receipts = Receipts(path, platform)
    receipts.check()
    assert server.receipts == [{"session": session, "part": 1, "hash": b64encode(HASH)}]


def test_a_platform_that_does_not_answer_is_asked_again(path: Path, server, platform, caplog) -> None:
    receipts = Receipts(path, PlatformClient("http://127.0.0.1:1"))
    receipts.add(head(new_session_id()))
    for _ in range(2):
        receipts.check()
    ours = [record.message for record in caplog.records if record.message.startswith("receipts")]
    assert ours == ["receipts not checked, will try again"]
    assert receipts.lost == []
