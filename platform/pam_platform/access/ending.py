"""Ending sessions, for whatever reason, at once.

A session that ends before its time is marked here, its agent is told through the inbox, and relays read it
in their bundle. All in one transaction with the reason for it: a user who is disabled has no session left
when the command returns.
"""

from __future__ import annotations

from collections.abc import Iterable

from django.db import transaction
from django.db.models import Q, QuerySet
from django.utils import timezone

from pam_common.errors import RefusedError
from pam_platform import audit
from pam_platform.access.models import Account, Resource, Session
from pam_platform.access.policy import decide
from pam_platform.access.rules import load_rules
from pam_platform.accounts.models import User
from pam_platform.accounts.oauth import revoke_tokens
from pam_platform.fleet import inbox
from pam_platform.fleet.models import Agent, EnrolToken, Gateway, Relay
from pam_platform.vault.models import VaultEntry

#: A kill's reason: one line of the audit trail.
MAX_REASON = 200


def running() -> QuerySet[Session]:
    """Sessions that are granted or active and whose time is not over."""
    now = timezone.now()
    granted = Q(state=Session.State.GRANTED, grant_expires__gt=now)
    return Session.objects.filter(granted | Q(state=Session.State.ACTIVE, session_end__gt=now))


def kill(session: Session, actor: User | str, reason: str = "") -> None:
    """Cut a session. Raises RefusedError when it is over already."""
    name = actor if isinstance(actor, str) else actor.username
    text = f"killed by {name}" + (f": {reason}" if reason else "")
    if not _end(session.pk, "kill", text):
        raise RefusedError("the session is over already")
    audit.record(actor, "session.kill", session.pk, "ok", reason=reason, user=session.user_name)


def end(session: Session, actor: User) -> None:
    """The client is done with it; not an error when it is over already."""
    if _end(session.pk, "end", "ended by the client"):
        audit.record(actor, "session.end", session.pk, "ok")


def end_all(sessions: Iterable[Session], reason: str) -> int:
    """Cut these sessions; returns how many were still running. The caller audits why."""
    return sum(_end(session.pk, "kill", reason) for session in sessions)


def end_disallowed(reason: str = "policy no longer allows it") -> list[Session]:
    """Cut every running session that would not be granted now; returns those that were cut."""
    rules = load_rules()
    lost = []
    for session in running().select_related("user", "account__resource__gateway", "agent"):
        user, account, agent = session.user, session.account, session.agent
        allowed = (
            user is not None
            and user.is_active
            and account is not None
            and account.path == session.account_name
            and account.resource.gateway.name == session.gateway_name
            and (agent is None or agent.state == Agent.State.ACTIVE)
            and decide(rules, user.username, user.group_names(), account.path) is not None
        )
        if not allowed:
            lost.append(session)
    return [session for session in lost if _end(session.pk, "kill", reason)]


@transaction.atomic
def disable_user(user: User, actor: User | str) -> int:
    """Disable a user, end their tokens and sessions; returns how many sessions were cut."""
    user.is_active = False
    user.save(update_fields=["is_active"])
    revoke_tokens(user)
    cut = end_all(running().filter(user=user), "the user was disabled")
    audit.record(actor, "user.disable", user.username, "ok", sessions=cut)
    return cut


@transaction.atomic
def enable_user(user: User, actor: User | str) -> None:
    """Let a user log in again."""
    user.is_active = True
    user.save(update_fields=["is_active"])
    audit.record(actor, "user.enable", user.username, "ok")


def revoke_agent(agent: Agent, actor: User | str) -> int:
    """Refuse the agent from now on and end its sessions; returns how many.

    Two transactions on purpose: once the first is committed nothing can be opened on the agent any more,
    so that the second finds every session there is. Locks are taken session first, then agent.
    """
    active = Agent.objects.filter(pk=agent.pk, state=Agent.State.ACTIVE)
    active.update(state=Agent.State.REVOKED, revoked=timezone.now())
    with transaction.atomic():
        cut = end_all(running().filter(agent=agent), "its agent was revoked")
        audit.record(actor, "agent.revoke", agent.name, "ok", sessions=cut)
    return cut


@transaction.atomic
def revoke_relay(relay: Relay, actor: User | str) -> None:
    """Refuse the relay from now on; clients and agents are no longer sent to it."""
    relay.state, relay.revoked = Relay.State.REVOKED, timezone.now()
    relay.save(update_fields=["state", "revoked"])
    EnrolToken.objects.filter(kind=EnrolToken.Kind.RELAY, name=relay.name).delete()
    inbox.post_reload()
    audit.record(actor, "relay.revoke", relay.name, "ok")


def delete_gateway(gateway: Gateway, actor: User | str) -> int:
    """Delete a gateway with everything reached through it: its agents are revoked, its resources and
    their credentials go, its sessions end. Returns how many sessions were cut."""
    for agent in gateway.agents.filter(state=Agent.State.ACTIVE):
        revoke_agent(agent, actor)
    with transaction.atomic():
        cut = end_all(running().filter(gateway_name=gateway.name), "its gateway was deleted")
        for resource in gateway.resources.all():
            delete_resource(resource)
        name = gateway.name
        gateway.delete()
        audit.record(actor, "gateway.delete", name, "ok", sessions=cut)
    return cut


def delete_resource(resource: Resource) -> None:
    """Delete a resource with its accounts and their secrets."""
    for account in resource.accounts.all():
        delete_account(account)
    secrets = list(resource.secrets.values_list("entry", flat=True))
    resource.delete()
    VaultEntry.objects.filter(pk__in=secrets).delete()


def delete_account(account: Account) -> None:
    """Delete an account with its secrets."""
    secrets = [pk for pk in (account.password_id, account.client_key_id) if pk]
    secrets += account.secrets.values_list("entry", flat=True)
    account.delete()
    VaultEntry.objects.filter(pk__in=secrets).delete()


@transaction.atomic
def _end(session_id: str, kind: str, reason: str) -> bool:
    """Mark the session ended and tell its agent; False when it was over already."""
    session = Session.objects.select_for_update(of=("self",)).filter(pk=session_id).first()
    if session is None or not session.is_running:
        return False
    session.state, session.ended = Session.State.ENDED, timezone.now()
    session.end_reason, session.killed = reason[:200], kind == "kill"
    session.save(update_fields=["state", "ended", "end_reason", "killed"])
    if session.agent is not None:
        inbox.post(session.agent, kind, session.pk, session.end_reason)
    return True
