"""The API by which people see, check and download recordings. Every look is on the audit trail."""

from __future__ import annotations

from typing import Annotated, Any

from django.http import FileResponse, HttpRequest, HttpResponseBase, StreamingHttpResponse
from ninja import Path, Router, Schema

from pam_common.errors import RefusedError
from pam_common.recording import part_name
from pam_platform import audit
from pam_platform.access.errors import NotFoundError
from pam_platform.access.listing import find
from pam_platform.access.models import Session
from pam_platform.accounts.api import UserAuth, caller
from pam_platform.recordings import rights
from pam_platform.recordings.checks import check_session
from pam_platform.recordings.models import RecordingPart
from pam_platform.recordings.store import PartStore
from pam_platform.recordings.viewing import ndjson

router = Router(auth=UserAuth(), tags=["people"])

SessionId = Annotated[str, Path(pattern=r"^s-[a-z2-7]{26}$")]
PartNumber = Annotated[int, Path(ge=1, le=999_999_999)]


class PartVerdict(Schema):
    part: int
    ok: bool
    problems: list[str]
    end: str | None
    chunks: int
    bytes: int


class Verdict(Schema):
    ok: bool
    parts: list[PartVerdict]


@router.get("/sessions/{session}/events")
def get_events(request: HttpRequest, session: SessionId) -> HttpResponseBase:
    """The recorded events as NDJSON, decrypted while they are sent."""
    found = _viewable(request, session, "events")
    return StreamingHttpResponse(
        ndjson(list(found.parts.all())),
        content_type="application/x-ndjson",
        headers={"Content-Disposition": f'attachment; filename="{found.pk}.ndjson"'},
    )


@router.get("/sessions/{session}/verify", response=Verdict)
def get_verdict(request: HttpRequest, session: SessionId) -> dict[str, Any]:
    """Whether every part is what its agent signed. No parts and ``ok``: nothing was recorded."""
    found = _viewable(request, session, "verify")
    checks = check_session(found)
    parts = [{**vars(one), "ok": one.ok, "problems": list(one.problems)} for one in checks]
    return {"ok": all(one.ok for one in checks), "parts": parts}


@router.get("/sessions/{session}/parts/{number}/raw")
def get_raw(request: HttpRequest, session: SessionId, number: PartNumber) -> HttpResponseBase:
    """The encrypted file as it is stored."""
    found = _viewable(request, session, "raw", part=number)
    store, name = PartStore(), PartStore.name_of(found.pk, number)
    part: RecordingPart | None = found.parts.filter(number=number).first()
    if part is None or not store.exists(name):
        raise NotFoundError("no such recording part")
    return FileResponse(
        store.open(name),
        as_attachment=True,
        filename=part_name(found.pk, number),
        content_type="application/octet-stream",
    )


def _viewable(request: HttpRequest, session: str, what: str, **details: object) -> Session:
    """The session, if the caller may see its recording; 404 when they may not even know of it."""
    user = caller(request)
    found = find(user, session)
    allowed = rights.may_view(user, found)
    outcome = "ok" if allowed else "refused"
    audit.record(user.username, "recording.view", session, outcome, what=what, **details)
    if not allowed:
        raise RefusedError("policy does not open this recording to you")
    return found
