"""Are the stored recordings still what the agents signed and the platform saw?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pam_common.errors import PamError
from pam_common.recording import Head, VerifyReport, parse_part_name, verify_part
from pam_common.tokens import b64decode
from pam_platform.access.models import Session
from pam_platform.audit.models import AuditEvent
from pam_platform.recordings.models import RecordingPart, Witness
from pam_platform.recordings.receipts import ACTION as LOST
from pam_platform.recordings.store import PartStore


@dataclass(frozen=True)
class PartCheck:
    """What verifying one part found. ``state`` is the row's, or ``unknown`` for a file without row."""

    session: str
    part: int
    state: str
    problems: tuple[str, ...] = ()
    end: str | None = None
    chunks: int = 0
    bytes: int = 0

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def in_progress(self) -> bool:
        """Still arriving: not verifiable yet, which is no damage."""
        return self.state == RecordingPart.State.RECEIVING


def check_part(part: RecordingPart, head: Head | None = None) -> VerifyReport:
    """Verify the part's file with public keys, against its witnesses and the final ``head``."""
    store = PartStore()
    name = store.name_of(part.session_id, part.number)
    if not store.exists(name):
        return VerifyReport(problems=["the file is lost"])
    with store.reading(name) as file:
        report = verify_part(
            file,
            agent_keys={part.agent: [b64decode(part.identity_key)]},
            witnesses=[_head_of(witness, part) for witness in part.witnesses.all()],
            session=part.session_id,
            part=part.number,
        )
    if head is not None and report.head is not None and report.head != head:
        report.problems.append("the file ends with another head than the agent stated")
    return report


def check(part: RecordingPart) -> PartCheck:
    """Verify a part as it is stored now."""
    size = PartStore().received(PartStore.name_of(part.session_id, part.number))
    if part.state == RecordingPart.State.RECEIVING:
        problems, report = [f"not complete yet: {size} bytes arrived"], VerifyReport()
    else:
        report = check_part(part, _final_head(part))
        problems = list(report.problems)
        if part.state == RecordingPart.State.COMPLETE and size != part.received:
            problems.append(f"the file has {size} bytes, {part.received} were acknowledged")
    return PartCheck(
        session=part.session_id,
        part=part.number,
        state=part.state,
        problems=tuple(problems),
        end=report.end,
        chunks=report.chunks,
        bytes=size,
    )


def check_session(session: Session) -> list[PartCheck]:
    """Verify all that there is of a session, and name what should be there and is not. Nothing: nothing was
    recorded."""
    # The lost last: whoever fetches the parts one by one has those that are there before one that is not.
    lost = [PartCheck(session.pk, number, "unknown", ("the recording is lost",)) for number in _lost(session)]
    return [check(part) for part in session.parts.all()] + lost


def _lost(session: Session) -> list[int]:
    """Parts that were begun and are not here: each one that an agent was let into the session for, and those
    of which a database restored from a backup knows only what their agent told (see ``receipts``)."""
    begun = set(range(1, session.part + 1))
    told = AuditEvent.objects.filter(action=LOST, object__startswith=f"{session.pk}.")
    begun |= {int(name.rpartition(".")[2]) for name in told.values_list("object", flat=True)}
    return sorted(begun - {part.number for part in session.parts.all()})


def verify_all() -> Iterator[PartCheck]:
    """Check every part the database knows and every file it does not; one at a time, any number."""
    for part in RecordingPart.objects.order_by("pk").iterator(chunk_size=100):
        try:
            yield check(part)
        except (OSError, PamError) as error:
            problems = (f"cannot be read: {error}",)
            yield PartCheck(part.session_id, part.number, part.state, problems)
    yield from _files_without_row()


def _files_without_row() -> Iterator[PartCheck]:
    for path in sorted(Path(PartStore().location).glob("*/*")):
        place = parse_part_name(path.name)
        if place is None:
            yield PartCheck(path.name[:80], 0, "unknown", ("not a recording's file name",))
            continue
        session, part = place
        if not RecordingPart.objects.filter(session_id=session, number=part).exists():
            yield PartCheck(session, part, "unknown", ("the database knows no such part",))


def _final_head(part: RecordingPart) -> Head | None:
    return Head.from_json(part.session_id, part.number, part.head) if part.head else None


def _head_of(witness: Witness, part: RecordingPart) -> Head:
    return Head(
        session=part.session_id,
        part=part.number,
        count=witness.count,
        length=witness.length,
        hash=b64decode(witness.hash),
        time=witness.time,
        signature=b64decode(witness.signature),
    )
