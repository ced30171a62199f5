"""``open``: an agent asks, before its first dial, whether the session may begin and with what.

Everything that ``connect`` decided is decided again. The answer is the only place a credential leaves the
vault, and then sealed to this agent, naming session, account and agent.
"""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

from django.db import transaction
from django.utils import timezone
from nacl.public import PublicKey, SealedBox

from pam_common.errors import PamError, RefusedError
from pam_common.keys import KEY_SIZE, b64decode, b64encode
from pam_platform import audit
from pam_platform.access import ssh
from pam_platform.access.errors import ConflictError
from pam_platform.access.models import Account, AccountSecret, ResourceSecret, Session
from pam_platform.access.policy import Rule
from pam_platform.access.rules import decide_for
from pam_platform.fleet.models import Agent
from pam_platform.recordings.uploads import begin_part
from pam_platform.vault import keys, store

#: An agent polls its inbox every 25 s at least; after a minute of silence another may take over.
TAKEOVER_SILENCE = timedelta(seconds=60)
#: Parts of one session: an agent that begins more is in a loop.
MAX_PARTS = 1000


def open_session(session_id: str, agent: Agent, ssh_keys: ssh.SshKeys | None = None) -> dict[str, Any]:
    """Bind the session to the agent and return what it needs; ``ssh_keys`` belong to SSH sessions only.

    Raises RefusedError (ended, expired, not allowed any more, another gateway) or ConflictError (another
    agent has it and is alive).
    """
    try:
        with transaction.atomic():
            session, account, rule = _bind(session_id, agent)
            answer = _answer(session, account, agent)
            if session.protocol == "ssh":
                answer["ssh"] = ssh.certificates(session, account, ssh_keys)
            elif ssh_keys is not None:
                raise RefusedError(f"SSH keys were sent for a session of protocol {session.protocol}")
    except PamError as error:
        audit.record(f"agent {agent.name}", "session.open", session_id, "refused", reason=str(error))
        raise
    audit.record(
        f"agent {agent.name}",
        "session.open",
        session.pk,
        "ok",
        user=session.user_name,
        account=session.account_name,
        part=session.part,
        policy=rule.name,
    )
    return answer


def close_session(session_id: str, agent: Agent, report: dict[str, Any]) -> None:
    """The agent says that its part of the session is over, and what it carried."""
    actor = f"agent {agent.name}"
    if not Session.objects.filter(pk=session_id, agent=agent).exists():
        audit.record(actor, "session.closed", session_id, "refused")
        raise RefusedError("this agent has no such session")
    with transaction.atomic():
        session = Session.objects.select_for_update(of=("self",)).get(pk=session_id)
        if session.agent_id != agent.pk or report["part"] != session.part or session.closed is not None:
            return  # another agent or part followed meanwhile, or the report is a repeated one
        now = timezone.now()
        session.closed = now
        for name in ("connections", "bytes_up", "bytes_down"):
            setattr(session, name, report[name])
        if session.state != Session.State.ENDED:
            session.state, session.ended = Session.State.ENDED, now
            session.end_reason = report["reason"]
        session.save()
    audit.record(actor, "session.closed", session_id, "ok", reason=session.end_reason)


def note_alarm(session_id: str, agent: Agent, reason: str) -> None:
    """An audit event that the session's target is not who it must be. Raises RefusedError."""
    actor = f"agent {agent.name}"
    session = Session.objects.filter(pk=session_id, agent=agent).first()
    if session is None:
        audit.record(actor, "session.alarm", session_id, "refused")
        raise RefusedError("this agent has no such session")
    details = {"user": session.user_name, "account": session.account_name, "reason": reason}
    audit.record(actor, "session.alarm", session_id, "wrong target", **details)


def _bind(session_id: str, agent: Agent) -> tuple[Session, Account, Rule]:
    # Order of locks everywhere: the session, then its agent.
    session = Session.objects.select_for_update(of=("self",)).filter(pk=session_id).first()
    if session is None or session.gateway_name != agent.gateway_name:
        # Whether another gateway has such a session is none of this agent's business.
        raise RefusedError("there is no such session at this gateway")
    if not Agent.objects.select_for_update().filter(pk=agent.pk, state=Agent.State.ACTIVE).exists():
        raise RefusedError("this agent was revoked")
    _require_time(session)
    _require_agent(session, agent)
    account, rule = _decide_again(session)
    if session.part >= MAX_PARTS:
        raise RefusedError("the session has begun too many recording parts")
    now = timezone.now()
    session.agent, session.agent_name, session.state = agent, agent.name, Session.State.ACTIVE
    session.opened = session.opened or now
    # Policy may have become stricter since connect, never looser.
    granted = session.granted.replace(microsecond=0)
    session.session_end = min(session.session_end, granted + timedelta(seconds=rule.max_duration))
    session.idle_limit = min((x for x in (session.idle_limit, rule.idle_limit) if x), default=0)
    session.part = begin_part(session.pk, agent.name, agent.identity_key).number
    session.save()
    return session, account, rule


def _require_time(session: Session) -> None:
    now = timezone.now()
    if session.state == Session.State.ENDED:
        raise RefusedError(f"the session is over: {session.end_reason or 'it ended'}", hint="connect again.")
    if session.session_end <= now:
        raise RefusedError("the session's time is over", hint="connect again.")
    if session.state == Session.State.GRANTED and session.grant_expires <= now:
        raise RefusedError("the grant was not used in time", hint="connect again.")


def _require_agent(session: Session, agent: Agent) -> None:
    other = session.agent
    if other is None or other.pk == agent.pk or other.state == Agent.State.REVOKED:
        return
    if other.last_seen > timezone.now() - TAKEOVER_SILENCE:
        raise ConflictError(f"the session belongs to agent {other.name}, which is alive")


def _decide_again(session: Session) -> tuple[Account, Rule]:
    user, account = session.user, session.account
    if user is None or not user.is_active:
        raise RefusedError("the user is disabled")
    if account is None or account.path != session.account_name:
        raise RefusedError("the account does not exist any more")
    if account.resource.gateway.name != session.gateway_name:
        raise RefusedError("the resource has moved to another gateway", hint="connect again.")
    rule = decide_for(user, account.path)
    if rule is None:
        raise RefusedError("policy does not allow it any more")
    return account, rule


def _answer(session: Session, account: Account, agent: Agent) -> dict[str, Any]:
    resource = account.resource
    tls: dict[str, Any] = {"mode": resource.tls_mode}
    if resource.tls_ca:
        tls["ca_pem"] = resource.tls_ca
    if resource.client_cert:
        tls["client_cert_pem"] = resource.client_cert
    target: dict[str, Any] = {
        "host": resource.host,
        "port": resource.port,
        "tls": tls,
        "database": account.databases or None,
        "options": _options(account),
    }
    if resource.server_name:
        target["server_name"] = resource.server_name
    return {
        "session": session.pk,
        "part": session.part,
        "user": session.user_name,
        "account": session.account_name,
        "protocol": session.protocol,
        "session_end": int(session.session_end.timestamp()),
        "idle_limit": session.idle_limit,
        "target": target,
        "budgets": {"rows_bytes": resource.rows_budget},
        "allow_replication": account.allow_replication,
        "recipients": keys.recording_recipients(),
        "credential": _sealed_credential(session, account, agent),
    }


def _options(account: Account) -> dict[str, Any]:
    """What only the protocol knows, of the resource and, under ``account``, of the account."""
    resource = account.resource
    if resource.protocol == "postgres":
        return {}
    options = {**resource.options, "account": account.options}
    if resource.protocol == "ssh":
        options["host_keys"] = ssh.host_keys(resource)
    return options


def _named_secrets(account: Account) -> dict[str, str]:
    """Those of the account and, under names of their own such as ``jump_password``, of its resource."""
    rows: list[AccountSecret | ResourceSecret] = list(account.secrets.select_related("entry"))
    rows += account.resource.secrets.select_related("entry")
    return {row.name: store.reveal(row.entry).decode() for row in rows}


def _sealed_credential(session: Session, account: Account, agent: Agent) -> str:
    secret: dict[str, Any] = {
        "session": session.pk,
        "account": session.account_name,
        "agent": agent.name,
        "user": account.user,
    }
    if account.password is not None:
        secret["password"] = store.reveal(account.password).decode()
    if account.client_key is not None:
        secret["client_key_pem"] = store.reveal(account.client_key).decode()
    if named := _named_secrets(account):
        secret["secrets"] = named
    box = SealedBox(PublicKey(b64decode(agent.sealing_key, KEY_SIZE)))
    return b64encode(box.encrypt(json.dumps(secret).encode()))
