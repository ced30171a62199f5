"""Who may open which account: pure, and no unless a policy says yes.

A policy names users, groups and account patterns. A pattern is ``resource/account``, either half with
``*`` (any characters) and ``?`` (one); neither crosses the slash. Names are ASCII and lower case by their
schema, and compared as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Set
from dataclasses import dataclass
from fnmatch import fnmatchcase

_PATTERN = re.compile(r"[a-z0-9*?-]{1,63}/[a-z0-9*?-]{1,63}")


@dataclass(frozen=True)
class Rule:
    """One policy. Durations in seconds, ``idle_limit`` 0 for none; ``review_groups`` empty: every auditor."""

    name: str
    users: frozenset[str]
    groups: frozenset[str]
    accounts: tuple[str, ...]
    max_duration: int
    idle_limit: int = 0
    review_groups: tuple[str, ...] = ()

    def allows(self, user: str, groups: Set[str], account: str) -> bool:
        """Whether this policy lets ``user``, who is in ``groups``, open ``account``."""
        named = user in self.users or not self.groups.isdisjoint(groups)
        return named and any(matches(pattern, account) for pattern in self.accounts)


def decide(rules: Iterable[Rule], user: str, groups: Set[str], account: str) -> Rule | None:
    """The rule under which ``user`` may open ``account``, or None: no.

    Of several the one with the longest duration applies, as a whole; then the first by name.
    """
    allowing = [rule for rule in rules if rule.allows(user, groups, account)]
    return min(allowing, key=lambda rule: (-rule.max_duration, rule.name), default=None)


def is_pattern(text: str) -> bool:
    """Whether ``text`` is an account pattern."""
    return _PATTERN.fullmatch(text) is not None


def matches(pattern: str, account: str) -> bool:
    """Whether ``account`` (``resource/account``) fits; what is no pattern or no account never does."""
    if not is_pattern(pattern) or account.count("/") != 1:
        return False
    halves = zip(pattern.split("/"), account.split("/"), strict=True)
    return all(_fits(half, text) for half, text in halves)


def _fits(pattern: str, text: str) -> bool:
    # Names and patterns have at most 63 characters of a small alphabet: no "[", which would be a set.
    return fnmatchcase(text, pattern)
