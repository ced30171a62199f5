"""Tokens: what nobody signed is refused, and what was signed with strange contents only as documented.

Input: a mode. RAW: a token. SIGNED: a header and a payload (each behind two bytes of length; an empty header
stands for the right one), which the platform's own key then signs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from material import AGENT, NOW, PLATFORM, SESSION, TRUSTED, Input, sized

from pam_common.errors import AuthenticationError
from pam_common.keys import VerifyKeys, b64decode, b64encode
from pam_common.tokens import AGENT_STATEMENT, GRANT, TRUST, AgentStatement, Grant, sign, verify

RAW, SIGNED = range(2)
ISSUER = "https://pam.example.com"
GRANTED = Grant(
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
STATEMENT = AgentStatement("agent-1", "dc1", noise_key=b"n" * 32, identity_key=AGENT.public)
GRANT_TOKEN = GRANTED.issue(PLATFORM, issuer=ISSUER, now=NOW)
STATEMENT_TOKEN = STATEMENT.issue(PLATFORM, issuer=ISSUER, now=NOW)
TRUST_CLAIMS = {"iss": ISSUER, "aud": "everyone", "keys": []}
TRUST_TOKEN = sign(PLATFORM, TRUST, TRUST_CLAIMS, lifetime=60, now=NOW)
GENUINE = (GRANT_TOKEN, STATEMENT_TOKEN, TRUST_TOKEN)


def TestOneInput(data: bytes) -> None:
    source = Input(data)
    if source.byte() % 2 == RAW:
        raw = source.rest()
        for token in (raw, raw.decode(errors="replace")):
            if any(_accepted(token)):
                assert raw.decode() in GENUINE
        _key_list(raw)
    else:
        header, payload = source.sized(), source.rest()
        for typ in (GRANT, AGENT_STATEMENT, TRUST):
            right = json.dumps({"alg": "EdDSA", "typ": typ, "kid": PLATFORM.kid}).encode()
            signed = f"{b64encode(header or right)}.{b64encode(payload)}"
            list(_accepted(f"{signed}.{b64encode(PLATFORM.sign(signed.encode()))}"))


def seeds() -> Iterator[bytes]:
    for token in GENUINE:
        yield bytes([RAW]) + token.encode()
        header, payload = (_decoded(part) for part in token.split(".")[:2])
        yield bytes([SIGNED]) + sized(header) + payload
        yield bytes([SIGNED]) + sized(b"") + payload
        claims = json.loads(payload)
        for name in claims:
            for odd in (None, 1.5, -1, 10**400, [], {}, "\ud800", True):
                yield bytes([SIGNED]) + sized(b"") + json.dumps({**claims, name: odd}).encode()
    yield bytes([SIGNED]) + sized(b"") + b"[" * 5000
    yield bytes([SIGNED]) + sized(b"") + b'{"exp": NaN, "iat": ' + b"9" * 5000 + b"}"
    yield bytes([RAW]) + json.dumps(TRUSTED.to_json()).encode()


def _accepted(token: str | bytes) -> Iterator[object]:
    """Try it as each kind of token; whatever is accepted is as its kind must be."""
    for check in (_grant, _statement, _trust):
        try:
            accepted = check(token)
        except AuthenticationError:
            continue
        yield accepted


def _grant(token: str | bytes) -> Grant:
    grant = Grant.parse(token, TRUSTED, issuer=ISSUER, gateway="dc1", now=NOW, first_opening=True)
    # It goes into logs, events, paths: an equal one can be issued again.
    again = grant.issue(PLATFORM, issuer=ISSUER, now=NOW)
    assert Grant.parse(again, TRUSTED, issuer=ISSUER, gateway="dc1", now=NOW, first_opening=True) == grant
    return grant


def _statement(token: str | bytes) -> AgentStatement:
    return AgentStatement.parse(token, TRUSTED, issuer=ISSUER, gateway="dc1", now=NOW)


def _trust(token: str | bytes) -> object:
    claims = verify(token, TRUSTED, TRUST, issuer=ISSUER, audience="everyone", now=NOW, required=("keys",))
    return claims, VerifyKeys.from_json(claims["keys"])


def _key_list(raw: bytes) -> None:
    """A list of keys as it comes in JSON from elsewhere."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return
    try:
        keys = VerifyKeys.from_json(value)
    except AuthenticationError:
        return
    assert keys.to_json() == value


def _decoded(part: str) -> bytes:
    return b64decode(part)
