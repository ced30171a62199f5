"""The spool: its lock, its limit, and what a new start makes of what a crash left."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pam_agent.spool import NEW_PART_ROOM, Spool, SpoolFullError
from pam_common.errors import PamError
from pam_common.keys import SigningKey, new_session_id
from pam_common.recording import PartWriter, part_name
from pam_common.recording.format import MAX_CHUNK

EVENTS = [{"kind": "query", "sql": "select 1"}]


def writer_for(parties, session: str, identity: SigningKey | None = None) -> PartWriter:
    return PartWriter(
        session=session,
        part=1,
        agent="a1",
        identity_kid=(identity or parties.identity).kid,
        created=1_900_000_000,
        recipients=[parties.recipient],
        statement="s",
    )


def unfinished(parties, session: str, count: int = 5) -> tuple[bytes, list[int]]:
    """The bytes of a part without end, and where each chunk ends."""
    writer = writer_for(parties, session)
    data, ends = writer.opening, []
    for second in range(count):
        data += writer.append(second, 1, EVENTS)
        ends.append(len(data))
    return data, ends


def leave(spool: Spool, session: str, data: bytes) -> Path:
    path = spool.root / "active" / part_name(session, 1)
    path.write_bytes(data)
    return path


def recover(spool: Spool, parties) -> list[str]:
    return spool.recover(parties.identity, time.time)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_second_agent_on_the_spool_is_refused(spool: Spool) -> None:
    with pytest.raises(PamError, match="another agent process uses the spool") as caught:
        Spool(spool.root, max_bytes=1)
    assert "state_dir" in caught.value.hint
    spool.close()
    Spool(spool.root, max_bytes=1).close()


@pytest.mark.parametrize("broken", ["spool", "spool/ready", "spool/lock"])
def test_a_spool_that_is_none_is_refused_with_words(tmp_path: Path, broken: str) -> None:
    path = tmp_path / broken
    path.parent.mkdir(exist_ok=True)
    path.mkdir() if broken.endswith("lock") else path.write_text("not a folder")
    with pytest.raises(PamError, match=r"spool .* cannot be used: .*") as caught:
        Spool(tmp_path / "spool", max_bytes=1)
    assert str(path) in str(caught.value)


def test_nothing_is_readable_by_others_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        with Spool(tmp_path / "spool", max_bytes=1 << 20) as spool:
            os.close(spool.create(new_session_id(), 1))
    finally:
        os.umask(old)
    for path in [spool.root, *spool.root.rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.parametrize("session", ["../../etc/cron.d/x", "s-" + "a" * 25 + "/", ""])
def test_no_name_from_outside_builds_a_path(spool: Spool, session: str) -> None:
    with pytest.raises(PamError):
        spool.create(session, 1)
    assert names(spool.root / "active") == []


def test_a_part_is_recorded_once(spool: Spool) -> None:
    session = new_session_id()
    os.close(spool.create(session, 1))
    with pytest.raises(PamError, match="already being recorded"):
        spool.create(session, 1)
    spool.publish(session, 1)
    with pytest.raises(PamError, match="already recorded"):
        spool.create(session, 1)
    spool.refuse(spool.ready()[0])
    with pytest.raises(PamError, match="already recorded"):
        spool.create(session, 1)


def test_a_torn_part_keeps_every_whole_chunk(spool: Spool, parties) -> None:
    cuts: dict[str, int] = {}
    rng = random.Random(7)
    sample, ends = unfinished(parties, new_session_id())
    begin = ends[0] - 60
    for cut in rng.sample(range(begin, len(sample)), 25):
        session = new_session_id()
        data, ends = unfinished(parties, session)
        leave(spool, session, data[:cut])
        cuts[session] = sum(1 for end in ends if end <= cut)
    assert recover(spool, parties) == []
    ready = spool.ready()
    assert len(ready) == len(cuts)
    for part in ready:
        report = parties.verify(part.path)
        assert (report.problems, report.end) == ([], "crash")
        assert len(parties.read(part.path)) == cuts[part.session]


def test_zeros_after_a_power_cut_are_cut_off(spool: Spool, parties) -> None:
    session = new_session_id()
    data, _ = unfinished(parties, session)
    leave(spool, session, data + bytes(5000))
    recover(spool, parties)
    assert len(parties.read(spool.ready()[0].path)) == 5


def test_a_finished_part_that_was_not_moved_stays_as_it_is(spool: Spool, parties) -> None:
    session = new_session_id()
    writer = writer_for(parties, session)
    data = writer.opening + writer.append(0, 1, EVENTS) + writer.finish()
    trailer = writer.head(1_900_000_001, "closed").sign(parties.identity).to_trailer(parties.identity.kid)
    path = leave(spool, session, data + trailer)
    recover(spool, parties)
    assert not path.exists()
    assert spool.ready()[0].path.read_bytes() == data + trailer


def test_a_torn_trailer_is_replaced(spool: Spool, parties) -> None:
    session = new_session_id()
    writer = writer_for(parties, session)
    data = writer.opening + writer.append(0, 1, EVENTS) + writer.finish()
    trailer = writer.head(1_900_000_001, "closed").sign(parties.identity).to_trailer(parties.identity.kid)
    leave(spool, session, data + trailer[:-9])
    recover(spool, parties)
    report = parties.verify(spool.ready()[0].path)
    assert (report.problems, report.end) == ([], "crash")
    assert len(parties.read(spool.ready()[0].path)) == 1


def test_what_is_no_recording_of_ours_is_put_into_quarantine(spool: Spool, parties, tmp_path: Path) -> None:
    active, outside = spool.root / "active", tmp_path / "outside"
    outside.write_bytes(b"not ours")
    (active / "notes.txt").write_text("x")
    (active / ".." / "ready" / "notes.txt").write_text("x")
    (active / part_name(new_session_id(), 1)).write_bytes(b"")
    (active / part_name(new_session_id(), 1)).write_bytes(b"PAMREC1\n\0\0")
    (active / part_name(new_session_id(), 1)).write_bytes(os.urandom(500))
    (active / part_name(new_session_id(), 1)).symlink_to(outside)
    (active / part_name(new_session_id(), 1)).mkdir()
    os.mkfifo(active / part_name(new_session_id(), 1))
    leave(spool, new_session_id(), unfinished(parties, new_session_id())[0])  # another name than header
    session = new_session_id()
    leave(spool, session, writer_for(parties, session, SigningKey.generate()).opening)
    forged = new_session_id()
    writer = writer_for(parties, forged)
    trailer = writer.head(1, "crash").sign(SigningKey.generate()).to_trailer(parties.identity.kid)
    leave(spool, forged, writer.opening + trailer)
    assert recover(spool, parties) == []
    assert names(active) == []
    assert spool.ready() == []
    assert len(names(spool.root / "quarantine")) == 11
    assert outside.read_bytes() == b"not ours"
    assert recover(spool, parties) == []


def test_a_damaged_end_is_kept_to_be_looked_at(spool: Spool, parties) -> None:
    session = new_session_id()
    data, _ = unfinished(parties, session)
    damage = b"\xff" * (5 * MAX_CHUNK)
    leave(spool, session, data + damage)
    recover(spool, parties)
    assert parties.verify(spool.ready()[0].path).ok
    (tail,) = (spool.root / "quarantine").iterdir()
    assert tail.read_bytes() == damage


def test_the_limit_counts_all_folders_and_looks_again(spool: Spool, monkeypatch) -> None:
    monkeypatch.setattr("pam_agent.spool.RECOUNT_INTERVAL", 0.0)
    spool.max_bytes = 100_000
    junk = spool.root / "quarantine" / "junk"
    junk.write_bytes(bytes(60_000))
    spool.charge(50_000)  # not seen yet: the count is of the start
    with pytest.raises(SpoolFullError, match="is full") as caught:
        spool.charge(50_001)  # the real count has only the junk
    assert "max_spool" in caught.value.hint
    spool.charge(40_000)
    junk.unlink()
    spool.charge(60_000)
    with pytest.raises(SpoolFullError):
        spool.charge(100_000 - NEW_PART_ROOM + 1, room=NEW_PART_ROOM)


WRITER = """
import sys, time
from pathlib import Path
from pam_agent.protocols.base import Credential, Opening, Target
from pam_agent.recorder import Recorder
from pam_agent.spool import Spool
from pam_common.keys import SigningKey, b64decode
from pam_common.recording import Recipient

class Nobody:
    now = staticmethod(time.time)

root, seed, kid, key, session = sys.argv[1:]
recorder = Recorder(Spool(Path(root), max_bytes=1 << 30), SigningKey(b64decode(seed)), "a1", Nobody())
opening = Opening(session, 1, "u", "a/b", "postgres", 0, 0, Target("h", 1), Credential("x"))
part = recorder.start_part(opening, [Recipient(kid, b64decode(key))], "statement")
for n in range(10**9):
    part.record(1, [{"kind": "n", "n": n, "fill": "x" * (n * 7919 % 30000)}])
    sys.stdout.write(f"{n}\\n")
    sys.stdout.flush()
"""


def test_a_killed_agent_loses_nothing_it_acknowledged(tmp_path: Path, parties) -> None:
    from pam_common.keys import b64encode

    rng = random.Random()
    for attempt in range(4):
        root, session = tmp_path / f"spool{attempt}", new_session_id()
        keys = [parties.identity.seed(), parties.recipient.key]
        arguments = [str(root), b64encode(keys[0]), parties.recipient.kid, b64encode(keys[1]), session]
        with subprocess.Popen([sys.executable, "-c", WRITER, *arguments], stdout=subprocess.PIPE) as process:
            assert process.stdout
            for _ in range(rng.randint(1, 3000)):
                last = process.stdout.readline()
            process.kill()
            acknowledged = [last, *process.stdout.read().splitlines(keepends=True)]
        last_whole = int([line for line in acknowledged if line.endswith(b"\n")][-1])
        with Spool(root, max_bytes=1 << 30) as spool:
            assert recover(spool, parties) == []
            (part,) = spool.ready()
            report = parties.verify(part.path)
            assert (report.problems, report.end) == ([], "crash")
            numbers = [event["n"] for event in parties.read(part.path)]
        assert numbers == list(range(len(numbers)))
        assert numbers[-1] >= last_whole
