"""Ending sessions, for whatever reason, at once.

A session that ends before its time is marked here, its agents are told through the inbox, and relays read it
in their bundle.

The reason for it is committed first, then what runs is looked for: `open` in another worker decides anew
under its session's lock, so it is either refused or seen here. A user who is disabled has no session left
when the command returns. Where it breaks off in between, doing the same again ends what is left.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable

from django.db import transaction
from django.db.models import Q, QuerySet
from django.utils import timezone

from pam_common.errors import RefusedError
from pam_platform import audit
from pam_platform.access.models import Account, Resource, Session
from pam_platform.access.policy import Rule, decide
from pam_platform.access.rules import load_rules
from pam_platform.accounts.models import User
from pam_platform.accounts.oauth import revoke_tokens
from pam_platform.fleet import inbox
from pam_platform.fleet.models import Agent, EnrolToken, Gateway, Relay
from pam_platform.recordings.models import RecordingPart
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
    if not _end([session.pk], "kill", text):
        raise RefusedError("the session is over already")
    audit.record(actor, "session.kill", session.pk, "ok", reason=reason, user=session.user_name)


def end(session: Session, actor: User) -> None:
    """The client is done with it; not an error when it is over already."""
    if _end([session.pk], "end", "ended by the client"):
        audit.record(actor, "session.end", session.pk, "ok")


def end_all(sessions: Iterable[Session], reason: str) -> int:
    """Cut these sessions; returns how many were still running. The caller has committed the reason, and
    audits it."""
    return len(_end([session.pk for session in sessions], "kill", reason))


def disallowed() -> list[Session]:
    """Every running session that would not be granted now."""
    return [session for session in _disallowed() if session.is_running]


def end_disallowed(reason: str = "policy no longer allows it") -> list[Session]:
    """Cut every running session that would not be granted now; returns those that were cut."""
    lost = _disallowed()
    ended = _end([session.pk for session in lost], "kill", reason)
    return [session for session in lost if session.pk in ended]


def _unended() -> QuerySet[Session]:
    """Those to look at when some must end. An unused grant is among them even when it has run out: an
    `open` that came in time may be about to commit. `_end` looks again once it has the lock."""
    states = (Session.State.GRANTED, Session.State.ACTIVE)
    return Session.objects.filter(state__in=states, session_end__gt=timezone.now())


def _disallowed() -> list[Session]:
    rules = load_rules()
    rows = _unended().select_related("user", "account__resource__gateway", "agent")
    return [session for session in rows.prefetch_related("user__groups") if not _allowed(session, rules)]


def _allowed(session: Session, rules: list[Rule]) -> bool:
    user, account, agent = session.user, session.account, session.agent
    return (
        user is not None
        and user.is_active
        and account is not None
        and account.path == session.account_name
        and account.resource.gateway.name == session.gateway_name
        and (agent is None or agent.state == Agent.State.ACTIVE)
        and decide(rules, user.username, {group.name for group in user.groups.all()}, account.path)
        is not None
    )


def disable_user(user: User, actor: User | str) -> int:
    """Disable a user, end their tokens and sessions; returns how many sessions were cut."""
    with transaction.atomic():
        user.is_active = False
        user.save(update_fields=["is_active"])
        revoke_tokens(user)
    with transaction.atomic():
        cut = end_all(_unended().filter(user=user), "the user was disabled")
        audit.record(actor, "user.disable", user.username, "ok", sessions=cut)
    return cut


@transaction.atomic
def enable_user(user: User, actor: User | str) -> None:
    """Let a user log in again."""
    user.is_active = True
    user.save(update_fields=["is_active"])
    audit.record(actor, "user.enable", user.username, "ok")


def revoke_agent(agent: Agent, actor: User | str) -> int:
    """Refuse the agent from now on and end its sessions; returns how many."""
    active = Agent.objects.filter(pk=agent.pk, state=Agent.State.ACTIVE)
    active.update(state=Agent.State.REVOKED, revoked=timezone.now())
    with transaction.atomic():
        cut = end_all(_unended().filter(agent=agent), "its agent was revoked")
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
    # Without tokens nobody enrols any more, and without agents nothing is opened any more. The gateway goes
    # together with its last sessions, so that its name can be given again when this breaks off before.
    EnrolToken.objects.filter(gateway=gateway).delete()
    cut = sum(revoke_agent(agent, actor) for agent in gateway.agents.filter(state=Agent.State.ACTIVE))
    with transaction.atomic():
        cut += end_all(_unended().filter(gateway_name=gateway.name), "its gateway was deleted")
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
def _end(ids: Collection[str], kind: str, reason: str) -> set[str]:
    """Mark these sessions as ended and tell their agents; returns those that were not over already.

    All sessions are locked before the first agent, and each kind in one order: `open` locks its session, then
    its agent, and nobody may wait in a circle.
    """
    rows = Session.objects.select_for_update(of=("self",)).filter(pk__in=ids).order_by("pk")
    ended = {row.pk for row in rows if row.is_running}
    reason = reason[:200]
    Session.objects.filter(pk__in=ended).update(
        state=Session.State.ENDED, ended=timezone.now(), end_reason=reason, killed=kind == "kill"
    )
    told = _opened_by(ended)
    for agent in Agent.objects.filter(name__in=told).order_by("pk"):
        inbox.post(agent, kind, *told[agent.name], reason=reason)
    return ended


def _opened_by(ids: Collection[str]) -> dict[str, list[str]]:
    """The sessions of each agent that has opened some of these: where another one took over, the first may
    have been silent only towards the platform, and still carry connections."""
    found: dict[str, list[str]] = defaultdict(list)
    parts = RecordingPart.objects.filter(session__in=ids).order_by("agent", "session")
    for agent, session in parts.values_list("agent", "session").distinct():
        found[agent].append(session)
    return found
