"""What agents ask: enrolment, renewal, opening and closing sessions, their inbox."""

from __future__ import annotations

from typing import Annotated, Any

from django.conf import settings
from django.http import HttpRequest
from ninja import Body, Query, Router, Schema
from pydantic import Field, StringConstraints

from pam_common.errors import AuthenticationError
from pam_common.keys import KEY_SIZE, b64decode
from pam_platform.access import scanning
from pam_platform.access.opening import close_session, note_alarm, open_session
from pam_platform.access.ssh import SshKeys
from pam_platform.api.fields import (
    Count,
    Key,
    KeyLine,
    Label,
    PartNumber,
    Reason,
    ScanPath,
    SessionPath,
    Token,
    Version,
)
from pam_platform.fleet import enrolment, inbox
from pam_platform.fleet.auth import AgentAuth, EnrolAuth, calling_agent
from pam_platform.fleet.models import Agent
from pam_platform.fleet.statements import renewal

router = Router(auth=AgentAuth(), tags=["agents"])


class AgentEnrolment(Schema):
    token: Token
    name: Label
    identity_key: Key
    noise_key: Key
    sealing_key: Key
    version: Version = ""


class ClosedReport(Schema):
    part: PartNumber
    reason: Reason
    connections: Count = 0
    bytes_up: Count = 0
    bytes_down: Count = 0


class Alarm(Schema):
    reason: Reason


class ScanReport(Schema):
    """The keys that a server showed, as lines, or why there are none."""

    keys: Annotated[list[KeyLine], Field(max_length=scanning.MAX_SCANNED_KEYS)]
    error: Annotated[str, StringConstraints(max_length=300, pattern=r"^[^\x00-\x1f\x7f]*$")] = ""


class SessionKeys(Schema):
    """Raw Ed25519 public keys that the agent made for one SSH session."""

    host: Key
    user: Key


class OpenBody(Schema):
    ssh_keys: SessionKeys | None = None


@router.post("/agent/enrol", auth=EnrolAuth())
def enrol(request: HttpRequest, body: AgentEnrolment) -> dict[str, Any]:
    """Enrol an agent with a one-time token; the request is signed by the key that it enrols."""
    public = body.dict(include={"identity_key", "noise_key", "sealing_key"})
    proof: str = request.auth  # type: ignore[attr-defined]
    agent = enrolment.enrol_agent(body.token, body.name, public, body.version, proof)
    return {"agent": agent.name, "issuer": settings.PAM_ISSUER, **renewal(agent)}


@router.post("/agent/renew")
def renew(request: HttpRequest) -> dict[str, Any]:
    """The trust list, statement and certificate for the next day."""
    agent = calling_agent(request)
    inbox.mark_seen(agent)
    return renewal(agent)


@router.post("/agent/sessions/{session}/open")
def open_(
    request: HttpRequest, session: SessionPath, body: Annotated[OpenBody | None, Body()] = None
) -> dict[str, Any]:
    """May this session begin here, and with what? The keys are for SSH sessions, and required there."""
    given = body.ssh_keys if body is not None else None
    keys = SshKeys(b64decode(given.host, KEY_SIZE), b64decode(given.user, KEY_SIZE)) if given else None
    return open_session(session, calling_agent(request), keys)


@router.post("/agent/sessions/{session}/closed")
def closed(request: HttpRequest, session: SessionPath, body: ClosedReport) -> dict[str, Any]:
    """Nothing of the session runs any more on this agent."""
    close_session(session, calling_agent(request), body.dict())
    return {}


@router.post("/agent/sessions/{session}/alarm")
def alarm(request: HttpRequest, session: SessionPath, body: Alarm) -> dict[str, Any]:
    """The session's target, or a jump host before it, is not who it must be: nothing was sent to it."""
    note_alarm(session, calling_agent(request), body.reason)
    return {}


@router.post("/agent/scans/{scan}")
def scanned(request: HttpRequest, scan: ScanPath, body: ScanReport) -> dict[str, Any]:
    """What an SSH server showed to the agent that was asked to look."""
    scanning.answer(scan, calling_agent(request), body.keys, body.error)
    return {}


@router.get("/agent/inbox")
def get_inbox(
    request: HttpRequest,
    after: Annotated[int, Query(ge=-1, le=(1 << 62))] = -1,
    wait: Annotated[float, Query(ge=0, le=inbox.MAX_WAIT)] = 0,
) -> dict[str, Any]:
    """Messages after ``after``, for which the answer is held back up to ``wait`` seconds."""
    agent = calling_agent(request)
    answer = inbox.poll(agent, after, wait)
    if agent.state != Agent.State.ACTIVE:
        raise AuthenticationError("this agent was revoked")
    return answer
