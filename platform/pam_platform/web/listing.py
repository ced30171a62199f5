"""Sessions as the pages list them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from pam_platform.access import listing
from pam_platform.access.models import Session
from pam_platform.accounts.models import User
from pam_platform.recordings.rights import known_sessions

# A screenful or two.
PAGE_SIZE = 50


@dataclass(frozen=True)
class SessionRow:
    """What a page says of a session."""

    id: str
    user: str
    account: str
    gateway: str
    agent: str
    state: str
    begun: datetime
    ended: datetime | None
    session_end: datetime
    end_reason: str
    recording: str


@dataclass(frozen=True)
class Page:
    """Some sessions, newest first; ``next`` is the ``before`` of the following page."""

    rows: tuple[SessionRow, ...]
    next: str = ""


def row(session: Session) -> SessionRow:
    """One session's row."""
    return SessionRow(
        id=session.pk,
        user=session.user_name,
        account=session.account_name,
        gateway=session.gateway_name,
        agent=session.agent_name,
        state=session.shown_state(),
        begun=session.opened or session.granted,
        ended=session.ended,
        session_end=session.session_end,
        end_reason=session.end_reason,
        recording=listing.recording_state(session),
    )


def sessions(user: User, *, state: str = "", wanted_user: str = "", before: str = "") -> Page:
    """The sessions ``user`` may know of, before the session with id ``before``."""
    found = known_sessions(user)
    if state in listing.STATES:
        found = found.filter(listing.in_state(state))
    if wanted_user:
        found = found.filter(user_name=wanted_user)
    if before:
        found = listing.before(found, before)
    some = list(found.order_by("-granted", "-id").prefetch_related("parts")[: PAGE_SIZE + 1])
    shown = some[:PAGE_SIZE]
    return Page(tuple(map(row, shown)), shown[-1].pk if len(some) > PAGE_SIZE else "")
