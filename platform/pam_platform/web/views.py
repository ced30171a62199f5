"""The pages. Each asks for a login, and shows only what the person may see (else: not found)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

from django.conf import settings
from django.contrib import messages
from django.contrib.auth.decorators import login_required
from django.http import Http404, HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_POST, require_safe

from pam_common.errors import RefusedError
from pam_common.recording import RecordingError
from pam_platform import audit
from pam_platform.access import ending
from pam_platform.access.errors import NotFoundError
from pam_platform.access.listing import STATES, find
from pam_platform.access.models import Session
from pam_platform.accounts.models import User
from pam_platform.recordings import rights
from pam_platform.recordings.checks import check_session
from pam_platform.recordings.models import RecordingPart
from pam_platform.recordings.viewing import events_of
from pam_platform.web import events as event_rows
from pam_platform.web import exchanges as exchange_rows
from pam_platform.web import listing

# A reason is one line of the audit trail.
_MAX_REASON = 200


@require_safe
@login_required
def home(request: HttpRequest) -> HttpResponse:
    """Greeting, how to connect, and the person's running sessions."""
    user = _user(request)
    page = listing.sessions(user, state="active", wanted_user=user.username)
    # A fresh machine does not know the platform yet.
    return render(request, "web/home.html", {"running": page.rows, "public_url": settings.PAM_ISSUER})


@require_safe
@login_required
def sessions(request: HttpRequest) -> HttpResponse:
    """The sessions the person may see, newest first, by state and user."""
    user = _user(request)
    state, wanted = request.GET.get("state", ""), request.GET.get("user", "")
    page = listing.sessions(user, state=state, wanted_user=wanted, before=request.GET.get("before", ""))
    older = urlencode({"state": state, "user": wanted, "before": page.next}) if page.next else ""
    context = {
        "sessions": page.rows,
        "older": older,
        "states": STATES,
        "state": state,
        "wanted_user": wanted,
        "sees_others": user.is_admin or user.is_auditor,
    }
    return render(request, "web/sessions.html", context)


@require_safe
@login_required
def session(request: HttpRequest, session_id: str) -> HttpResponse:
    """One session: what, who, when, and its recording's parts."""
    user, found = _user(request), _session(request, session_id)
    context = {
        "session": listing.row(found),
        "parts": found.parts.all(),
        "may_view": rights.may_view(user, found),
        "may_kill": rights.may_kill(user, found),
    }
    return render(request, "web/session.html", context)


@require_POST
@login_required
def kill(request: HttpRequest, session_id: str) -> HttpResponse:
    """End a session at once: its owner or an admin."""
    user, found = _user(request), _session(request, session_id)
    if not rights.may_kill(user, found):
        audit.record(user, "session.kill", session_id, "refused")
        raise Http404
    reason = request.POST.get("reason", "").strip()[:_MAX_REASON]
    try:
        ending.kill(found, user, reason)
    except RefusedError as error:
        messages.error(request, f"Not killed: {error}.")
    else:
        messages.success(request, "The session was killed.")
    return redirect("session", session_id=session_id)


@require_POST
@login_required
def verify(request: HttpRequest, session_id: str) -> HttpResponse:
    """Verify every part and show what was found; POST, for it reads whole files."""
    found = _viewable(request, session_id, "verify")
    checks = check_session(found)
    return render(request, "web/verify.html", {"session": listing.row(found), "checks": checks})


@require_safe
@login_required
def recording(request: HttpRequest, session_id: str, number: int) -> HttpResponse:
    """A page of a part's events; of a web application's its requests, unless the events are asked for."""
    start = _number(request.GET.get("from", ""))
    found = _viewable(request, session_id, "events", part=number, start=start)
    part = found.parts.filter(number=number).first()
    if part is None:
        raise Http404
    web = found.protocol == "http"
    as_requests = web and request.GET.get("view") != "events"
    read, size = (
        (exchange_rows.page, exchange_rows.PAGE_SIZE)
        if as_requests
        else (event_rows.page, event_rows.PAGE_SIZE)
    )
    # What is wrong, when the recording ends in damage within the page.
    problems: list[str] = []
    page = read(_until_damage(part, problems), start)
    context = {
        "session": listing.row(found),
        "part": part,
        "page": page,
        "problem": "".join(problems),
        "start": start,
        "previous": max(0, start - size),
        "web": web,
    }
    return render(request, "web/requests.html" if as_requests else "web/recording.html", context)


def _until_damage(part: RecordingPart, problems: list[str]) -> Iterator[dict[str, Any]]:
    try:
        yield from events_of(part)
    except RecordingError as error:
        problems.append(f"{error}. {error.hint}".strip() if error.hint else str(error))


def _user(request: HttpRequest) -> User:
    assert isinstance(request.user, User)  # login_required
    return request.user


def _session(request: HttpRequest, session_id: str) -> Session:
    """The session, if the person may know of it; not found otherwise, whether it exists or not."""
    try:
        return find(_user(request), session_id)
    except NotFoundError as error:
        raise Http404 from error


def _viewable(request: HttpRequest, session_id: str, what: str, **details: object) -> Session:
    """The session, if the person may see its recording; that they looked is on record first."""
    user, found = _user(request), _session(request, session_id)
    allowed = rights.may_view(user, found)
    outcome = "ok" if allowed else "refused"
    audit.record(user.username, "recording.view", session_id, outcome, what=what, **details)
    if not allowed:
        raise Http404
    return found


def _number(text: str) -> int:
    """A position in the recording; anything else is the beginning. Nine digits are beyond any file."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else 0
