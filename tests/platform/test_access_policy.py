"""Who may open which account: no unless a policy says yes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pam_platform.access.policy import Rule, decide, is_pattern, matches

LABELS = st.from_regex(r"\A[a-z]([a-z0-9-]{0,8}[a-z0-9])?\Z")
ACCOUNTS = st.tuples(LABELS, LABELS).map("/".join)


def rule(name="dba", **fields):
    values = {"users": (), "groups": ("dba",), "accounts": ("*/*",), "max_duration": 60, **fields}
    return Rule(
        name=name, **{**values, "users": frozenset(values["users"]), "groups": frozenset(values["groups"])}
    )


@pytest.mark.parametrize(
    ("pattern", "account", "expected"),
    [
        ("prod-db/readonly", "prod-db/readonly", True),
        ("prod-db/readonly", "prod-db/readonly2", False),
        ("prod-db/*", "prod-db/owner", True),
        ("prod-*/*", "prod-db/owner", True),
        ("*/readonly", "any/readonly", True),
        ("*/readonly", "any/owner", False),
        ("db-?/*", "db-1/x", True),
        ("db-?/*", "db-12/x", False),
        ("*/*", "a/b", True),
        ("*/*", "a/b/c", False),
        ("*/*", "a", False),
        ("*", "a/b", False),
        ("prod*", "prod/x", False),
        ("prod-db/*", "PROD-DB/owner", False),
        ("prod-db/*", "prod-db\u2215x/owner", False),
        ("[a-z]/*", "a/b", False),
        ("a/b\n", "a/b", False),
        ("", "", False),
    ],
)
def test_patterns(pattern, account, expected):
    assert matches(pattern, account) is expected


@given(ACCOUNTS)
def test_an_account_matches_itself_and_every_star(account):
    resource, label = account.split("/")
    for pattern in (account, f"*/{label}", f"{resource}/*", "*/*", f"{resource[0]}*/*{label[-1]}"):
        assert matches(pattern, account)


@given(ACCOUNTS, ACCOUNTS)
def test_an_exact_pattern_matches_nothing_else(pattern, account):
    assert matches(pattern, account) == (pattern == account)


@given(st.text(max_size=20), st.text(max_size=20))
def test_what_is_no_pattern_opens_nothing(pattern, account):
    assert not matches(pattern, account) or is_pattern(pattern)


def test_no_rule_no_access():
    assert decide([], "alice", {"dba"}, "a/b") is None


@given(st.lists(st.builds(rule, LABELS, users=st.tuples(LABELS), groups=st.tuples(LABELS))), LABELS, ACCOUNTS)
def test_access_comes_only_from_a_rule_that_names_the_user_or_a_group(rules, user, account):
    decision = decide(rules, user, set(), account)
    assert (decision is not None) == any(user in one.users for one in rules)


@pytest.mark.parametrize(
    ("fields", "allowed"),
    [
        ({}, True),
        ({"groups": ()}, False),
        ({"groups": (), "users": ("alice",)}, True),
        ({"groups": ("Dba",)}, False),
        ({"users": ("Alice",), "groups": ()}, False),
        ({"users": ("dba",), "groups": ("alice",)}, False),
        ({"accounts": ()}, False),
        ({"accounts": ("x/*", "a/b")}, True),
    ],
)
def test_a_rule_needs_the_user_and_the_account(fields, allowed):
    assert (decide([rule(**fields)], "alice", {"dba"}, "a/b") is not None) is allowed


def test_the_longest_rule_applies_as_a_whole():
    short = rule("a", max_duration=60, idle_limit=5)
    long = rule("b", max_duration=120, idle_limit=0)
    other = rule("c", max_duration=120, idle_limit=7)
    for rules in ([short, long, other], [other, long, short]):
        assert decide(rules, "alice", {"dba"}, "a/b") is long
