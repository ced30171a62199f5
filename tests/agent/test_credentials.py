"""The platform's answer to "open": what is taken of it, what is refused, and that no secret shows."""

from __future__ import annotations

import contextlib
import copy
import json
import traceback

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nacl.public import PrivateKey, SealedBox

from pam_agent.credentials import (
    MAX_BOX,
    MAX_CERTIFICATE_LINE,
    MAX_OPTIONS,
    MAX_SECRETS,
    SshKeys,
    allowed_recipients,
    parse_opening,
)
from pam_common.errors import AuthenticationError, PamError, ProtocolError
from pam_common.keys import b64encode, key_id
from pam_common.tokens import Grant

SEALING = PrivateKey(b"\5" * 32)
READER = bytes(PrivateKey(b"\6" * 32).public_key)
SECRET = "s3cret-word"
GRANT = Grant(
    session="s-" + "a" * 26,
    user="alice",
    gateway="dc1",
    account="prod-db/readonly",
    protocol="postgres",
    client_key=b"\1" * 32,
    expires=2000,
    session_end=9000,
    idle_limit=60,
)


def sealed(**changes: object) -> str:
    secret = {
        "session": GRANT.session,
        "account": GRANT.account,
        "agent": "dc1-a",
        "user": "app_ro",
        "password": SECRET,
        **changes,
    }
    return b64encode(SealedBox(SEALING.public_key).encrypt(json.dumps(secret).encode()))


def body(**changes: object) -> dict[str, object]:
    return {
        "session": GRANT.session,
        "part": 2,
        "user": "alice",
        "account": GRANT.account,
        "protocol": "postgres",
        "session_end": 8000,
        "idle_limit": 0,
        "target": {
            "host": "10.0.0.5",
            "port": 5432,
            "server_name": "db.internal",
            "tls": {"mode": "verify-full", "ca_pem": "PEM"},
            "database": ["app"],
        },
        "budgets": {"rows_bytes": 100},
        "allow_replication": True,
        "recipients": [{"kid": key_id(READER), "key": b64encode(READER)}],
        "credential": sealed(),
        **changes,
    }


def parse(answer: dict[str, object], allowed: dict[str, bytes] | None = None):
    allowed = {key_id(READER): READER} if allowed is None else allowed
    return parse_opening(answer, GRANT, agent="dc1-a", sealing=bytes(SEALING), allowed=allowed)


def test_the_answer_becomes_an_opening() -> None:
    opened = parse(body())
    opening = opened.opening
    assert (opening.part, opening.session_end, opening.idle_limit) == (2, 8000, 60)
    assert (opening.target.host, opening.target.port) == ("10.0.0.5", 5432)
    assert (opening.target.tls.server_name, opening.target.tls.ca_pem) == ("db.internal", "PEM")
    assert (opening.databases, opening.rows_bytes, opening.allow_replication) == (("app",), 100, True)
    assert (opening.credential.user, opening.credential.password) == ("app_ro", SECRET)
    assert [recipient.key for recipient in opened.recipients] == [READER]


def test_of_two_limits_the_stricter_one_holds() -> None:
    assert parse(body(session_end=99999)).opening.session_end == 9000
    assert parse(body(idle_limit=30)).opening.idle_limit == 30
    assert parse(body(idle_limit=300)).opening.idle_limit == 60


def test_the_secret_shows_nowhere() -> None:
    assert SECRET not in repr(parse(body()))


@pytest.mark.parametrize("name", ["session", "user", "account", "protocol"])
def test_an_answer_about_something_else_is_refused(name: str) -> None:
    with pytest.raises(AuthenticationError, match=f"another {name}"):
        parse(body(**{name: "other"}))


@pytest.mark.parametrize("name", ["session", "account", "agent"])
def test_a_credential_for_something_else_is_refused(name: str) -> None:
    with pytest.raises(AuthenticationError, match="sealed credential"):
        parse(body(credential=sealed(**{name: "other"})))


def test_a_credential_sealed_to_another_agent_is_refused() -> None:
    other = SealedBox(PrivateKey.generate().public_key).encrypt(b"{}")
    for credential in (b64encode(other), "", "!", "A" * 100_000):
        with pytest.raises(AuthenticationError, match="not sealed to this agent"):
            parse(body(credential=credential))


def test_no_error_quotes_the_secret() -> None:
    not_json = b64encode(SealedBox(SEALING.public_key).encrypt(f"{{{SECRET}".encode()))
    no_user = sealed(user=None)
    long_password = sealed(password=SECRET * 10_000)
    for credential in (not_json, no_user, long_password):
        with pytest.raises(PamError) as caught:
            parse(body(credential=credential))
        assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_recipients_outside_the_local_list_are_refused() -> None:
    with pytest.raises(AuthenticationError, match="does not allow"):
        parse(body(), allowed={})
    with pytest.raises(AuthenticationError, match="does not allow"):
        parse(body(), allowed={key_id(READER): b"\0" * 32})
    with pytest.raises(ProtocolError, match="nobody"):
        parse(body(recipients=[]))
    with pytest.raises(ProtocolError, match="recipient"):
        parse(body(recipients=[{"kid": "0" * 16, "key": b64encode(READER)}]))


@pytest.mark.parametrize(
    "changes",
    [
        {"part": 0},
        {"part": True},
        {"part": "1"},
        {"session_end": None},
        {"idle_limit": -1},
        {"target": None},
        {"target": {"host": "", "port": 1, "tls": {"mode": "disable"}}},
        {"target": {"host": "h", "port": 70000, "tls": {"mode": "disable"}}},
        {"target": {"host": "h", "port": 1}},
        {"target": {"host": "h", "port": 1, "tls": {"mode": "prefer"}}},
        {"target": {"host": "h", "port": 1, "tls": {"mode": "verify-ca", "ca_pem": 5}}},
        {"target": {"host": "h", "port": 1, "tls": {"mode": "disable"}, "database": "app"}},
        {"target": {"host": "h", "port": 1, "tls": {"mode": "disable"}, "database": []}},
        {"target": {"host": "h", "port": 1, "tls": {"mode": "disable"}, "database": ["a\0b"]}},
        {"target": {"host": "h", "port": 1, "tls": {"mode": "disable"}, "database": ["a"] * 1001}},
        {"target": {"host": "h", "port": 1, "tls": {"mode": "verify-ca", "ca_pem": "x" * 262_145}}},
        {"target": {"host": "h", "port": 1, "tls": {"mode": "disable", "client_cert_pem": "x" * 262_145}}},
        {"budgets": [1]},
        {"budgets": {"rows_bytes": (1 << 20) + 1}},
        {"budgets": {"rows_bytes": 1 << 40}},
        {"recipients": "all"},
        {"credential": None},
    ],
)
def test_a_malformed_answer_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ProtocolError):
        parse(body(**changes))


def test_a_credential_that_is_larger_than_any_is_refused() -> None:
    parse(body(credential=sealed(password="x" * 10_000)))
    with pytest.raises(PamError):
        parse(body(credential=sealed(password="x" * MAX_BOX)))


def test_replication_needs_a_plain_true() -> None:
    for value in (None, 1, "yes", [True]):
        assert parse(body(allow_replication=value)).opening.allow_replication is False


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
BODY = body()


@given(st.sampled_from(sorted(BODY)), st.sampled_from(sorted(BODY["target"])), json_values)  # type: ignore[call-overload]
def test_any_change_parses_or_raises_for_people(name: str, inner: str, value: object) -> None:
    changed = copy.deepcopy(BODY)
    changed[name] = value
    nested = copy.deepcopy(BODY)
    nested["target"][inner] = value  # type: ignore[index]
    for answer in (changed, nested):
        with contextlib.suppress(PamError):
            parse(answer)


def test_the_local_list_of_recipients() -> None:
    class Listed:
        recording_keys = {"a" * 16: b"\1" * 32, "b" * 16: b"\2" * 32}  # noqa: RUF012

    trust = Listed()
    assert allowed_recipients(None, trust) == Listed.recording_keys  # type: ignore[arg-type]
    local = (("a" * 16, None), ("c" * 16, b"\3" * 32), ("d" * 16, None))
    assert allowed_recipients(local, trust) == {"a" * 16: b"\1" * 32, "c" * 16: b"\3" * 32}  # type: ignore[arg-type]


def test_options_and_secrets_reach_the_protocol_unread() -> None:
    target = {**body()["target"], "options": {"host_keys": ["a"], "account": {"allow": ["shell"]}}}
    answer = body(target=target, credential=sealed(secrets={"private_key": SECRET}))
    opening = parse(answer).opening
    assert opening.options == target["options"]
    assert opening.credential.secrets == {"private_key": SECRET}
    assert SECRET not in repr(opening)
    assert parse(body()).opening.options == {}


def test_options_and_secrets_are_bounded() -> None:
    target = body()["target"]
    for options in ({"a": "x" * MAX_OPTIONS}, [], "text"):
        with pytest.raises(ProtocolError, match="options"):
            parse(body(target={**target, "options": options}))
    for secrets in ({str(i): "x" for i in range(MAX_SECRETS + 1)}, {"token": ""}, {"token": 1}, ["x"]):
        with pytest.raises(ProtocolError, match="secrets"):
            parse(body(credential=sealed(secrets=secrets)))


def test_the_keys_of_an_ssh_session_get_their_certificates() -> None:
    keys = SshKeys.generate()

    def parse_ssh(ssh: object):
        return parse_opening(
            body(ssh=ssh),
            GRANT,
            agent="dc1-a",
            sealing=bytes(SEALING),
            allowed={key_id(READER): READER},
            ssh_keys=keys,
        ).opening.ssh

    identity = parse_ssh({"host_certificate": "host line", "user_certificate": None})
    assert (identity.host_certificate, identity.user_certificate) == ("host line", None)
    assert (identity.host_seed, identity.user_seed) == (keys.host.seed(), keys.user.seed())
    assert repr(identity.host_seed) not in repr(identity)
    assert parse(body()).opening.ssh is None
    long = "x" * (MAX_CERTIFICATE_LINE + 1)
    for ssh in (None, {}, {"host_certificate": long}, {"host_certificate": "x", "user_certificate": long}):
        with pytest.raises(ProtocolError):
            parse_ssh(ssh)
