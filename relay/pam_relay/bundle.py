"""What the platform tells a relay, signed: the trust list, and the bundle of whom to let in or cut."""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass, field
from typing import Any

from pam_common import tokens
from pam_common.errors import AuthenticationError, ProtocolError
from pam_common.keys import VerifyKeys, is_label, is_session_id

TRUST_AUDIENCE = "pam-trust"
#: Each name is at most 63 bytes: with these many of all kinds, the token below stays within its bound.
MAX_NAMES = 50_000
#: A bundle with thousands of revoked sessions is far larger than other tokens.
MAX_BUNDLE = 4 << 20


@dataclass(frozen=True)
class Trust:
    """The stored trust list: its token, the keys that sign for the platform, the CA of relay host keys."""

    token: str
    grant_keys: VerifyKeys
    relay_host_ca: VerifyKeys
    issued: int

    @classmethod
    def first(cls, token: str, issuer: str, now: float) -> Trust:
        """The list of an enrolment, which TLS vouches for; it must be signed by a key that it lists."""
        return cls._verified(token, VerifyKeys.from_json(_unverified(token).get("grant_keys")), issuer, now)

    def successor(self, token: str, issuer: str, now: float) -> Trust:
        """A later list, signed by a key that this one lists. Raises AuthenticationError, also for an older
        one: though once genuine, it would bring retired keys back."""
        new = self._verified(token, self.grant_keys, issuer, now)
        if new.issued < self.issued:
            raise AuthenticationError("the platform's trust list is older than the stored one")
        return new

    @classmethod
    def stored(cls, token: str) -> Trust:
        """The list as it was verified when it was stored, of any age: its renewal is the poller's work."""
        claims = _unverified(token)
        return cls._parse(token, claims)

    @classmethod
    def _verified(cls, token: str, keys: VerifyKeys, issuer: str, now: float) -> Trust:
        claims = tokens.verify(token, keys, tokens.TRUST, issuer=issuer, audience=TRUST_AUDIENCE, now=now)
        return cls._parse(token, claims)

    @classmethod
    def _parse(cls, token: str, claims: dict[str, Any]) -> Trust:
        grant_keys = VerifyKeys.from_json(claims.get("grant_keys"))
        issued = claims.get("iat")
        if not len(grant_keys) or type(issued) is not int:
            raise AuthenticationError("the trust list names no key or no time")
        return cls(token, grant_keys, VerifyKeys.from_json(claims.get("relay_host_ca")), issued)


@dataclass(frozen=True)
class Bundle:
    """Whom the relay lets in. ``host_certificate`` is the line of the relay's own host key."""

    relay: str
    serial: int
    user_ca: VerifyKeys
    gateways: frozenset[str]
    host_certificate: str
    revoked_agents: frozenset[str] = frozenset()
    revoked_sessions: frozenset[str] = frozenset()
    issued: int = 0
    expires: int = 0
    token: str = field(default="", repr=False)

    @classmethod
    def parse(cls, token: str, trust: Trust, *, relay: str, issuer: str, now: float) -> Bundle:
        """Return the verified bundle; AuthenticationError when any of it is not what it must be."""
        claims = tokens.verify(
            token,
            trust.grant_keys,
            tokens.RELAY_BUNDLE,
            issuer=issuer,
            audience=f"relay:{relay}",
            now=now,
            required=("relay_user_ca", "gateways", "host_certificate", "serial"),
            max_size=MAX_BUNDLE,
        )
        return cls._from_claims(token, relay, claims)

    @classmethod
    def stored(cls, token: str, trust: Trust, *, relay: str, issuer: str) -> Bundle:
        """A cached bundle of any age, its signature checked again: a relay starts without its platform.

        An expired one still says whom to refuse; certificates of days and minutes end by themselves.
        """
        issued = _unverified(token).get("iat")
        if type(issued) is not int:
            raise AuthenticationError("the stored bundle has no time")
        return cls.parse(token, trust, relay=relay, issuer=issuer, now=float(issued))

    @classmethod
    def _from_claims(cls, token: str, relay: str, claims: dict[str, Any]) -> Bundle:
        serial, certificate = claims["serial"], claims["host_certificate"]
        if type(serial) is not int or serial < 0 or not isinstance(certificate, str):
            raise AuthenticationError("the bundle has no serial or no host certificate")
        return cls(
            relay=relay,
            serial=serial,
            user_ca=VerifyKeys.from_json(claims["relay_user_ca"]),
            gateways=_names(claims["gateways"], "gateways", is_label),
            host_certificate=certificate,
            revoked_agents=_names(claims.get("revoked_agents", []), "revoked agents", is_label),
            revoked_sessions=_names(claims.get("revoked_sessions", []), "revoked sessions", is_session_id),
            issued=claims["iat"],
            expires=claims["exp"],
            token=token,
        )


def _names(value: object, what: str, valid: Any) -> frozenset[str]:
    if not isinstance(value, list) or len(value) > MAX_NAMES or not all(map(valid, value)):
        raise AuthenticationError(f"the bundle's list of {what} is not one")
    return frozenset(value)


def _unverified(token: str) -> dict[str, Any]:
    """The claims of a token before (or long after) its verification."""
    try:
        if len(token) > MAX_BUNDLE:
            raise ValueError("too long")
        body = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    except (ValueError, IndexError, RecursionError, binascii.Error):
        claims = None
    if not isinstance(claims, dict):
        raise ProtocolError("what the platform sent is not a token")
    return claims
