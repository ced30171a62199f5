"""One apply: check references, write every kind, prune: all or nothing. Then end what lost its right."""

from __future__ import annotations

from collections.abc import Iterator

from django.db import transaction
from django.utils import timezone

from pam_common.errors import ConfigError, RefusedError
from pam_platform import audit
from pam_platform.access import ending
from pam_platform.access.apply import sync
from pam_platform.access.apply.changes import Change
from pam_platform.access.apply.document import Document
from pam_platform.access.apply.hashes import Hashes
from pam_platform.access.models import Account, Policy, Resource, Session
from pam_platform.accounts.models import Group, User
from pam_platform.accounts.oauth import revoke_tokens
from pam_platform.fleet import inbox
from pam_platform.fleet.models import Agent, EnrolToken, Gateway, Relay
from pam_platform.vault import master


class _DryRun(Exception):  # noqa: N818  # not an error: it carries the transaction's end
    pass


@master.locked()
def apply(document: Document, *, prune: bool, dry_run: bool, actor: str) -> list[Change]:
    """Make the database say what ``document`` says and return what that changes.

    ``prune`` removes what the document does not name; else it is kept and reported so. With ``dry_run``
    the same is done and taken back. Raises ConfigError for references to nothing.

    Sessions are ended once the rest is committed (see ``ending``). Should this break off in between, the next
    apply ends them, also one of the same file.
    """
    changes: list[Change] = []
    hashes = Hashes(document.users)
    try:
        with transaction.atomic():
            _check_references(document, prune=prune)
            changes += _sync_all(document, hashes)
            changes += _prune(document) if prune else _kept(document)
            if any(change.kind == "relay" and change.action != "keep" for change in changes):
                inbox.post_reload()
            _require_admin(prune)
            _audit(changes, actor)
            if dry_run:
                changes += _ends(ending.disallowed())
                raise _DryRun
    except _DryRun:
        return changes
    with transaction.atomic():
        ended = _ends(ending.end_disallowed())
        _audit(ended, actor)
    return changes + ended


def _sync_all(document: Document, hashes: Hashes) -> Iterator[Change]:
    """In the order in which things refer to each other."""
    yield from sync.groups(document.groups)
    yield from sync.users(document.users, hashes)
    yield from sync.gateways(document.gateways)
    yield from sync.relays(document.relays)
    yield from sync.resources(document.resources)
    yield from sync.accounts(document.accounts)
    yield from sync.policies(document.policies)


def _check_references(document: Document, *, prune: bool) -> None:
    """Every name that is used must be in the file or, unless pruning, in the database."""
    known_groups, known_gateways, known_users = (
        set(document.groups),
        set(document.gateways),
        {user.name for user in document.users},
    )
    if not prune:
        known_groups |= set(Group.objects.values_list("name", flat=True))
        known_gateways |= set(Gateway.objects.values_list("name", flat=True))
        known_users |= set(User.objects.values_list("username", flat=True))
    problems: list[str] = []

    def check(kind: str, name: str, what: str, used: tuple[str, ...], known: set[str]) -> None:
        for missing in sorted(set(used) - known):
            problems.append(f'{document.line(kind, name)}: {name}: there is no {what} "{missing}"')

    for user in document.users:
        check("users", user.name, "group", user.groups, known_groups)
    for resource in document.resources:
        check("resources", resource.name, "gateway", (resource.gateway,), known_gateways)
    for policy in document.policies:
        check("policies", policy.name, "user", policy.users, known_users)
        check("policies", policy.name, "group", policy.groups + policy.review_groups, known_groups)
    if problems:
        raise ConfigError(problems)


def _kept(document: Document) -> Iterator[Change]:
    for kind, name, _ in _unnamed(document):
        yield Change("keep", kind, name)


def _prune(document: Document) -> Iterator[Change]:
    for kind, name, row in _unnamed(document):
        match row:
            case User():
                # Disabled, not deleted: sessions and the audit trail go on naming a real user.
                row.is_active = False
                row.save(update_fields=["is_active"])
                revoke_tokens(row)
                yield Change("disable", kind, name)
                continue
            case Account():
                ending.delete_account(row)
            case Resource():
                ending.delete_resource(row)
            case Gateway():
                EnrolToken.objects.filter(gateway=row).delete()
                _revoke_agents(row)
                row.delete()
            case Relay():
                EnrolToken.objects.filter(kind=EnrolToken.Kind.RELAY, name=name).delete()
                row.delete()
            case Policy() | Group():
                row.delete()
        yield Change("remove", kind, name)


def _unnamed(
    document: Document,
) -> Iterator[tuple[str, str, Policy | Account | Resource | Relay | Gateway | User | Group]]:
    """What the database has and the document does not name; what refers to others first."""
    accounts = {f"{item.resource}/{item.name}" for item in document.accounts}
    for policy in Policy.objects.exclude(name__in=[item.name for item in document.policies]):
        yield "policy", policy.name, policy
    for account in Account.objects.select_related("resource"):
        if account.path not in accounts:
            yield "account", account.path, account
    for resource in Resource.objects.exclude(name__in=[item.name for item in document.resources]):
        yield "resource", resource.name, resource
    for relay in Relay.objects.exclude(name__in=[item.name for item in document.relays]):
        yield "relay", relay.name, relay
    for gateway in Gateway.objects.exclude(name__in=document.gateways):
        yield "gateway", gateway.name, gateway
    for user in User.objects.filter(is_active=True).exclude(username__in=[u.name for u in document.users]):
        yield "user", user.username, user
    for group in Group.objects.exclude(name__in=document.groups):
        yield "group", group.name, group


def _revoke_agents(gateway: Gateway) -> None:
    """Their rows stay, so that relays go on refusing them."""
    active = gateway.agents.filter(state=Agent.State.ACTIVE)
    active.update(state=Agent.State.REVOKED, revoked=timezone.now())


def _ends(sessions: list[Session]) -> list[Change]:
    return [
        Change("end", "session", f"{session.pk} of {session.user_name} on {session.account_name}")
        for session in sessions
    ]


def _require_admin(prune: bool) -> None:
    if prune and not User.objects.filter(is_active=True, is_admin=True).exists():
        raise RefusedError(
            "with --prune nobody would be left who is an admin",
            hint="give somebody in users roles: [admin].",
        )


def _audit(changes: list[Change], actor: str) -> None:
    for change in changes:
        if change.action != "keep":
            fields = sorted(change.fields)
            audit.record(actor, f"apply.{change.action}", f"{change.kind} {change.name}", "ok", fields=fields)
