"""``connect``: decide, and give the client everything it needs to reach the agent."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from django.conf import settings
from django.db.models import Q
from django.utils import timezone

from pam_common.errors import PamError, RefusedError
from pam_common.keys import KEY_SIZE, b64decode, b64encode, new_session_id
from pam_common.ssh_certs import make_user_certificate
from pam_common.tokens import GRANT_LIFETIME, Grant
from pam_platform import audit
from pam_platform.access import ssh
from pam_platform.access.errors import ConflictError
from pam_platform.access.models import Account, Session
from pam_platform.access.policy import Rule, decide
from pam_platform.access.rules import load_rules
from pam_platform.accounts.models import User
from pam_platform.fleet.models import Agent
from pam_platform.fleet.statements import BACKDATE, relay_list
from pam_platform.vault import keys

#: Seconds in which a client may (re)connect to relays; a link that is up stays until the session's end.
CERTIFICATE_LIFETIME = 600
#: Agents poll at least every 25 s; after this long without a word one is gone, not slow.
AGENT_SILENCE = timedelta(seconds=120)
#: Sessions one user may have open: above any pool of people or jobs, below what could fill the tables.
MAX_OPEN_SESSIONS = 200

#: What the native client expects, for the client's hints.
_DEFAULT_PORTS = {"postgres": 5432, "ssh": 22, "http": 80}


@dataclass(frozen=True)
class ConnectRequest:
    """What the caller asks for. ``account`` None: the only one they may use. Keys are raw public keys."""

    resource: str
    account: str | None
    ssh_key: bytes
    noise_key: bytes


def connect(user: User, request: ConnectRequest) -> dict[str, Any]:
    """Grant a session. Raises RefusedError (policy says no) or ConflictError (nothing to reach it by)."""
    wanted = f"{request.resource}/{request.account or '*'}"
    try:
        account, rule = _choose(user, request)
        wanted = account.path
        ssh.require_host_keys(account.resource)
        agents, relays = _way_to(account), _relays()
        _require_room(user)
    except PamError as error:
        audit.record(user, "connect", wanted, "refused", reason=str(error))
        raise
    session = _create(user, account, rule, request.noise_key)
    facts = {"session": session.id, "policy": rule.name, "gateway": session.gateway_name}
    audit.record(user, "connect", account.path, "ok", **facts)
    return _answer(session, account, request, agents, relays)


def _choose(user: User, request: ConnectRequest) -> tuple[Account, Rule]:
    """The account and the rule that opens it. Whether a name exists is told only to who may use it."""
    rows = Account.objects.filter(resource__name=request.resource).select_related("resource__gateway")
    if request.account is not None:
        rows = rows.filter(name=request.account)
    rules, groups = load_rules() if user.is_active else [], user.group_names()
    allowed = [
        (row, rule) for row in rows if (rule := decide(rules, user.username, groups, row.path)) is not None
    ]
    if not allowed:
        name = request.resource if request.account is None else f"{request.resource}/{request.account}"
        raise RefusedError(
            f"no policy lets {user.username} use {name}", hint="pam-client ls shows what you may use."
        )
    if len(allowed) > 1:
        names = ", ".join(row.path for row, _ in allowed)
        raise RefusedError(f"{request.resource} has several accounts: {names}", hint="name one of them.")
    return allowed[0]


def _way_to(account: Account) -> list[Agent]:
    gateway = account.resource.gateway
    agents = list(gateway.agents.filter(state=Agent.State.ACTIVE))
    if not any(agent.last_seen > timezone.now() - AGENT_SILENCE for agent in agents):
        seen = max((agent.last_seen for agent in agents), default=None)
        detail = f"last seen {seen:%Y-%m-%d %H:%M} UTC" if seen else "none is enrolled"
        raise ConflictError(
            f"no agent of gateway {gateway.name} is running ({detail})",
            hint="an administrator starts one with pam-agent run on a host of that network.",
        )
    return agents


def _relays() -> list[dict[str, Any]]:
    relays = relay_list()
    if not relays:
        raise ConflictError("no relay is enrolled", hint="an administrator enrols one with pam-relay enrol.")
    return relays


def _require_room(user: User) -> None:
    now = timezone.now()
    granted = Q(state=Session.State.GRANTED, grant_expires__gt=now)
    active = Q(state=Session.State.ACTIVE, session_end__gt=now)
    if user.sessions.filter(granted | active).count() >= MAX_OPEN_SESSIONS:
        raise RefusedError(
            f"{user.username} has {MAX_OPEN_SESSIONS} sessions open", hint="end some: pam-client sessions ls."
        )


def _create(user: User, account: Account, rule: Rule, noise_key: bytes) -> Session:
    granted = timezone.now()  # to the microsecond: lists are in the order of connecting
    now = granted.replace(microsecond=0)  # what is stored of the grant is what it says, in whole seconds
    return Session.objects.create(
        id=new_session_id(),
        user=user,
        user_name=user.username,
        account=account,
        account_name=account.path,
        protocol=account.resource.protocol,
        gateway_name=account.resource.gateway.name,
        policy_name=rule.name,
        review_groups=list(rule.review_groups),
        client_key=b64encode(noise_key),
        granted=granted,
        grant_expires=now + timedelta(seconds=min(GRANT_LIFETIME, rule.max_duration)),
        session_end=now + timedelta(seconds=rule.max_duration),
        idle_limit=rule.idle_limit,
    )


def _answer(
    session: Session,
    account: Account,
    request: ConnectRequest,
    agents: list[Agent],
    relays: list[dict[str, Any]],
) -> dict[str, Any]:
    return {
        "session": session.id,
        "grant": _grant(session),
        "certificate": _certificate(session, request.ssh_key),
        "gateway": session.gateway_name,
        "account": session.account_name,
        "protocol": session.protocol,
        "session_end": _seconds(session.session_end),
        "expires": _seconds(session.grant_expires),
        "idle_limit": session.idle_limit,
        "relays": relays,
        "relay_host_ca": keys.public_entries(keys.RELAY_HOST_CA),
        "interceptor_host_ca": keys.public_entries(keys.INTERCEPTOR_HOST_CA),
        "grant_keys": keys.public_entries(keys.GRANT),
        "issuer": settings.PAM_ISSUER,
        "agents": [{"id": agent.name, "noise_key": agent.noise_key} for agent in agents],
        "hints": {
            "port": _DEFAULT_PORTS.get(session.protocol, account.resource.port),
            "database": account.databases[0] if account.databases else None,
            "user": account.user,
        },
    }


def _grant(session: Session) -> str:
    grant = Grant(
        session=session.id,
        user=session.user_name,
        gateway=session.gateway_name,
        account=session.account_name,
        protocol=session.protocol,
        client_key=b64decode(session.client_key, KEY_SIZE),
        expires=_seconds(session.grant_expires),
        session_end=_seconds(session.session_end),
        idle_limit=session.idle_limit,
    )
    key = keys.signing_key(keys.GRANT)
    return grant.issue(key, issuer=settings.PAM_ISSUER, now=_seconds(session.granted))


def _certificate(session: Session, ssh_key: bytes) -> str:
    now = _seconds(session.granted)
    return make_user_certificate(
        keys.signing_key(keys.RELAY_USER_CA),
        ssh_key,
        key_id=session.id,
        principals=[f"connect:{session.gateway_name}"],
        valid_after=now - BACKDATE,
        valid_before=min(now + CERTIFICATE_LIFETIME, _seconds(session.session_end)),
    )


def _seconds(moment: datetime) -> int:
    return int(moment.timestamp())
