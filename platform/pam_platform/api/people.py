"""What people and programs ask: what they may use, and a session on it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from django.http import HttpRequest
from ninja import Query, Router, Schema

from pam_common.errors import RefusedError
from pam_common.keys import KEY_SIZE, b64decode, is_session_id
from pam_platform import audit
from pam_platform.access import ending, listing
from pam_platform.access.granting import ConnectRequest, connect
from pam_platform.access.rules import usable
from pam_platform.accounts.api import UserAuth, caller
from pam_platform.api.fields import Key, Label, Reason, SessionPath
from pam_platform.recordings.rights import known_sessions
from pam_platform.vault import keys

router = Router(auth=UserAuth(), tags=["people"])

MAX_PAGE = 200


class ConnectBody(Schema):
    resource: Label
    account: Label | None = None
    ssh_key: Key
    noise_key: Key


class KillBody(Schema):
    reason: Reason = ""


@router.get("/resources")
def resources(request: HttpRequest) -> dict[str, Any]:
    """The resources and accounts that the caller may use, and what vouches for the SSH servers among them."""
    return {
        "resources": usable(caller(request)),
        "interceptor_host_ca": keys.public_entries(keys.INTERCEPTOR_HOST_CA),
    }


@router.post("/connect")
def post_connect(request: HttpRequest, body: ConnectBody) -> dict[str, Any]:
    """Grant a session on an account."""
    wanted = ConnectRequest(
        body.resource, body.account, b64decode(body.ssh_key, KEY_SIZE), b64decode(body.noise_key, KEY_SIZE)
    )
    return connect(caller(request), wanted)


@router.get("/sessions")
def sessions(
    request: HttpRequest,
    mine: bool = False,
    state: Literal["granted", "active", "ended", "expired"] | None = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 50,
    before: str = "",
) -> dict[str, Any]:
    """Sessions the caller may know of, newest first; ``before`` is the last id of the page before."""
    user = caller(request)
    rows = known_sessions(user)
    if mine:
        rows = rows.filter(user=user)
    if state is not None:
        rows = rows.filter(listing.in_state(state))
    if before:
        rows = listing.before(rows, before if is_session_id(before) else "")
    return {"sessions": [listing.shown(row) for row in rows.prefetch_related("parts")[:limit]]}


@router.get("/sessions/{session}")
def session_detail(request: HttpRequest, session: SessionPath) -> dict[str, Any]:
    """One session."""
    return listing.shown(listing.find(caller(request), session))


@router.post("/sessions/{session}/kill")
def kill(request: HttpRequest, session: SessionPath, body: KillBody) -> dict[str, Any]:
    """Cut a session at once: its owner or an admin."""
    user = caller(request)
    found = listing.find(user, session)
    if found.user_id != user.pk and not user.is_admin:
        audit.record(user, "session.kill", session, "refused")
        raise RefusedError("only its owner or an admin may kill a session")
    ending.kill(found, user, body.reason)
    return {}


@router.post("/sessions/{session}/end")
def end(request: HttpRequest, session: SessionPath) -> dict[str, Any]:
    """The caller is done with a session of theirs."""
    user = caller(request)
    found = listing.find(user, session)
    if found.user_id != user.pk:
        audit.record(user, "session.end", session, "refused")
        raise RefusedError("only its owner may end a session", hint="an admin may kill it.")
    ending.end(found, user)
    return {}
