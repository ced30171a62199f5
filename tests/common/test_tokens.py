"""Names, encodings, keys and tokens: what is accepted is exactly what was meant."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from pam_common import tokens
from pam_common.errors import AuthenticationError
from pam_common.tokens import (
    AgentStatement,
    Grant,
    KeyEntry,
    SigningKey,
    VerifyKeys,
    b64decode,
    b64encode,
    key_id,
)

NOW = 1_800_000_000
ISSUER = "https://pam.example.com"
KEY = SigningKey(bytes(range(32)))
KEYS = VerifyKeys.of(KEY.public)
OTHER = SigningKey(bytes(32))
SESSION = "s-" + "a2" * 13

GRANT = Grant(
    session=SESSION,
    user="alice",
    gateway="dc1",
    account="prod-db/readonly",
    protocol="postgres",
    client_key=b"c" * 32,
    expires=NOW + 120,
    session_end=NOW + 3600,
    idle_limit=600,
)
STATEMENT = AgentStatement("agent-1", "dc1", noise_key=b"n" * 32, identity_key=b"i" * 32)


def parse_grant(token: str | bytes, *, now: float = NOW, first: bool = True, **other: Any) -> Grant:
    arguments: dict[str, Any] = {"issuer": ISSUER, "gateway": "dc1", **other}
    return Grant.parse(token, KEYS, now=now, first_opening=first, **arguments)


def claims_of(token: str) -> dict[str, Any]:
    claims: dict[str, Any] = jwt.decode(token, options={"verify_signature": False})
    return claims


def verify_any(token: str | bytes, **options: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {"issuer": ISSUER, "audience": "pam-trust", "now": NOW, **options}
    return tokens.verify(token, KEYS, tokens.TRUST, **arguments)


def sign_any(claims: dict[str, Any] | None = None, *, lifetime: int = 60, now: float = NOW) -> str:
    return tokens.sign(
        KEY, tokens.TRUST, {"iss": ISSUER, "aud": "pam-trust", **(claims or {})}, lifetime=lifetime, now=now
    )


# --- names and encodings -----------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["a", "dc1", "prod-db", "a" * 63])
def test_labels(text: str) -> None:
    assert tokens.is_label(text)


@pytest.mark.parametrize(
    "text",
    ["", "1a", "-a", "a-", "A", "dc1\n", "dc1 ", "a_b", "a.b", "ä", "a" * 64, "dc1/..", None, 1, b"dc1"],
)
def test_what_is_no_label(text: object) -> None:
    assert not tokens.is_label(text)


def test_account_names_resource_and_account() -> None:
    assert tokens.is_account("prod-db/readonly")
    for text in ("prod-db", "prod-db/", "/a", "a/b/c", "a/b\n", "A/b", None):
        assert not tokens.is_account(text)


def test_session_ids_are_well_formed_and_differ() -> None:
    ids = {tokens.new_session_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(tokens.is_session_id(text) for text in ids)


@pytest.mark.parametrize(
    "text", [SESSION + "\n", SESSION.upper(), "s-", SESSION[:-1], SESSION + "a", "../" + SESSION, 7]
)
def test_what_is_no_session_id(text: object) -> None:
    assert not tokens.is_session_id(text)


@settings(deadline=None)
@given(st.binary(max_size=100))
def test_base64_round_trip(data: bytes) -> None:
    text = b64encode(data)
    assert "=" not in text
    assert b64decode(text) == data == b64decode(text, len(data))


@settings(deadline=None)
@given(st.text(max_size=12))
def test_base64_has_one_spelling(text: str) -> None:
    try:
        data = b64decode(text)
    except ValueError:
        return
    assert b64encode(data) == text


@pytest.mark.parametrize("text", ["AA==", "A", "AB", "A+", "A/", "AA\n", " AA", "ÄÄ", None, b"AA"])
def test_base64_is_strict(text: Any) -> None:
    with pytest.raises(ValueError, match="base64url"):
        b64decode(text)


def test_base64_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="31 bytes instead of 32"):
        b64decode(b64encode(bytes(31)), 32)


def test_key_id_is_the_beginning_of_blake2b_256() -> None:
    # From `printf '' | b2sum -l 256`.
    assert key_id(b"") == "0e5751c026e543b2"


# --- keys --------------------------------------------------------------------------------------------


def test_signing_key_hides_its_secret() -> None:
    assert repr(KEY) == f"SigningKey(kid='{KEY.kid}')"
    assert SigningKey(KEY.seed()).public == KEY.public
    assert SigningKey.generate().kid != SigningKey.generate().kid
    KEYS.get(KEY.kid).verify(KEY.sign(b"data"), b"data")


def test_key_list_round_trip() -> None:
    keys = VerifyKeys.of(KEY.public, OTHER.public)
    assert VerifyKeys.from_json(json.loads(json.dumps(keys.to_json()))).entries == keys.entries
    assert len(keys) == 2
    assert len(VerifyKeys.from_json([])) == 0


def test_key_list_refuses_duplicates_and_foreign_ids() -> None:
    with pytest.raises(AuthenticationError, match="twice"):
        VerifyKeys.of(KEY.public, KEY.public)
    with pytest.raises(AuthenticationError, match="not that of its key"):
        VerifyKeys([KeyEntry(OTHER.kid, KEY.public)])
    with pytest.raises(AuthenticationError, match="more than 64"):
        VerifyKeys.of(*(SigningKey.generate().public for _ in range(65)))


@pytest.mark.parametrize(
    "value",
    [
        None,
        {},
        "[]",
        [None],
        [{"kid": KEY.kid}],
        [{"kid": KEY.kid, "key": b64encode(KEY.public), "x": 1}],
        [{"kid": KEY.kid, "key": b64encode(KEY.public) + "="}],
        [{"kid": KEY.kid, "key": b64encode(KEY.public[:31])}],
        [{"kid": [], "key": b64encode(KEY.public)}],
        [{"kid": KEY.kid, "key": 1}],
    ],
)
def test_malformed_key_list(value: object) -> None:
    with pytest.raises(AuthenticationError):
        VerifyKeys.from_json(value)


def test_unknown_key_id() -> None:
    with pytest.raises(AuthenticationError, match="not trusted"):
        KEYS.get(OTHER.kid)


# --- tokens ------------------------------------------------------------------------------------------


def test_token_round_trip() -> None:
    token = sign_any({"x": 1})
    assert verify_any(token) == verify_any(token.encode())
    assert verify_any(token) == {"iss": ISSUER, "aud": "pam-trust", "x": 1, "iat": NOW, "exp": NOW + 60}
    assert jwt.get_unverified_header(token) == {"alg": "EdDSA", "kid": KEY.kid, "typ": tokens.TRUST}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"issuer": "https://evil.example"}, "InvalidIssuer"),
        ({"audience": "pam"}, "InvalidAudience"),
        ({"now": NOW + 60}, "has expired"),
        ({"now": NOW - 61}, "from the future"),
        ({"required": ("jti",)}, "MissingRequiredClaim"),
        ({"max_lifetime": 59}, "longer than 59 s"),
        ({"max_size": 100}, "larger than 100"),
    ],
)
def test_token_that_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(AuthenticationError, match=message):
        verify_any(sign_any(), **options)


def test_a_token_that_is_larger_than_any_of_ours_is_refused() -> None:
    with pytest.raises(AuthenticationError, match="larger than 16384"):
        verify_any(sign_any({"x": "y" * tokens.MAX_TOKEN}))


def test_leeway_moves_both_ends() -> None:
    verify_any(sign_any(), now=NOW + 64, leeway=5)
    verify_any(sign_any(), now=NOW - 64, leeway=5)


def test_any_issuer_where_the_key_says_who() -> None:
    assert verify_any(sign_any({"iss": "agent-1"}), issuer=None)["iss"] == "agent-1"


@pytest.mark.parametrize("claim", ["iss", "aud", "exp", "iat"])
def test_required_claims(claim: str) -> None:
    claims = claims_of(sign_any())
    del claims[claim]
    with pytest.raises(AuthenticationError, match="MissingRequiredClaim"):
        verify_any(raw_token(claims))


@pytest.mark.parametrize(
    "value", [None, True, 1.5, "1800000060", -1, 0, 10**400, float("nan"), float("inf"), []]
)
@pytest.mark.parametrize("claim", ["exp", "iat"])
def test_times_are_integers(claim: str, value: object) -> None:
    with pytest.raises(AuthenticationError):
        verify_any(raw_token({**claims_of(sign_any()), claim: value}))


@pytest.mark.parametrize("audience", [["pam-trust"], ["pam-trust", "other"], None, 1, {}])
def test_audience_is_one_name(audience: object) -> None:
    with pytest.raises(AuthenticationError):
        verify_any(raw_token({**claims_of(sign_any()), "aud": audience}))


def raw_token(claims: Any, header: dict[str, Any] | None = None, key: SigningKey = KEY) -> str:
    """A token signed by hand, so that it can hold what the library would not write."""
    head = {"alg": "EdDSA", "typ": tokens.TRUST, "kid": key.kid} if header is None else header
    body = b".".join(
        base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in (head, claims)
    )
    return (body + b"." + base64.urlsafe_b64encode(key.sign(body)).rstrip(b"=")).decode()


@pytest.mark.parametrize(
    "change",
    [
        {"typ": tokens.RELAY_BUNDLE},
        {"typ": "JWT"},
        {"typ": tokens.TRUST.upper()},
        {"alg": "none"},
        {"alg": "HS256"},
        {"alg": "Ed25519"},
        {"kid": OTHER.kid},
        {"kid": None},
        {"kid": ["a"]},
        {"crit": ["exp"]},
        {"jwk": {"kty": "OKP"}},
        {"b64": False},
    ],
)
def test_header_that_is_not_ours(change: dict[str, Any]) -> None:
    header = {"alg": "EdDSA", "typ": tokens.TRUST, "kid": KEY.kid}
    with pytest.raises(AuthenticationError):
        verify_any(raw_token(claims_of(sign_any()), {**header, **change}))
    for member in header:
        with pytest.raises(AuthenticationError):
            verify_any(raw_token(claims_of(sign_any()), {k: v for k, v in header.items() if k != member}))


def test_public_key_is_no_hmac_secret() -> None:
    public = KEY.private_key.public_key().public_bytes_raw()
    token = jwt.encode(
        claims_of(sign_any()), public, algorithm="HS256", headers={"typ": tokens.TRUST, "kid": KEY.kid}
    )
    with pytest.raises(AuthenticationError, match="another way than EdDSA"):
        verify_any(token)


def test_signature_of_another_key_under_a_trusted_id() -> None:
    header = {"alg": "EdDSA", "typ": tokens.TRUST, "kid": KEY.kid}
    with pytest.raises(AuthenticationError, match="InvalidSignature"):
        verify_any(raw_token(claims_of(sign_any()), header, key=OTHER))


def test_every_flipped_bit_is_noticed() -> None:
    token = sign_any().encode()
    for at in range(8 * len(token)):
        altered = bytearray(token)
        altered[at // 8] ^= 1 << at % 8
        with pytest.raises(AuthenticationError):
            verify_any(bytes(altered))


@settings(deadline=None)
@given(st.one_of(st.text(), st.binary(), st.lists(st.binary(max_size=40), max_size=5).map(b".".join)))
def test_garbage_is_refused_cleanly(token: str | bytes) -> None:
    with pytest.raises(AuthenticationError):
        verify_any(token)


@settings(deadline=None)
@given(
    st.recursive(
        st.none() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_signed_garbage_is_refused_cleanly(claims: Any) -> None:
    with pytest.raises(AuthenticationError):
        verify_any(raw_token(claims))
    with pytest.raises(AuthenticationError):
        verify_any(raw_token(claims_of(sign_any()), claims if isinstance(claims, dict) else {"alg": claims}))


def test_deep_nesting_is_refused_cleanly() -> None:
    deep = base64.urlsafe_b64encode(b"[" * 9000).decode()
    with pytest.raises(AuthenticationError):
        verify_any(f"{deep}.e30.AA")


# --- grants ------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.builds(
        Grant,
        session=st.from_regex(r"s-[a-z2-7]{26}", fullmatch=True),
        user=st.text("abcÄ漢 .@", min_size=1, max_size=30),
        gateway=st.from_regex(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True),
        account=st.sampled_from(["a/b", "prod-db/readonly"]),
        protocol=st.sampled_from(["postgres", "ssh"]),
        client_key=st.binary(min_size=32, max_size=32),
        expires=st.integers(NOW + 1, NOW + 200),
        session_end=st.integers(NOW + 1, NOW + 10**6),
        idle_limit=st.integers(0, 10**6),
    )
)
def test_grant_round_trip(grant: Grant) -> None:
    assert parse_grant(grant.issue(KEY, issuer=ISSUER, now=NOW), gateway=grant.gateway) == grant


def test_grant_carries_neither_host_nor_secret() -> None:
    claims = claims_of(GRANT.issue(KEY, issuer=ISSUER, now=NOW))
    assert claims == {
        "iss": ISSUER,
        "aud": "gateway:dc1",
        "jti": SESSION,
        "sub": "alice",
        "iat": NOW,
        "exp": NOW + 120,
        "cnf": {"jwk": {"kty": "OKP", "crv": "X25519", "x": b64encode(b"c" * 32)}},
        "account": "prod-db/readonly",
        "protocol": "postgres",
        "session_end": NOW + 3600,
        "idle_limit": 600,
    }


def test_grant_opens_once_in_time_and_is_shown_until_the_end() -> None:
    token = GRANT.issue(KEY, issuer=ISSUER, now=NOW)
    late = NOW + 120
    with pytest.raises(AuthenticationError, match="not used in time"):
        parse_grant(token, now=late)
    grant = parse_grant(token, now=late, first=False)
    with pytest.raises(AuthenticationError, match="not used in time"):
        grant.require_openable(late)
    grant.require_openable(late - 1)
    with pytest.raises(AuthenticationError, match="session is over"):
        parse_grant(token, now=NOW + 3600, first=False)


def test_grant_is_for_one_key_gateway_and_issuer() -> None:
    token = GRANT.issue(KEY, issuer=ISSUER, now=NOW)
    grant = parse_grant(token)
    grant.require_key(b"c" * 32)
    for key in (b"d" * 32, b"c" * 31, b""):
        with pytest.raises(AuthenticationError, match="another client key"):
            grant.require_key(key)
    with pytest.raises(AuthenticationError):
        parse_grant(token, gateway="dc2")
    with pytest.raises(AuthenticationError):
        parse_grant(token, issuer="https://evil.example")
    with pytest.raises(AuthenticationError):
        parse_grant(GRANT.issue(OTHER, issuer=ISSUER, now=NOW))


def test_statement_is_no_grant_and_the_other_way_round() -> None:
    with pytest.raises(AuthenticationError, match="another kind"):
        parse_grant(STATEMENT.issue(KEY, issuer=ISSUER, now=NOW))
    with pytest.raises(AuthenticationError, match="another kind"):
        parse_statement(GRANT.issue(KEY, issuer=ISSUER, now=NOW))


OKP = {"kty": "OKP", "crv": "X25519", "x": b64encode(b"c" * 32)}


@pytest.mark.parametrize(
    "change",
    [
        {"jti": "../../etc"},
        {"jti": SESSION + "\n"},
        {"sub": ""},
        {"sub": "a\x1b[2J"},
        {"sub": "a" * 255},
        {"sub": 7},
        {"account": "prod-db"},
        {"account": ["a/b"]},
        {"protocol": "Postgres"},
        {"session_end": "later"},
        {"session_end": 10**18},
        {"session_end": float(NOW + 10)},
        {"idle_limit": -1},
        {"idle_limit": True},
        {"idle_limit": None},
        {"cnf": None},
        {"cnf": {}},
        {"cnf": {"kid": "x"}},
        {"cnf": {"jwk": OKP, "kid": "x"}},
        {"cnf": {"jwk": []}},
        {"cnf": {"jwk": {**OKP, "d": "secret"}}},
        {"cnf": {"jwk": {**OKP, "crv": "Ed25519"}}},
        {"cnf": {"jwk": {**OKP, "x": b64encode(b"c" * 31)}}},
        {"cnf": {"jwk": {**OKP, "x": None}}},
        {"nbf": NOW},
    ],
)
def test_grant_with_a_claim_that_is_wrong(change: dict[str, Any]) -> None:
    claims = {**claims_of(GRANT.issue(KEY, issuer=ISSUER, now=NOW)), **change}
    with pytest.raises(AuthenticationError):
        parse_grant(tokens.sign(KEY, tokens.GRANT, claims, lifetime=120, now=NOW))


@pytest.mark.parametrize("issue", [GRANT, STATEMENT])
def test_no_token_is_issued_for_what_is_no_gateway(issue: Any) -> None:
    with pytest.raises(ValueError, match="gateway"):
        dataclasses.replace(issue, gateway="dc1:x").issue(KEY, issuer=ISSUER, now=NOW)


# --- statements --------------------------------------------------------------------------------------


def parse_statement(token: str, *, now: float = NOW, gateway: str = "dc1") -> AgentStatement:
    return AgentStatement.parse(token, KEYS, issuer=ISSUER, gateway=gateway, now=now)


def test_statement_round_trip() -> None:
    token = STATEMENT.issue(KEY, issuer=ISSUER, now=NOW)
    assert parse_statement(token) == STATEMENT
    assert parse_statement(token, now=NOW + 86399) == STATEMENT
    with pytest.raises(AuthenticationError, match="expired"):
        parse_statement(token, now=NOW + 86400)
    with pytest.raises(AuthenticationError):
        parse_statement(token, gateway="dc2")


def test_statement_is_for_one_key() -> None:
    STATEMENT.require_key(b"n" * 32)
    with pytest.raises(AuthenticationError, match="agent-1 holds another key"):
        STATEMENT.require_key(b"m" * 32)


@pytest.mark.parametrize(
    "change", [{"sub": "Agent 1"}, {"sub": 1}, {"noise_key": "AA"}, {"identity_key": None}]
)
def test_statement_with_a_claim_that_is_wrong(change: dict[str, Any]) -> None:
    claims = {**claims_of(STATEMENT.issue(KEY, issuer=ISSUER, now=NOW)), **change}
    with pytest.raises(AuthenticationError):
        parse_statement(tokens.sign(KEY, tokens.AGENT_STATEMENT, claims, lifetime=60, now=NOW))


def test_a_token_of_another_library_is_read() -> None:
    # The signature is plain Ed25519 over the two first parts (RFC 8037), made here without PyJWT.
    signer: Callable[[bytes], bytes] = Ed25519PrivateKey.from_private_bytes(KEY.seed()).sign
    head, payload, _ = sign_any().split(".")
    signature = base64.urlsafe_b64encode(signer(f"{head}.{payload}".encode())).rstrip(b"=").decode()
    assert verify_any(f"{head}.{payload}.{signature}")["aud"] == "pam-trust"
