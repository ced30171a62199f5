"""Policies, users and accounts from the database, for the pure decision in ``policy``."""

from __future__ import annotations

from typing import Any

from pam_platform.access.models import Account, Policy
from pam_platform.access.policy import Rule, decide
from pam_platform.accounts.models import User


def load_rules() -> list[Rule]:
    """Every policy."""
    return [
        Rule(
            name=row.name,
            users=frozenset(row.users),
            groups=frozenset(row.groups),
            accounts=tuple(row.accounts),
            max_duration=row.max_duration,
            idle_limit=row.idle_limit,
            review_groups=tuple(row.review_groups),
        )
        for row in Policy.objects.all()
    ]


def decide_for(user: User, account: str) -> Rule | None:
    """The rule under which ``user`` may open ``account`` now, or None: no."""
    if not user.is_active:
        return None
    return decide(load_rules(), user.username, user.group_names(), account)


def usable(user: User) -> list[dict[str, Any]]:
    """The resources and accounts that ``user`` may open, as the API lists them."""
    rules, groups = load_rules(), user.group_names()
    found: dict[str, dict[str, Any]] = {}
    for account in Account.objects.select_related("resource__gateway"):
        rule = decide(rules, user.username, groups, account.path)
        if rule is None or not user.is_active:
            continue
        resource = account.resource
        entry = found.setdefault(
            resource.name,
            {
                "name": resource.name,
                "protocol": resource.protocol,
                "gateway": resource.gateway.name,
                "accounts": [],
            },
        )
        if account.databases:
            entry.setdefault("database", account.databases[0])
        entry["accounts"].append(
            {
                "name": account.name,
                "max_duration": rule.max_duration,
                "idle_limit": rule.idle_limit,
                "policy": rule.name,
            }
        )
    return list(found.values())
