"""What admins (and, for reading, auditors) ask: users, gateways, agents, relays, tokens, the audit trail."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal, TypeVar

from django.db.models import Model, QuerySet
from django.http import HttpRequest
from ninja import Query, Router, Schema

from pam_common.errors import RefusedError
from pam_platform.access import ending
from pam_platform.access.errors import NotFoundError
from pam_platform.accounts.api import UserAuth, require_role
from pam_platform.accounts.models import User
from pam_platform.api.fields import Label, LabelPath, UserPath
from pam_platform.audit.models import AuditEvent
from pam_platform.fleet.enrolment import create_token
from pam_platform.fleet.models import Agent, Gateway, Relay

router = Router(auth=UserAuth(), tags=["admin"])

MAX_PAGE = 1000
Row = TypeVar("Row", bound=Model)


class TokenBody(Schema):
    kind: Literal["agent", "relay"]
    name: Label
    gateway: Label | None = None


@router.get("/users")
def users(request: HttpRequest) -> dict[str, Any]:
    """Every user."""
    require_role(request, "admin")
    rows = User.objects.prefetch_related("groups")
    return {"users": [_user(row) for row in rows]}


@router.post("/users/{name}/disable")
def disable(request: HttpRequest, name: UserPath) -> dict[str, Any]:
    """Disable a user; their logins and sessions end at once."""
    admin = require_role(request, "admin")
    user = _find(User.objects.filter(username=name), f"user {name}")
    if user.pk == admin.pk:
        raise RefusedError("you cannot disable yourself", hint="another admin can.")
    return {"sessions": ending.disable_user(user, admin)}


@router.post("/users/{name}/enable")
def enable(request: HttpRequest, name: UserPath) -> dict[str, Any]:
    """Let a user log in again."""
    admin = require_role(request, "admin")
    ending.enable_user(_find(User.objects.filter(username=name), f"user {name}"), admin)
    return {}


@router.get("/gateways")
def gateways(request: HttpRequest) -> dict[str, Any]:
    """Every gateway with its agents and resources."""
    require_role(request, "admin")
    rows = Gateway.objects.prefetch_related("agents", "resources")
    return {
        "gateways": [
            {
                "name": row.name,
                "agents": [agent.name for agent in row.agents.all() if agent.state == Agent.State.ACTIVE],
                "resources": [resource.name for resource in row.resources.all()],
            }
            for row in rows
        ]
    }


@router.delete("/gateways/{name}")
def delete_gateway(request: HttpRequest, name: LabelPath) -> dict[str, Any]:
    """Delete a gateway and all that is reached through it; sessions end, agents are revoked."""
    admin = require_role(request, "admin")
    gateway = _find(Gateway.objects.filter(name=name), f"gateway {name}")
    return {"sessions": ending.delete_gateway(gateway, admin)}


@router.get("/agents")
def agents(request: HttpRequest) -> dict[str, Any]:
    """Every agent, revoked ones too."""
    require_role(request, "admin")
    return {
        "agents": [
            {
                "name": row.name,
                "gateway": row.gateway_name,
                "state": row.state,
                "version": row.version,
                "enrolled": _seconds(row.enrolled),
                "last_seen": _seconds(row.last_seen),
            }
            for row in Agent.objects.all()
        ]
    }


@router.post("/agents/{name}/revoke")
def revoke_agent(request: HttpRequest, name: LabelPath) -> dict[str, Any]:
    """Refuse an agent from now on; its sessions end."""
    admin = require_role(request, "admin")
    return {"sessions": ending.revoke_agent(_find(Agent.objects.filter(name=name), f"agent {name}"), admin)}


@router.get("/relays")
def relays(request: HttpRequest) -> dict[str, Any]:
    """Every relay."""
    require_role(request, "admin")
    return {
        "relays": [
            {
                "name": row.name,
                "host": row.host,
                "port": row.port,
                "state": row.state,
                "version": row.version,
                "last_seen": _seconds(row.last_seen),
            }
            for row in Relay.objects.all()
        ]
    }


@router.post("/relays/{name}/revoke")
def revoke_relay(request: HttpRequest, name: LabelPath) -> dict[str, Any]:
    """Refuse a relay from now on; nobody is sent to it any more."""
    admin = require_role(request, "admin")
    ending.revoke_relay(_find(Relay.objects.filter(name=name), f"relay {name}"), admin)
    return {}


@router.get("/audit")
def audit_trail(
    request: HttpRequest,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100,
    before: Annotated[int | None, Query(ge=1, le=(1 << 62))] = None,
) -> dict[str, Any]:
    """The audit trail, newest first; ``before`` is the last id of the page before."""
    require_role(request, "admin", "auditor")
    rows = AuditEvent.objects.all() if before is None else AuditEvent.objects.filter(pk__lt=before)
    return {
        "events": [
            {
                "id": row.pk,
                "time": _seconds(row.time),
                "actor": row.actor,
                "action": row.action,
                "object": row.object,
                "outcome": row.outcome,
                "details": row.details,
            }
            for row in rows[:limit]
        ]
    }


@router.post("/enrol-tokens")
def enrol_token(request: HttpRequest, body: TokenBody) -> dict[str, Any]:
    """A one-time token for an agent of a gateway, or for a relay; valid for an hour."""
    admin = require_role(request, "admin")
    token, expires = create_token(body.kind, body.name, body.gateway, actor=admin.username)
    return {"token": token, "expires": _seconds(expires)}


def _user(row: User) -> dict[str, Any]:
    return {
        "name": row.username,
        "email": row.email,
        "active": row.is_active,
        "service": row.is_service,
        "roles": row.roles,
        "groups": [group.name for group in row.groups.all()],
    }


def _find(rows: QuerySet[Row], what: str) -> Row:
    row = rows.first()
    if row is None:
        raise NotFoundError(f"there is no {what}")
    return row


def _seconds(moment: datetime | None) -> int | None:
    return int(moment.timestamp()) if moment is not None else None
