"""Enrolment tokens, and the agents and relays that come with one.

A token is 256 random bits, shown once, stored as its hash, valid for an hour for one kind and one name.
Who enrols proves possession of the identity key by signing the request with it.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import TypeVar

from django.db import IntegrityError, transaction
from django.utils import timezone

from pam_common import tokens
from pam_common.errors import RefusedError
from pam_common.keys import KEY_SIZE, b64decode, is_label, key_id
from pam_common.logging import get_logger, kv
from pam_platform import audit
from pam_platform.fleet import inbox
from pam_platform.fleet.auth import verify_request
from pam_platform.fleet.models import Agent, EnrolToken, Gateway, Relay

log = get_logger("platform.enrolment")

AUDIENCE = "pam-enrol"
TOKEN_LIFETIME = timedelta(hours=1)
#: Certificates of a revoked agent or relay carry its name for a day; until then nobody else gets it.
NAME_REST = timedelta(hours=24, minutes=10)

Enrolled = TypeVar("Enrolled", Agent, Relay)

_KEYS = {"agent": ("identity_key", "noise_key", "sealing_key"), "relay": ("identity_key", "host_key")}
_TYPES = {"agent": tokens.AGENT_REQUEST, "relay": tokens.RELAY_REQUEST}


def create_token(kind: str, name: str, gateway: str | None, *, actor: str) -> tuple[str, datetime]:
    """Return a fresh token and when it expires. Raises RefusedError for names that cannot enrol."""
    if not is_label(name):
        raise RefusedError(f'"{name}" is not a name', hint="use a lower-case label such as dc1-a.")
    place = None
    if kind == EnrolToken.Kind.AGENT:
        place = Gateway.objects.filter(name=gateway or "").first()
        if place is None:
            raise RefusedError(f'there is no gateway "{gateway or ""}"', hint="declare it in access.yml.")
        _require_free(Agent.objects.filter(name=name).first(), name)
    elif gateway is not None:
        raise RefusedError("a relay serves every gateway", hint="leave the gateway out.")
    else:
        relay = Relay.objects.filter(name=name).first()
        if relay is None:
            raise RefusedError(f'there is no relay "{name}"', hint="declare it in access.yml.")
        _require_free(relay, name)
    token = secrets.token_urlsafe(32)
    now = timezone.now()
    EnrolToken.objects.filter(expires__lt=now - TOKEN_LIFETIME).delete()
    EnrolToken.objects.create(
        kind=kind, name=name, gateway=place, hash=_hash(token), expires=now + TOKEN_LIFETIME
    )
    audit.record(actor, "enrol-token", f"{kind} {name}", "ok", gateway=gateway)
    return token, now + TOKEN_LIFETIME


def enrol_agent(token: str, name: str, public: Mapping[str, str], version: str, proof: str) -> Agent:
    """Enrol an agent, or repeat its enrolment. Raises RefusedError or AuthenticationError."""
    with transaction.atomic():
        row = _redeem("agent", token, name, public, proof)
        agent = Agent.objects.select_for_update().filter(name=name).first()
        if row.used is not None:
            return _repeated(agent, public)
        _require_free(agent, name)
        assert row.gateway is not None
        agent = agent or Agent(name=name)
        now = timezone.now()
        agent.gateway, agent.gateway_name = row.gateway, row.gateway.name
        agent.identity_key, agent.identity_kid = public["identity_key"], _kid(public["identity_key"])
        agent.noise_key, agent.sealing_key = public["noise_key"], public["sealing_key"]
        agent.version, agent.state, agent.revoked = version, Agent.State.ACTIVE, None
        agent.enrolled = agent.last_seen = now
        _finish(row, agent, public)
    audit.record(f"agent {name}", "enrol", f"agent {name}", "ok", gateway=agent.gateway_name)
    return agent


def enrol_relay(token: str, name: str, public: Mapping[str, str], version: str, proof: str) -> Relay:
    """Enrol a relay, or repeat its enrolment. Raises RefusedError or AuthenticationError."""
    with transaction.atomic():
        row = _redeem("relay", token, name, public, proof)
        relay = Relay.objects.select_for_update().filter(name=name).first()
        if row.used is not None:
            return _repeated(relay, public)
        if relay is None:
            raise RefusedError(f'relay "{name}" is no longer declared', hint="declare it in access.yml.")
        _require_free(relay, name)
        relay.identity_key, relay.identity_kid = public["identity_key"], _kid(public["identity_key"])
        relay.host_key, relay.version = public["host_key"], version
        relay.state, relay.revoked = Relay.State.ACTIVE, None
        relay.enrolled = relay.last_seen = timezone.now()
        _finish(row, relay, public)
        inbox.post_reload()
    audit.record(f"relay {name}", "enrol", f"relay {name}", "ok")
    return relay


def _redeem(kind: str, token: str, name: str, public: Mapping[str, str], proof: str) -> EnrolToken:
    """The token's row, locked, when it may be used for these keys."""
    for key in _KEYS[kind]:
        try:
            b64decode(public[key], KEY_SIZE)
        except ValueError as error:
            raise RefusedError(f"{key} is {error}") from None
    verify_request(proof, _TYPES[kind], name, public["identity_key"], AUDIENCE)
    row = EnrolToken.objects.select_for_update(of=("self",)).filter(hash=_hash(token)).first()
    # One message for all of these: who holds no valid token learns nothing about the others.
    if row is None or row.kind != kind or row.name != name or row.expires <= timezone.now():
        # To the log, not the audit trail: anybody may try, as often as they like.
        log.warning("enrolment refused", extra=kv(kind=kind, name=name))
        raise RefusedError(
            f"the enrolment token is not valid for {kind} {name}",
            hint=f"ask for a new one: pam-platform enrol-token {kind} {name}. It lasts an hour.",
        )
    if row.used is not None and not hmac.compare_digest(row.used_keys, _keys_hash(kind, public)):
        raise RefusedError("the enrolment token was used already, with other keys", hint="ask for a new one.")
    return row


def _repeated(found: Enrolled | None, public: Mapping[str, str]) -> Enrolled:
    """The answer to an enrolment whose first answer was lost."""
    if found is None or found.state != "active" or found.identity_key != public["identity_key"]:
        raise RefusedError("what this token enrolled has been revoked since", hint="ask for a new one.")
    return found


def _finish(row: EnrolToken, enrolled: Agent | Relay, public: Mapping[str, str]) -> None:
    try:
        with transaction.atomic():
            enrolled.save()
    except IntegrityError:
        raise RefusedError(
            "this identity key is enrolled already under another name",
            hint="each agent and relay makes keys of its own: empty its state_dir and try again.",
        ) from None
    row.used, row.used_keys = timezone.now(), _keys_hash(row.kind, public)
    row.save(update_fields=["used", "used_keys"])


def _require_free(found: Agent | Relay | None, name: str) -> None:
    """Raise RefusedError while certificates for ``name`` may be in other hands."""
    if found is None or found.state == Relay.State.DECLARED:
        return
    if found.state != "revoked" or found.revoked is None:
        raise RefusedError(f"{name} is enrolled already", hint="revoke it first, or take another name.")
    free = found.revoked + NAME_REST
    if timezone.now() < free:
        raise RefusedError(
            f"{name} was revoked; its certificates end by {free:%Y-%m-%d %H:%M} UTC",
            hint="take another name until then.",
        )


def _hash(token: str) -> str:
    # 256 random bits need no salt and no slow hash.
    return hashlib.sha256(token.encode()).hexdigest()


def _keys_hash(kind: str, public: Mapping[str, str]) -> str:
    return hashlib.sha256("\0".join(public[key] for key in _KEYS[kind]).encode()).hexdigest()


def _kid(public: str) -> str:
    return key_id(b64decode(public, KEY_SIZE))
