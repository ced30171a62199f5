"""Sessions as lists and single ones show them."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from django.db.models import Q, QuerySet
from django.utils import timezone

from pam_platform import audit
from pam_platform.access.errors import NotFoundError
from pam_platform.access.models import Session
from pam_platform.accounts.models import User

STATES = ("granted", "active", "ended", "expired")


def in_state(state: str) -> Q:
    """The filter that agrees with :meth:`Session.shown_state`. ``state`` is one of STATES."""
    now = timezone.now()
    granted, active = Session.State.GRANTED, Session.State.ACTIVE
    return {
        "granted": Q(state=granted, grant_expires__gt=now),
        "expired": Q(state=granted, grant_expires__lte=now),
        "active": Q(state=active, session_end__gt=now),
        "ended": Q(state=Session.State.ENDED) | Q(state=active, session_end__lte=now),
    }[state]


def before(rows: QuerySet[Session], session_id: str) -> QuerySet[Session]:
    """Those that come after ``session_id`` in the newest-first order; none for an unknown one."""
    last = Session.objects.filter(pk=session_id).first()
    if last is None:
        return rows.none()
    return rows.filter(Q(granted__lt=last.granted) | Q(granted=last.granted, pk__lt=last.pk))


def find(user: User, session_id: str) -> Session:
    """The session, if ``user`` may know of it. Raises NotFoundError, whether it exists or not; on record
    either way, for ids do not come up by chance."""
    from pam_platform.recordings.rights import may_know

    session = Session.objects.filter(pk=session_id).prefetch_related("parts").first()
    if session is None or not may_know(user, session):
        audit.record(user, "session.find", session_id, "refused")
        raise NotFoundError("no such session", hint="pam-client sessions ls lists yours")
    return session


def shown(session: Session, now: datetime | None = None) -> dict[str, Any]:
    """The session as the API gives it; times in UNIX seconds."""
    started = session.opened or session.granted
    return {
        "id": session.pk,
        "user": session.user_name,
        "account": session.account_name,
        "protocol": session.protocol,
        "gateway": session.gateway_name,
        "agent": session.agent_name or None,
        "policy": session.policy_name,
        "state": session.shown_state(now),
        "started": int(started.timestamp()),
        "ended": int(session.ended.timestamp()) if session.ended else None,
        "session_end": int(session.session_end.timestamp()),
        "end_reason": session.end_reason or None,
        "recording": recording_state(session),
        "connections": session.connections,
        "bytes_up": session.bytes_up,
        "bytes_down": session.bytes_down,
    }


def recording_state(session: Session) -> str:
    """``none``, ``partial``, ``complete``, or ``failed`` when a part does not verify."""
    states = {part.state for part in session.parts.all()}
    if not states:
        return "none"
    if "failed" in states:
        return "failed"
    return "complete" if states == {"complete"} else "partial"
