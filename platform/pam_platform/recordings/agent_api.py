"""The API by which agents upload recordings."""

from __future__ import annotations

from typing import Annotated, Any

from django.http import HttpRequest, HttpResponse, JsonResponse
from ninja import Body, Path, Query, Router, Schema
from pydantic import Field

from pam_common.errors import AuthenticationError, RefusedError, UnavailableError
from pam_platform import audit
from pam_platform.api.fields import Key
from pam_platform.fleet.auth import AgentAuth, calling_agent
from pam_platform.recordings import receipts, uploads
from pam_platform.recordings.models import RecordingPart
from pam_platform.recordings.store import OffsetError

router = Router(auth=AgentAuth(), tags=["agents"])

SessionId = Annotated[str, Path(pattern=r"^s-[a-z2-7]{26}$")]
PartNumber = Annotated[int, Path(ge=1, le=999_999_999)]


class ReceiptEntry(Schema):
    session: Annotated[str, Field(pattern=r"^s-[a-z2-7]{26}$")]
    part: Annotated[int, Field(ge=1, le=999_999_999)]
    hash: Key


class ReceiptList(Schema):
    parts: Annotated[list[ReceiptEntry], Field(max_length=receipts.MAX_ASKED)]


@router.post("/agent/recordings/check")
def check_receipts(request: HttpRequest, body: ReceiptList) -> dict[str, Any]:
    """Which of these parts, each once acknowledged to the calling agent, are not here any more."""
    asked = [receipts.Receipt(**entry.dict()) for entry in body.parts]
    lost = receipts.find_lost(calling_agent(request).name, asked)
    return {"lost": [{"session": one.session, "part": one.part} for one in lost]}


@router.put("/agent/recordings/{session}/{part}")
def put_bytes(
    request: HttpRequest, session: SessionId, part: PartNumber, offset: Annotated[int, Query(ge=0)]
) -> HttpResponse:
    """Append bytes at ``offset``; they are on the disk when this answers."""
    row = _part(request, session, part)
    try:
        return JsonResponse({"received": uploads.add_bytes(row, offset, _content(request))})
    except OffsetError as error:
        return JsonResponse({"detail": str(error), "received": error.received}, status=409)


@router.get("/agent/recordings/{session}/{part}")
def get_state(request: HttpRequest, session: SessionId, part: PartNumber) -> HttpResponse:
    """How much is stored, so that an interrupted upload can go on."""
    row = _part(request, session, part)
    complete = row.state == RecordingPart.State.COMPLETE
    return JsonResponse({"received": uploads.received(row), "complete": complete})


@router.post("/agent/recordings/{session}/{part}/head")
def post_head(
    request: HttpRequest, session: SessionId, part: PartNumber, body: Annotated[dict[str, Any], Body()]
) -> HttpResponse:
    """Witness a signed chain head; the final one completes the part."""
    row = _part(request, session, part)
    try:
        return JsonResponse({"complete": uploads.add_head(row, uploads.parse_head(row, body))})
    except AuthenticationError as error:
        # Not 401: the caller is known, its recording is not acceptable.
        raise RefusedError(str(error)) from error


def _part(request: HttpRequest, session: str, part: int) -> RecordingPart:
    agent = calling_agent(request).name
    try:
        return uploads.part_of_agent(session, part, agent)
    except RefusedError:
        audit.record(f"agent {agent}", "recording.upload", session, "refused", part=part)
        raise


def _content(request: HttpRequest) -> bytes:
    """The whole body; read as a stream, since Django caps ``request.body`` at less than this."""
    text = request.headers.get("Content-Length", "")
    length = int(text) if text.isdecimal() else 0
    if not 0 < length <= uploads.MAX_REQUEST:
        raise RefusedError(f"a request carries 1 to {uploads.MAX_REQUEST} bytes of a recording")
    try:
        data = request.read(length)
    except OSError:  # the server's deadline on reads passed, or the connection broke
        data = b""
    if len(data) != length:
        raise UnavailableError("the request ended before its content; send it again")
    return data
