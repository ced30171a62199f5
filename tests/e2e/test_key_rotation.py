"""Every key of the platform is replaced under a running product, and nothing breaks: old and new overlap."""

from __future__ import annotations

import base64
import json

import psycopg
import pytest
from processes import wait_for

#: What stands in agents' and relays' trusted lists; the others sign nothing that they check.
PUBLISHED = ("grant", "relay-user-ca", "relay-host-ca", "recording")


def keys(stack) -> list[dict]:
    return json.loads(stack.platform("keys", "list", "--json"))["keys"]


def kid_of(stack, purpose: str, state: str) -> str:
    return next(row["kid"] for row in keys(stack) if (row["purpose"], row["state"]) == (purpose, state))


def knows(stack, kid: str) -> bool:
    """Whether agent and relay have the key in what they keep on disk, where a token's claims are base64."""
    agent = json.loads((stack.folder / "dc1-a" / "trust.json").read_text())
    relay = (stack.folder / "relay" / "trust").read_text()
    return kid in json.dumps(agent) and kid in json.dumps(_claims(relay))


def _claims(token: str) -> dict:
    body = token.split(".")[1]
    return json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))


def one(connection: psycopg.Connection, number: int) -> None:
    assert connection.execute(f"select {number}").fetchone() == (number,)


def retired(stack) -> list[tuple[str, str]]:
    return [(row["purpose"], row["kid"]) for row in keys(stack) if row["state"] == "retired"]


def rotated(stack, purpose: str) -> str:
    """Announce the next key of ``purpose``; returns its id when agent and relay know it."""
    stack.platform("keys", "rotate", purpose)
    following = kid_of(stack, purpose, "next")
    wait_for(lambda: knows(stack, following), "the next key at agent and relay", timeout=120)
    return following


@pytest.mark.parametrize("purpose", PUBLISHED)
def test_a_key_is_replaced_without_a_break(stack, alice, connect, replay, purpose: str) -> None:
    following = rotated(stack, purpose)
    with connect(alice) as connected, connected.open() as before:
        one(before, 1)
        session = connected.session()["id"]
        stack.platform("keys", "rotate", purpose, "--now")  # not eight days later
        assert kid_of(stack, purpose, "current") == following
        one(before, 2)
        with connected.open() as again:  # the old key's grant, an agent with a new statement
            one(again, 3)
        with connect(alice) as later, later.open() as fresh:  # all new
            one(fresh, 4)
            newer = later.session()["id"]
    for number, name in ((1, session), (4, newer)):
        assert any(event.get("sql") == f"select {number}" for event in replay(alice, name))


def test_leaked_keys_are_withdrawn_under_a_running_product(stack, alice, connect) -> None:
    for purpose in set(PUBLISHED) - {purpose for purpose, _ in retired(stack)}:  # when run alone
        rotated(stack, purpose)
        stack.platform("keys", "rotate", purpose, "--now")
    replaced = retired(stack)
    assert {purpose for purpose, _ in replaced} == set(PUBLISHED)
    log = stack.folder / "relay.log"
    before = log.read_text().count("route lost")
    for _, kid in replaced:
        stack.platform("keys", "distrust", kid)
    wait_for(lambda: not any(knows(stack, kid) for _, kid in replaced), "the end of the old", timeout=120)
    # The agent's tunnel stood on a certificate of the old key: it is cut, and made anew under the new one.
    wait_for(lambda: log.read_text().count("route lost") > before, "the cut", timeout=120)
    wait_for(lambda: stack.status("pam-relay", "relay")["routes"], "the agent to be back", timeout=120)
    with connect(alice) as connected, connected.open() as connection:
        one(connection, 8)


def test_what_was_signed_and_sealed_before_is_good_after_a_restart_of_everything(
    stack, alice, connect, replay
) -> None:
    with connect(alice) as connected, connected.open() as connection:
        one(connection, 5)
        session = connected.session()["id"]
    replay(alice, session)
    for name in ("secret-key", "oidc"):
        stack.platform("keys", "rotate", name)
    stack.platform("vault", "rekey")  # under the running server
    with connect(alice) as connected, connected.open() as connection:
        one(connection, 6)
    for name in ("dc1-a", "relay", "platform"):
        stack.processes[name].stop()
    stack.start()
    with connect(alice) as connected, connected.open() as connection:
        one(connection, 7)
    assert any(event.get("sql") == "select 5" for event in replay(alice, session))
    assert " 0 not as they must be" in stack.platform("recordings", "verify")
