"""What agents were told is safe here, and is not here any more.

A database that was restored from an older backup cannot know what came after it. The agents do: they keep
the chain hashes of what was acknowledged, and ask.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pam_common.logging import get_logger, kv
from pam_platform import audit
from pam_platform.audit.models import AuditEvent
from pam_platform.recordings.models import RecordingPart
from pam_platform.recordings.store import PartStore

log = get_logger("platform.recordings")

ACTION = "recording.lost"
#: Parts of one question: the agent sends as many (``pam_agent.receipts.BATCH``).
MAX_ASKED = 200
#: Losses on the audit trail per agent, ever: what agents keep, so a lying one cannot fill the disk.
MAX_TOLD = 1000


@dataclass(frozen=True)
class Receipt:
    """A part that was acknowledged, with its final chain hash in base64url."""

    session: str
    part: int
    hash: str

    def __str__(self) -> str:
        return f"{self.session}.{self.part}"


def find_lost(agent: str, receipts: Iterable[Receipt]) -> list[Receipt]:
    """Those of ``agent``'s receipts that are not stored whole; each goes on the audit trail once."""
    asked = list(receipts)
    rows = RecordingPart.objects.filter(
        agent=agent,
        state=RecordingPart.State.COMPLETE,
        session_id__in={receipt.session for receipt in asked},
    )
    kept = {(row.session_id, row.number): row for row in rows}
    lost = [one for one in asked if not _is_kept(one, kept.get((one.session, one.part)))]
    if lost:
        _tell(f"agent {agent}", lost)
    return lost


def _is_kept(receipt: Receipt, row: RecordingPart | None) -> bool:
    if row is None or not row.head or row.head.get("hash") != receipt.hash:
        return False
    store = PartStore()
    return store.received(store.name_of(row.session_id, row.number)) == row.received


def _tell(actor: str, lost: list[Receipt]) -> None:
    told = AuditEvent.objects.filter(action=ACTION, object__in=[str(receipt) for receipt in lost])
    known = set(told.values_list("object", flat=True))
    room = MAX_TOLD - AuditEvent.objects.filter(action=ACTION, actor=actor).count()
    for receipt in [receipt for receipt in lost if str(receipt) not in known][: max(0, room)]:
        audit.record(actor, ACTION, str(receipt), "lost", hash=receipt.hash)
        fields = kv(session=receipt.session, recording_part=receipt.part, told_by=actor)
        log.error("an acknowledged recording is lost", extra=fields)
