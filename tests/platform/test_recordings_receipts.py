"""A recording that was acknowledged and is gone is found by its agent's receipt."""

from pathlib import Path

import pytest

from pam_common.keys import b64encode, new_session_id
from pam_platform.recordings import receipts
from pam_platform.recordings.models import RecordingPart
from pam_platform.recordings.receipts import Receipt, find_lost
from pam_platform.recordings.store import PartStore

pytestmark = pytest.mark.usefixtures("db")

HASH = b64encode(b"h" * 32)


@pytest.fixture
def stored(new_session):
    """A complete part with ten bytes, and its receipt."""
    part = RecordingPart.objects.create(
        session=new_session(),
        number=1,
        agent="dc1-a",
        identity_key="k" * 43,
        state=RecordingPart.State.COMPLETE,
        received=10,
        head={"hash": HASH},
    )
    path = Path(PartStore().path(PartStore.name_of(part.session_id, 1)))
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x" * 10)
    return path, Receipt(part.session_id, 1, HASH)


def losses(audit_trail):
    return [entry for entry in audit_trail() if entry[1] == "recording.lost"]


def test_what_is_stored_is_not_lost(stored, audit_trail):
    assert find_lost("dc1-a", [stored[1]]) == []
    assert losses(audit_trail) == []


@pytest.mark.parametrize("damage", ["no file", "shorter", "not complete", "another hash", "another agent"])
def test_what_is_not_stored_whole_is_lost(stored, damage):
    path, receipt = stored
    match damage:
        case "no file":
            path.unlink()
        case "shorter":
            path.write_bytes(b"x" * 9)
        case "not complete":
            RecordingPart.objects.update(state=RecordingPart.State.RECEIVING)
        case "another hash":
            receipt = Receipt(receipt.session, 1, b64encode(b"i" * 32))
    agent = "dc1-b" if damage == "another agent" else "dc1-a"
    assert find_lost(agent, [receipt]) == [receipt]


def test_a_loss_is_on_the_audit_trail_once(audit_trail):
    receipt = Receipt(new_session_id(), 2, HASH)
    for _ in range(3):
        assert find_lost("dc1-a", [receipt]) == [receipt]
    entry = ("agent dc1-a", "recording.lost", f"{receipt.session}.2", "lost", {"hash": HASH})
    assert losses(audit_trail) == [entry]


def test_a_lying_agent_cannot_fill_the_audit_trail(audit_trail, monkeypatch):
    monkeypatch.setattr(receipts, "MAX_TOLD", 5)
    for _ in range(3):
        find_lost("dc1-a", [Receipt(new_session_id(), 1, HASH) for _ in range(3)])
    assert len(losses(audit_trail)) == 5
