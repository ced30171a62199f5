"""What the platform signs for agents and relays: trust lists, statements, certificates, relay bundles."""

from __future__ import annotations

import hashlib
import json
import time
from typing import Any

from django.conf import settings

from pam_common import tokens
from pam_common.keys import KEY_SIZE, b64decode
from pam_common.ssh_certs import make_host_certificate, make_user_certificate
from pam_common.tokens import AgentStatement
from pam_platform.fleet.models import Agent, Gateway, Relay
from pam_platform.vault import keys

#: A trust list outlives a month without contact; certificates and statements a day.
TRUST_LIFETIME = 30 * 24 * 3600
DAY = 24 * 3600
#: Certificates are back-dated for clocks that run behind.
BACKDATE = 300
#: A bundle is made anew at least this often, well before what is in it expires.
BUNDLE_PERIOD = 6 * 3600
#: Sessions a bundle names as revoked. More running ones cannot have been killed in one period by people;
#: agents cut killed sessions by themselves, the relay is the second to do so.
MAX_REVOKED_SESSIONS = 2000


def trust_token() -> str:
    """The list of keys that agents and relays believe."""
    claims = {
        "iss": settings.PAM_ISSUER,
        "aud": "pam-trust",
        "grant_keys": keys.public_entries(keys.GRANT),
        "relay_host_ca": keys.public_entries(keys.RELAY_HOST_CA),
        "relay_user_ca": keys.public_entries(keys.RELAY_USER_CA),
        "recording_keys": keys.trusted_recording_keys(),
    }
    return tokens.sign(keys.signing_key(keys.GRANT), tokens.TRUST, claims, lifetime=TRUST_LIFETIME)


def renewal(agent: Agent) -> dict[str, Any]:
    """Everything an agent shows or believes for the next day."""
    return {
        "trust": trust_token(),
        "statement": AgentStatement(
            agent.name,
            agent.gateway_name,
            b64decode(agent.noise_key, KEY_SIZE),
            b64decode(agent.identity_key, KEY_SIZE),
        ).issue(keys.signing_key(keys.GRANT), issuer=settings.PAM_ISSUER, lifetime=DAY),
        "certificate": _agent_certificate(agent),
        "gateway": agent.gateway_name,
        "relays": relay_list(),
        "recording_recipients": keys.recording_recipients(),
    }


def relay_list() -> list[dict[str, Any]]:
    """The relays that clients and agents may use."""
    rows = Relay.objects.filter(state=Relay.State.ACTIVE)
    return [{"name": row.name, "host": row.host, "port": row.port} for row in rows]


def bundle(relay: Relay, revoked_agents: list[str], revoked_sessions: list[str], serial: int) -> str:
    """The signed relay bundle."""
    claims = {
        "iss": settings.PAM_ISSUER,
        "aud": f"relay:{relay.name}",
        **_bundle_content(revoked_agents, revoked_sessions),
        "host_certificate": _host_certificate(relay),
        "serial": serial,
    }
    return tokens.sign(keys.signing_key(keys.GRANT), tokens.RELAY_BUNDLE, claims, lifetime=DAY)


def bundle_tag(relay: Relay, revoked_agents: list[str], revoked_sessions: list[str]) -> str:
    """Changes when the bundle says something new, and with each period so that it never expires unseen."""
    facts = [
        relay.host_key,
        relay.host,
        int(time.time()) // BUNDLE_PERIOD,
        _bundle_content(revoked_agents, revoked_sessions),
        keys.public_entries(keys.GRANT),
        keys.public_entries(keys.RELAY_HOST_CA),
    ]
    digest = hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()
    return f'"{digest}"'


def _bundle_content(revoked_agents: list[str], revoked_sessions: list[str]) -> dict[str, Any]:
    return {
        "relay_user_ca": keys.public_entries(keys.RELAY_USER_CA),
        "revoked_agents": revoked_agents,
        "revoked_sessions": revoked_sessions[:MAX_REVOKED_SESSIONS],
        "gateways": list(Gateway.objects.values_list("name", flat=True)),
    }


def _agent_certificate(agent: Agent) -> str:
    now = int(time.time())
    return make_user_certificate(
        keys.signing_key(keys.RELAY_USER_CA),
        b64decode(agent.identity_key, KEY_SIZE),
        key_id=agent.name,
        principals=[f"serve:{agent.gateway_name}"],
        valid_after=now - BACKDATE,
        valid_before=now + DAY,
    )


def _host_certificate(relay: Relay) -> str:
    now = int(time.time())
    return make_host_certificate(
        keys.signing_key(keys.RELAY_HOST_CA),
        b64decode(relay.host_key, KEY_SIZE),
        key_id=relay.name,
        principals=sorted({relay.host, relay.name}),
        valid_after=now - BACKDATE,
        valid_before=now + DAY,
    )
