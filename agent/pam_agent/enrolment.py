"""Enrolment: keys are made here, the platform signs what they may do, a one-time token vouches for us."""

from __future__ import annotations

from typing import Any

from pam_agent import api
from pam_agent.config import AgentConfig
from pam_agent.state import (
    AgentKeys,
    AgentState,
    Standing,
    make_keys,
    save_standing,
    text_of,
    verified_standing,
)
from pam_agent.trust import Trust
from pam_common.errors import PamError, ProtocolError
from pam_common.keys import b64encode, is_label

AUDIENCE = "pam-enrol"


def enrol(config: AgentConfig, token: str, name: str, version: str) -> Standing:
    """Enrol as ``name`` and store the result in ``config.state_dir``.

    Repeating it after a lost answer uses the same keys, which the platform accepts within the hour. Raises
    PamError when the agent is enrolled already under another name, or the platform refuses.
    """
    if not is_label(name):
        raise PamError(f'"{name}" is not an agent name', hint="use a lower-case label such as dc1-a.")
    if (config.state_dir / "agent.json").exists():
        standing = AgentState.load(config.state_dir).standing
        if standing.agent != name:
            raise PamError(
                f"this folder already belongs to agent {standing.agent}",
                hint=f"give another state_dir, or empty {config.state_dir} to give that agent up.",
            )
        return standing
    keys = make_keys(config.state_dir)
    client = api.connect(config.platform, config.platform_ca, keys.identity, name, AUDIENCE)
    answer = client.post("/agent/enrol", json=_request(keys, token, name, version))
    standing = _standing(answer, keys, name, client.now())
    save_standing(config.state_dir, standing)
    return standing


def _request(keys: AgentKeys, token: str, name: str, version: str) -> dict[str, Any]:
    return {
        "token": token,
        "name": name,
        "identity_key": b64encode(keys.identity.public),
        "noise_key": b64encode(keys.noise_public),
        "sealing_key": b64encode(keys.sealing_public),
        "version": version,
    }


def _standing(answer: dict[str, Any], keys: AgentKeys, name: str, now: float) -> Standing:
    agent, gateway, issuer = (text_of(answer, key) for key in ("agent", "gateway", "issuer"))
    if agent != name or not is_label(gateway):
        raise ProtocolError("the platform enrolled something else than was asked for")
    trust = Trust.first(text_of(answer, "trust"), issuer, now)
    return verified_standing(answer, agent, gateway, issuer, trust, keys, now)
