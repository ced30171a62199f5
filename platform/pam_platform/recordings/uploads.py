"""Taking in recordings: bytes in order, heads that only grow, a verified end.

The file's size is what counts as received; the row's number follows it and is only for display. A part
is written by the agent it was begun for and by nobody else; once complete, nothing changes it.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime

from django.conf import settings
from django.db import IntegrityError, transaction
from django.db.models import Max

from pam_common.errors import AuthenticationError, RefusedError, UnavailableError
from pam_common.logging import get_logger, kv
from pam_common.recording import Head, RecordingError
from pam_common.tokens import b64decode, b64encode
from pam_platform.access.errors import ConflictError
from pam_platform.recordings.checks import check_part
from pam_platform.recordings.models import RecordingPart, Witness
from pam_platform.recordings.store import PartStore, append

log = get_logger("platform.recordings")

# What one request may carry; agents send chunks of a few hundred KiB, and each worker thread holds one.
MAX_REQUEST = 4 * 1024 * 1024
# A day of bulk statements at the agent's budgets stays far below; more is a fault or an attack.
DEFAULT_MAX_PART = 16 * 1024**3
# A head every 5 s for 3 days. Beyond, the newest replaces the one before it: the chain makes the last
# head stand for all earlier ones.
MAX_WITNESSES = 50_000
_MAX_TIME = 1 << 62
# Openings of one session are few, and the caller holds its row anyway.
_MAX_TRIES = 5


def begin_part(session: str, agent: str, identity_key: str) -> RecordingPart:
    """A new part of the session, to be written by ``agent`` (public key in base64url)."""
    for _ in range(_MAX_TRIES):
        last = RecordingPart.objects.filter(session_id=session).aggregate(last=Max("number"))["last"] or 0
        try:
            with transaction.atomic():
                return RecordingPart.objects.create(
                    session_id=session, number=last + 1, agent=agent, identity_key=identity_key
                )
        except IntegrityError:  # another opening took the number; take the next
            continue
    raise UnavailableError("too many agents open the session at once")


def part_of_agent(session: str, number: int, agent: str) -> RecordingPart:
    """The part, if this agent may write it. Raises RefusedError; whether it exists is not told."""
    part = RecordingPart.objects.filter(session_id=session, number=number, agent=agent).first()
    if part is None:
        raise RefusedError("this agent has no such recording part")
    return part


def add_bytes(part: RecordingPart, offset: int, data: bytes) -> int:
    """Append to the part's file; returns how much is stored now, on the disk.

    Raises OffsetError, ConflictError for a finished part, RefusedError above the size limit,
    UnavailableError when the disk cannot take it.
    """
    limit = _max_part()
    if offset + len(data) > limit:
        raise RefusedError(f"a recording part has at most {limit} bytes")
    store = PartStore()
    with store.locked(store.name_of(part.session_id, part.number)) as fd:
        part.refresh_from_db()
        if part.state == RecordingPart.State.COMPLETE:
            if offset + len(data) <= part.received:
                return part.received  # a repeated request whose answer was lost
            raise ConflictError("the recording part is complete")
        received = append(fd, offset, data)
        RecordingPart.objects.filter(pk=part.pk).update(received=received, updated=_now())
    return received


def received(part: RecordingPart) -> int:
    """How many bytes of the part are stored."""
    store = PartStore()
    return store.received(store.name_of(part.session_id, part.number))


def add_head(part: RecordingPart, head: Head) -> bool:
    """Witness a signed chain head; a final one ends the part once the whole file verifies.

    Returns whether the part is complete. Raises AuthenticationError for a wrong signature,
    ConflictError for a head that contradicts an earlier one or a file that does not verify.
    """
    head.verify(b64decode(part.identity_key))
    if not head.final:
        _witness(part, head)
        return False
    store = PartStore()
    with store.locked(store.name_of(part.session_id, part.number)) as fd:
        part.refresh_from_db()
        if part.state == RecordingPart.State.COMPLETE:
            if part.head != head.to_json():
                raise ConflictError("the recording part is complete with another head")
            return True
        part.received = os.fstat(fd).st_size
        if part.received < head.length:
            raise ConflictError(f"only {part.received} of {head.length} bytes are stored yet")
        _complete(part, head)
    return True


def _witness(part: RecordingPart, head: Head) -> None:
    with transaction.atomic():
        # Row lock on PostgreSQL, whole-database lock on SQLite: heads are compared one after another.
        part = RecordingPart.objects.select_for_update().get(pk=part.pk)
        if part.state == RecordingPart.State.COMPLETE:
            raise ConflictError("the recording part is complete")
        # Every chunk has bytes, and the format's 64-bit numbers are larger than the database's.
        if not head.count <= head.length <= _max_part() or head.time > _MAX_TIME:
            raise ConflictError("the head is beyond what a part may have")
        last = part.witnesses.last()
        if last is not None and _extends(last, head):
            return
        if part.witnesses.count() >= MAX_WITNESSES and last is not None:
            last.delete()
        part.witnesses.create(
            count=head.count,
            length=head.length,
            hash=b64encode(head.hash),
            time=head.time,
            signature=b64encode(head.signature),
        )


def _extends(last: Witness, head: Head) -> bool:
    """True when ``head`` says nothing new; ConflictError when it contradicts ``last``."""
    if head.count == last.count and head.length == last.length and b64encode(head.hash) == last.hash:
        return True
    if head.count <= last.count or head.length <= last.length:
        raise ConflictError("the head does not extend the last one witnessed")
    return False


def _complete(part: RecordingPart, head: Head) -> None:
    report = check_part(part, head)
    if report.problems:
        part.state, part.problem = RecordingPart.State.FAILED, report.problems[0][:500]
        part.save()
        log.error("recording refused", extra=kv(session=part.session_id, part=part.number, why=part.problem))
        raise ConflictError(f"the recording does not verify: {part.problem}")
    part.state, part.problem, part.head = RecordingPart.State.COMPLETE, "", head.to_json()
    part.completed = _now()
    part.save()
    log.info("recording complete", extra=kv(session=part.session_id, part=part.number, bytes=part.received))


def parse_head(part: RecordingPart, body: object) -> Head:
    """The posted head. Raises ConflictError when it is not one."""
    try:
        return Head.from_json(part.session_id, part.number, body)
    except (RecordingError, AuthenticationError) as error:
        raise ConflictError(str(error)) from error


def _max_part() -> int:
    return int(getattr(settings, "PAM_MAX_RECORDING_PART", DEFAULT_MAX_PART))


def _now() -> datetime:
    return datetime.now(UTC)
