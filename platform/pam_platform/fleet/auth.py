"""Requests of agents and relays: a JWT of at most a minute, signed by the identity key they enrolled."""

from __future__ import annotations

import re
from typing import Any

import jwt
from django.conf import settings
from django.http import HttpRequest
from ninja.security import HttpBearer

from pam_common import tokens
from pam_common.errors import AuthenticationError
from pam_common.keys import KEY_SIZE, VerifyKeys, b64decode
from pam_platform.fleet.models import Agent, Relay

#: Seconds a request's token may be valid: time for a slow handshake, useless when found later.
REQUEST_LIFETIME = 60

# Anything else would reach the database, which cannot take every text that JSON can carry.
_KID = re.compile(r"[0-9a-f]{16}")


class AgentAuth(HttpBearer):
    """``request.auth`` is the :class:`Agent`, which is active. The reason of a refusal is told: it is about
    a token that the caller made."""

    def authenticate(self, request: HttpRequest, token: str) -> Agent:
        agent = Agent.objects.filter(identity_kid=_kid(token) or "", state=Agent.State.ACTIVE).first()
        if agent is None:
            raise AuthenticationError("no active agent has this key", hint="was it revoked?")
        verify_request(token, tokens.AGENT_REQUEST, agent.name, agent.identity_key, settings.PAM_ISSUER)
        return agent


class RelayAuth(HttpBearer):
    """``request.auth`` is the :class:`Relay`, which is active."""

    def authenticate(self, request: HttpRequest, token: str) -> Relay:
        relay = Relay.objects.filter(identity_kid=_kid(token) or "", state=Relay.State.ACTIVE).first()
        if relay is None:
            raise AuthenticationError("no active relay has this key", hint="was it revoked?")
        verify_request(token, tokens.RELAY_REQUEST, relay.name, relay.identity_key, settings.PAM_ISSUER)
        return relay


class EnrolAuth(HttpBearer):
    """The request carries a token; whether it proves possession of the key to enrol is checked by
    ``fleet.enrolment`` with the key in the body. ``request.auth`` is the token."""

    def authenticate(self, request: HttpRequest, token: str) -> str | None:
        return token if _kid(token) else None


def calling_agent(request: HttpRequest) -> Agent:
    """The agent that :class:`AgentAuth` let in."""
    agent: Any = getattr(request, "auth", None)
    assert isinstance(agent, Agent)
    return agent


def calling_relay(request: HttpRequest) -> Relay:
    """The relay that :class:`RelayAuth` let in."""
    relay: Any = getattr(request, "auth", None)
    assert isinstance(relay, Relay)
    return relay


def verify_request(token: str, typ: str, name: str, identity_key: str, audience: str) -> None:
    """Raise AuthenticationError unless ``token`` was signed by this key, as this name, for ``audience``."""
    try:
        keys = VerifyKeys.of(b64decode(identity_key, KEY_SIZE))
    except ValueError:
        raise AuthenticationError("the identity key is not a key") from None
    claims = tokens.verify(
        token,
        keys,
        typ,
        issuer=name,
        audience=audience,
        required=("sub", "jti"),
        max_lifetime=REQUEST_LIFETIME,
    )
    if claims["sub"] != name:
        raise AuthenticationError("the request's token names somebody else")


def _kid(token: str) -> str | None:
    """The key id a token claims, if it has the shape of one; it only selects the key that must verify it."""
    if len(token) > tokens.MAX_TOKEN:
        return None
    try:
        kid = jwt.get_unverified_header(token).get("kid")
    except (jwt.PyJWTError, ValueError, RecursionError):
        return None
    return kid if isinstance(kid, str) and _KID.fullmatch(kid) else None
