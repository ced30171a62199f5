"""The platform's agent endpoints, each as one call; requests are signed by the agent's identity."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from pam_common import tokens
from pam_common.keys import SigningKey
from pam_common.platform_client import PlatformClient

#: Seconds a request's own token is valid: long enough for a slow handshake, useless when found later.
REQUEST_LIFETIME = 60
#: The platform holds a poll for this long; the answer may take a little more.
POLL_SECONDS = 25


def request_token(identity: SigningKey, agent: str, audience: str, now: float) -> str:
    """A fresh ``Authorization`` value: a short JWT signed by the agent's identity (no secret on disk)."""
    claims = {"iss": agent, "sub": agent, "aud": audience, "jti": secrets.token_urlsafe(16)}
    token = tokens.sign(identity, tokens.AGENT_REQUEST, claims, lifetime=REQUEST_LIFETIME, now=now)
    return f"Bearer {token}"


def connect(
    url: str, ca_file: Path | None, identity: SigningKey, agent: str, audience: str
) -> PlatformClient:
    """A client whose every request is signed anew, by the platform's clock."""
    client: PlatformClient

    def authorization() -> str:
        return request_token(identity, agent, audience, client.now())

    client = PlatformClient(url, ca_file=ca_file, authorization=authorization)
    return client


class AgentApi:
    """What a running agent asks of the platform. Errors are those of PlatformClient."""

    def __init__(self, client: PlatformClient) -> None:
        self.client = client

    def now(self) -> float:
        return self.client.now()

    def renew(self) -> dict[str, Any]:
        return self.client.post("/agent/renew")

    def open(self, session: str, ssh_keys: dict[str, str] | None = None) -> dict[str, Any]:
        """``ssh_keys``: the public keys made for an SSH session, to be signed by the platform's CAs."""
        body = None if ssh_keys is None else {"ssh_keys": ssh_keys}
        return self.client.post(f"/agent/sessions/{session}/open", json=body, timeout=10)

    def closed(self, session: str, report: dict[str, Any]) -> None:
        self.client.post(f"/agent/sessions/{session}/closed", json=report, timeout=10)

    def alarm(self, session: str, reason: str) -> None:
        self.client.post(f"/agent/sessions/{session}/alarm", json={"reason": reason}, timeout=10)

    def scanned(self, scan: str, keys: list[str], error: str) -> None:
        self.client.post(f"/agent/scans/{scan}", json={"keys": keys, "error": error}, timeout=10)

    def inbox(self, after: int, wait: int = POLL_SECONDS) -> dict[str, Any]:
        return self.client.get("/agent/inbox", params={"after": after, "wait": wait}, timeout=wait + 10)
