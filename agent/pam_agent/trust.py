"""Whom the agent believes: the platform's signed trust list, and the checks of what it signed for us."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives.serialization import SSHCertificate, load_ssh_public_identity

from pam_common import tokens
from pam_common.errors import AuthenticationError, ProtocolError
from pam_common.keys import MAX_KEYS, VerifyKeys
from pam_common.recording.format import Recipient, RecordingError
from pam_common.ssh_certs import verify_user_certificate
from pam_common.tokens import AgentStatement

if TYPE_CHECKING:
    from pam_agent.state import AgentKeys

AUDIENCE = "pam-trust"
#: For what was verified when it was stored: its age is the renewal's business then, not the loader's.
_ANY_AGE = 1 << 40


@dataclass(frozen=True)
class Trust:
    """The anchors: who signs grants, relay host keys, relay logins; who may read recordings.

    ``recording_keys`` maps kid to the raw X25519 key.
    """

    token: str
    claims: dict[str, Any]
    grant_keys: VerifyKeys
    relay_host_ca: VerifyKeys
    relay_user_ca: VerifyKeys
    recording_keys: dict[str, bytes]
    issued: int
    expires: int

    @classmethod
    def first(cls, token: str, issuer: str, now: float) -> Trust:
        """The list as it came over TLS at enrolment. It must be signed by a key that it lists itself."""
        return cls._verified(token, VerifyKeys.from_json(_unverified(token).get("grant_keys")), issuer, now)

    @classmethod
    def from_claims(cls, claims: object, token: str) -> Trust:
        """The list as stored (or just verified). Raises AuthenticationError."""
        if not isinstance(claims, dict):
            raise AuthenticationError("the stored trust list is damaged")
        issued, expires = claims.get("iat"), claims.get("exp")
        if type(issued) is not int or type(expires) is not int:
            raise AuthenticationError("the trust list has no times")
        grant_keys = VerifyKeys.from_json(claims.get("grant_keys"))
        if not len(grant_keys):
            raise AuthenticationError("the trust list names no grant key")
        return cls(
            token=token,
            claims=claims,
            grant_keys=grant_keys,
            relay_host_ca=VerifyKeys.from_json(claims.get("relay_host_ca")),
            relay_user_ca=VerifyKeys.from_json(claims.get("relay_user_ca")),
            recording_keys=_recording_keys(claims.get("recording_keys")),
            issued=issued,
            expires=expires,
        )

    def successor(self, token: str, issuer: str, now: float) -> Trust:
        """A newer list: signed by a grant key that *this* list holds, and not issued before it.

        Raises AuthenticationError. An older list, though once genuine, would bring retired keys back.
        """
        new = self._verified(token, self.grant_keys, issuer, now)
        if new.issued < self.issued:
            raise AuthenticationError("the platform's trust list is older than the one stored here")
        return new

    @classmethod
    def _verified(cls, token: str, keys: VerifyKeys, issuer: str, now: float) -> Trust:
        claims = tokens.verify(token, keys, tokens.TRUST, issuer=issuer, audience=AUDIENCE, now=now)
        return cls.from_claims(claims, token)


def check_statement(
    statement: str,
    trust: Trust,
    agent: str,
    gateway: str,
    issuer: str,
    keys: AgentKeys,
    *,
    now: float | None,
) -> int:
    """Return when the agent statement expires, if it is about this agent's keys (``now`` None: of any age).

    Raises AuthenticationError.
    """
    moment, leeway = (0.0, _ANY_AGE) if now is None else (now, 0)
    claims = tokens.verify(
        statement,
        trust.grant_keys,
        tokens.AGENT_STATEMENT,
        issuer=issuer,
        audience=f"gateway:{gateway}",
        now=moment,
        leeway=leeway,
    )
    stated = AgentStatement.parse(
        statement, trust.grant_keys, issuer=issuer, gateway=gateway, now=float(claims["iat"])
    )
    ours = (agent, keys.noise_public, keys.identity.public)
    if (stated.agent, stated.noise_key, stated.identity_key) != ours:
        raise AuthenticationError("the agent statement is about another agent or other keys")
    return int(claims["exp"])


def check_certificate(
    certificate: str, trust: Trust, agent: str, gateway: str, keys: AgentKeys, *, now: float | None
) -> int:
    """Return when the ssh certificate ends, if it lets this agent serve its gateway (None: of any age).

    Raises AuthenticationError.
    """
    moment = _last_moment(certificate) if now is None else now
    found = verify_user_certificate(
        certificate,
        trust.relay_user_ca,
        now=moment,
        principal=f"serve:{gateway}",
    )
    if found.key_id != agent or found.public_key != keys.identity.public:
        raise AuthenticationError("the certificate is for another agent or another key")
    return found.valid_before


def _last_moment(certificate: str) -> float:
    try:
        parsed = load_ssh_public_identity(certificate.encode())
    except ValueError:
        parsed = None
    if not isinstance(parsed, SSHCertificate):
        raise AuthenticationError("the stored certificate is damaged")
    return float(parsed.valid_before - 1)


def _recording_keys(value: object) -> dict[str, bytes]:
    if not isinstance(value, list) or len(value) > MAX_KEYS:
        raise AuthenticationError("the trust list has no recording keys")
    try:
        return {recipient.kid: recipient.key for recipient in map(Recipient.from_json, value)}
    except RecordingError as error:
        raise AuthenticationError(f"the trust list holds a recording key that is none: {error}") from None


def _unverified(token: str) -> dict[str, Any]:
    """What a token says, before anyone checked it: only to learn which key it claims as its own."""
    try:
        if len(token) > tokens.MAX_TOKEN:
            raise ValueError
        body = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    except (ValueError, IndexError, RecursionError):
        claims = None
    if not isinstance(claims, dict):
        raise ProtocolError("the platform's trust list is not a token")
    return claims
