"""Abuse of sessions: grants shown where they are not for, targets that are not allowed, names and bytes that
are not what they seem, recordings of others. Each test is named after its class of vulnerability."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import psycopg
import pytest
from processes import wait_for
from stack import Stack
from stalling import Target

from pam_client.session import Session, SessionKeys, parse
from pam_common import fast_ssh
from pam_common.errors import PamError, RefusedError
from pam_common.keys import SigningKey
from pam_common.noise import x25519_public
from pam_common.secure_channel import SecureChannel, deadline
from pam_common.tokens import Grant

STARTUP = struct.pack(">II", 30, 196608) + b"user\0me\0database\0app\0\0"
SSL_REQUEST = struct.pack(">II", 8, 80877103)

_ISSUE = """
import json, sys, django
django.setup()
from pam_common.tokens import Grant
from pam_platform.vault import keys
given = json.load(sys.stdin)
now = given.pop("now")
issuer = given.pop("issuer")
grant = Grant(**{**given, "client_key": bytes.fromhex(given["client_key"])})
print(grant.issue(keys.signing_key("grant"), issuer=issuer, now=now))
"""


class TwoGateways(Stack):
    """With a second gateway, dc2."""

    def access(self) -> dict[str, Any]:
        described = super().access()
        described["gateways"].append({"name": "dc2"})
        return described


@pytest.fixture(scope="module")
def targets() -> Iterator[dict[str, Target]]:
    made = {"forbidden-db": Target(), "early-db": Target(answers=[b"S" + b"E\0\0\0\5x"])}
    yield made
    for target in made.values():
        target.close()


@pytest.fixture(scope="module")
def stack(tmp_path_factory, postgres, targets) -> Iterator[Stack]:
    allowed = [f"127.0.0.1:{port}" for port in (postgres.port, targets["early-db"].port)]
    folder = tmp_path_factory.mktemp("stack")
    with TwoGateways(folder, agents=("dc1-a",), agent_config={"allow_targets": allowed}) as running:
        running.add_database(postgres)
        running.resources[0]["accounts"][1].pop("databases", None)  # the owner may use any
        for name, target in targets.items():
            running.add_database(postgres, name=name, port=target.port, tls={"mode": "require"})
        running.start()
        yield running


# -- grants ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def granted(stack) -> Callable[[], Session]:
    """A session as the platform grants it to alice, without pam-client."""
    browser = stack.person("alice").web()

    def connect() -> Session:
        keys = SessionKeys()
        body = {"resource": "demo-db", "account": "owner", **keys.public()}
        headers = {"X-CSRFToken": browser.cookies["csrftoken"], "Referer": stack.url}
        answer = browser.post(f"{stack.url}/api/v1/connect", json=body, headers=headers, timeout=90)
        assert answer.status_code == 200, answer.text
        return parse(answer.json(), keys)

    return connect


@contextmanager
def relay(session: Session) -> Iterator[fast_ssh.Transport]:
    (at,) = session.relays
    transport = fast_ssh.connect(
        socket.create_connection((at.host, at.port)),
        name="test",
        host_ca=session.relay_host_ca,
        hostname=at.name,
        login=session.ssh_key,
        now=time.time,
    )
    try:
        yield transport
    finally:
        transport.close()


def shown(session: Session, *, grant: str | None = None, noise: bytes | None = None) -> str:
    """What the agent answers to a grant: ``in``, or the words of its refusal."""
    with relay(session) as transport:
        stream = fast_ssh.open_direct(transport, session.gateway)
        with deadline(stream, 90):
            channel = SecureChannel.connect(
                stream,
                gateway=session.gateway,
                static=noise or session.keys.noise,
                check_agent=lambda key, statement: session.check_agent(key, statement, now=time.time()),
                grant=(grant or session.grant).encode(),
            )
            try:
                # A refusal may be here already, and its words stay to be read.
                with suppress(OSError):
                    channel.sendall(STARTUP)
                answer = channel.recv(65536)
            except RefusedError as error:
                return str(error)
        return "in" if answer.startswith(b"R") else answer.decode("latin-1")


def changed(session: Session, *, now: float, **changes: Any) -> Grant:
    """The session's grant, as if made at ``now``, with other contents."""
    grant = Grant(
        session=session.id,
        user="alice",
        gateway=session.gateway,
        account=session.account,
        protocol=session.protocol,
        client_key=x25519_public(session.keys.noise),
        expires=int(now) + 120,
        session_end=session.session_end,
    )
    return replace(grant, **changes)


def signed(stack: Stack, session: Session, *, now: float | None = None, **changes: Any) -> str:
    """A changed grant under the platform's own key."""
    now = time.time() if now is None else now
    grant = changed(session, now=now, **changes)
    given = {**vars(grant), "client_key": grant.client_key.hex(), "now": now, "issuer": session.issuer}
    config = str(stack.folder / "platform.yml")
    env = {**os.environ, "PAM_PLATFORM_CONFIG": config, "DJANGO_SETTINGS_MODULE": "pam_platform.settings"}
    command = [sys.executable, "-c", _ISSUE]
    done = subprocess.run(
        command, env=env, input=json.dumps(given), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_abuse_13_replay_a_grant_lets_in_its_holder_until_the_session_is_killed(granted, alice) -> None:
    session = granted()
    assert shown(session) == "in"
    assert shown(session) == "in", "a pool's next connection"
    alice.run("sessions", "kill", session.id)

    def refused() -> bool:
        """By the agent, or by the relay where that has heard of it before."""
        try:
            return "killed by alice" in shown(session)
        except PamError as error:
            return "refused" in str(error)

    # The agent hears of it within a second; how soon it cuts is tested elsewhere.
    wait_for(refused, "the grant to be refused")


def test_abuse_13_replay_a_stolen_grant_is_nothing_without_its_key(granted) -> None:
    stolen, thief = granted(), granted()
    assert "key" in shown(thief, grant=stolen.grant)
    assert shown(stolen) == "in", "its owner is not disturbed"
    assert "key" in shown(thief, grant=stolen.grant), "nor is an open session open to others"


def test_abuse_13_replay_an_old_grant_opens_nothing(stack, granted) -> None:
    session = granted()
    assert shown(session, grant=signed(stack, session)) == "in", "this is how it is made"
    session = granted()
    assert "not used in time" in shown(session, grant=signed(stack, session, now=time.time() - 600))


def test_abuse_12_wrong_gateway_a_grant_is_for_one_gateway(stack, granted) -> None:
    here = granted()
    elsewhere = signed(stack, here, gateway="dc2")
    assert "grant" in shown(here, grant=elsewhere)
    assert "grant refused" in stack.processes["dc1-a"].tail()


def test_abuse_12_wrong_account_a_grant_names_its_account(stack, granted) -> None:
    """Even the platform's own signature opens an account only for the session that it was granted for."""
    session = granted()
    other = signed(stack, session, account="demo-db/readonly")
    assert shown(session, grant=other) != "in"


def test_abuse_12_wrong_gateway_a_certificate_is_for_one_gateway(granted) -> None:
    with relay(granted()) as transport, pytest.raises(PamError, match="not allowed by the certificate"):
        fast_ssh.open_direct(transport, "dc2")


def test_abuse_12_a_forged_grant_is_refused(granted) -> None:
    session = granted()
    forged = changed(session, now=time.time()).issue(SigningKey.generate(), issuer=session.issuer)
    assert "grant" in shown(session, grant=forged)


def test_abuse_13_logout_ends_the_login_and_no_session(stack, connect, postgres) -> None:
    """By design, as docs/security.md says: who wants a session to end, ends it."""
    bob = stack.person("bob")
    bob.login()
    with connect(bob) as connected, connected.open() as connection:
        bob.run("logout")
        assert bob.run("connect", "demo-db/owner", "--", "true", check=False).returncode != 0
        assert connection.execute("select 1").fetchone() == (1,)

        query = "select pg_sleep(600), 13"

        # Beside the query: who asks only after the cut may find no words any more.
        def cut() -> None:
            runs = "select count(*) from pg_stat_activity where state = 'active' and query = '{}'"
            wait_for(lambda: postgres.sql(runs.format(query)) == "1", "the query at the target")
            stack.platform("user", "disable", "bob")

        disable = threading.Thread(target=cut)
        disable.start()
        with pytest.raises(psycopg.OperationalError, match="disabled"):
            connection.execute(query)
        disable.join()
    stack.platform("user", "enable", "bob")


# -- targets ---------------------------------------------------------------------------------------------


def test_abuse_11_ssrf_what_the_agents_file_does_not_allow_is_not_dialled(
    stack, alice, targets, replay
) -> None:
    done = alice.run("connect", "forbidden-db/owner", "--", "psql", "-Xc", "select 1", check=False)
    assert done.returncode == 2
    port = targets["forbidden-db"].port
    assert f"the agent may not dial 127.0.0.1:{port}" in done.stderr
    assert "allow_targets" in done.stderr
    assert targets["forbidden-db"].connections == 0
    log = stack.processes["dc1-a"].log
    # Written when all of the connection is over, somewhat after psql was told.
    wait_for(lambda: f"the agent may not dial 127.0.0.1:{port}" in log.read_text(), "the agent's word of it")
    listed = json.loads(alice.run("sessions", "ls", "--json").stdout)
    (session,) = [row["id"] for row in listed if row["account"] == "forbidden-db/owner"]
    events = replay(alice, session)
    assert any(event["kind"] == "refused" and "may not dial" in event["reason"] for event in events)


def test_abuse_9_bytes_before_tls_of_the_target_are_not_taken_for_its_own(alice) -> None:
    done = alice.run("connect", "early-db/owner", "--", "psql", "-Xc", "select 1", check=False)
    assert done.returncode == 2
    assert "unencrypted bytes before TLS" in done.stderr


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (SSL_REQUEST + STARTUP, "encryption"),
        (struct.pack(">II", 0x7FFFFFFF, 196608) + b"user\0", "not a psql connection"),
        (struct.pack(">II", 10_001, 196608) + b"user\0" + b"x" * 9_988, "not a psql connection"),
        (struct.pack(">II", 7, 196608), "not a psql connection"),
    ],
    ids=["behind-an-encryption-request", "4-GB", "oversize", "undersize"],
)
def test_abuse_9_and_21_a_start_that_lies_ends_in_words(alice, connect, said: bytes, words: str) -> None:
    with connect(alice) as connected:
        with socket.create_connection(("127.0.0.1", connected.port)) as program:
            program.settimeout(90)
            program.sendall(said)
            heard = b""
            with suppress(ConnectionResetError):
                while data := program.recv(65536):
                    heard += data
        assert b"R\0\0\0\x08\0\0\0\0" not in heard, "logged in"
        # From the agent in the protocol's form, or from pam-client, which takes it for another protocol.
        assert words in heard.decode("latin-1") + connected.process.tail()
        with connected.open() as connection:
            assert connection.execute("select 1").fetchone() == (1,)


ODD = [
    "app host=127.0.0.2",
    "dbname=postgres",
    "postgresql://127.0.0.2/postgres",
    "app' host='127.0.0.2",
    "app\\",
    "APP",
    "\uff41pp",
    "app\n",
    "app ",
    "x" * 63 + "app",
]


def test_abuse_8_name_tricks_a_database_is_compared_byte_by_byte(alice, connect) -> None:
    with connect(alice, "demo-db/readonly") as connected:
        for name in ODD:
            with pytest.raises(psycopg.OperationalError, match="is not open to"):
                psycopg.connect(connected.conninfo, dbname=name)


def test_abuse_8_name_tricks_a_database_is_a_name_to_the_target(alice, connect) -> None:
    with connect(alice, "demo-db/owner") as connected, pytest.raises(psycopg.OperationalError) as refused:
        psycopg.connect(connected.conninfo, dbname=ODD[0])
    assert f'database "{ODD[0]}" does not exist' in str(refused.value)


def test_abuse_8_name_tricks_the_user_is_the_accounts(alice, connect) -> None:
    who = "select session_user, current_database(), current_setting('application_name')"
    with connect(alice, "demo-db/readonly") as connected:
        for name in (*ODD, "postgres", "demo_db_rw"):
            with psycopg.connect(connected.conninfo, user=name, application_name=name) as connection:
                assert connection.execute(who).fetchone()[:2] == ("demo_db_ro", "app")
