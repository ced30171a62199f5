"""Signed statements: JWTs with EdDSA (Ed25519) and nothing else.

Each kind of token has its own ``typ`` (RFC 8725, section 3.11), so none can be taken for another even
where two kinds are signed by one key. Required everywhere: ``iss aud exp iat`` and the header ``kid``.
The key that verifies is looked up among configured keys only; nothing inside a token can name its own.

- **Grant**: platform → client → agent, "this client key may open this account through this gateway".
- **AgentStatement**: platform → agent → client, "this Noise key is an agent of this gateway".

Times are UNIX seconds. What tokens are made of (keys, ids, encodings) is in ``keys`` and also named here.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from pam_common.errors import AuthenticationError
from pam_common.keys import (
    KEY_SIZE,
    KeyEntry,
    SigningKey,
    VerifyKeys,
    b64decode,
    b64encode,
    is_account,
    is_label,
    is_session_id,
    key_id,
    new_session_id,
)

__all__ = [
    "AGENT_REQUEST",
    "AGENT_STATEMENT",
    "GRANT",
    "KEY_SIZE",
    "RELAY_BUNDLE",
    "RELAY_REQUEST",
    "TRUST",
    "AgentStatement",
    "Grant",
    "KeyEntry",
    "SigningKey",
    "VerifyKeys",
    "b64decode",
    "b64encode",
    "is_account",
    "is_label",
    "is_session_id",
    "key_id",
    "new_session_id",
    "sign",
    "verify",
]

GRANT = "pam-grant+jwt"
AGENT_STATEMENT = "pam-agent-statement+jwt"
AGENT_REQUEST = "pam-agent-request+jwt"
RELAY_REQUEST = "pam-relay-request+jwt"
RELAY_BUNDLE = "pam-relay-bundle+jwt"
TRUST = "pam-trust+jwt"

#: The largest regular token (a trust list) is about 3 KiB; this bounds what is parsed before it is verified.
MAX_TOKEN = 16 * 1024
#: How far in the future ``iat`` may lie. Clocks are corrected from ``Date``, which has whole seconds, and
#: an early ``iat`` gives nothing away: what limits a token is ``exp``.
IAT_TOLERANCE = 60
#: Seconds in which a grant must first be used: time for a person's client to reach a relay.
GRANT_LIFETIME = 120
STATEMENT_LIFETIME = 24 * 3600
#: No user name of ours is longer (the limit of an e-mail address).
MAX_USER_NAME = 254
#: Later than the year 9999 no time is meant, and date functions fail.
_MAX_TIME = 253_402_300_799


# --- tokens ------------------------------------------------------------------------------------------


def sign(
    key: SigningKey, typ: str, claims: Mapping[str, Any], *, lifetime: int, now: float | None = None
) -> str:
    """Return a token of kind ``typ``: ``claims`` (``iss`` and ``aud`` among them), ``iat`` and ``exp``."""
    issued = int(time.time() if now is None else now)
    payload = {**claims, "iat": issued, "exp": issued + lifetime}
    return jwt.encode(payload, key.private_key, algorithm="EdDSA", headers={"typ": typ, "kid": key.kid})


def verify(
    token: str | bytes,
    keys: VerifyKeys,
    typ: str,
    *,
    issuer: str | None,
    audience: str,
    now: float | None = None,
    leeway: int = 0,
    required: tuple[str, ...] = (),
    max_lifetime: int | None = None,
    max_size: int = MAX_TOKEN,
) -> dict[str, Any]:
    """Return the claims of a token that is valid now; raise AuthenticationError for any other.

    ``issuer`` None accepts any (for self-signed requests, whose ``kid`` says who). ``required`` names
    claims beside ``iss aud exp iat``. ``max_lifetime`` refuses tokens whose signer gave them longer.
    """
    claims = _decode(token, keys, typ, issuer, audience, required, max_size)
    moment = time.time() if now is None else now
    if claims["exp"] <= moment - leeway:
        raise AuthenticationError(f"the {_noun(typ)} has expired", hint="Check the clocks of both sides.")
    if claims["iat"] > moment + leeway + IAT_TOLERANCE:
        raise AuthenticationError(f"the {_noun(typ)} is from the future", hint="Check the clocks.")
    if max_lifetime is not None and claims["exp"] - claims["iat"] > max_lifetime:
        raise AuthenticationError(f"the {_noun(typ)} is valid for longer than {max_lifetime} s")
    return claims


def _decode(
    token: str | bytes,
    keys: VerifyKeys,
    typ: str,
    issuer: str | None,
    audience: str,
    required: tuple[str, ...],
    max_size: int,
) -> dict[str, Any]:
    """Check everything but the times, whose shape is checked."""
    noun = _noun(typ)
    if len(token) > max_size:
        raise AuthenticationError(f"the {noun} is larger than {max_size} bytes")
    try:
        token = token.decode("ascii") if isinstance(token, bytes) else token
        for part in token.split("."):
            b64decode(part)  # strictly, as not every release of the library is: a token has one spelling
        key = _signer(token, keys, typ)
        claims = jwt.decode(
            token,
            key,
            algorithms=["EdDSA"],
            audience=audience,
            issuer=issuer,
            options={
                # Times are checked by the caller, against the clock it chose.
                "verify_exp": False,
                "verify_iat": False,
                "verify_nbf": False,
                "strict_aud": True,
                "require": ["iss", "aud", "exp", "iat", *required],
            },
        )
    except AuthenticationError as error:
        raise AuthenticationError(f"the {noun} is {error}", hint=error.hint) from None
    except (jwt.PyJWTError, ValueError, TypeError, RecursionError) as error:
        # The library's words name claims, never contents; the rest are what hostile JSON brings about.
        raise AuthenticationError(f"the {noun} is not valid: {type(error).__name__}") from None
    if not isinstance(claims["iss"], str) or "nbf" in claims:
        raise AuthenticationError(f"the {noun} has claims that its kind never has")
    for claim in ("iat", "exp"):
        _time(claims, claim, noun)
    return claims


def _signer(token: str, keys: VerifyKeys, typ: str) -> Ed25519PublicKey:
    header = jwt.get_unverified_header(token)
    if header.keys() != {"alg", "typ", "kid"} or header["typ"] != typ:
        # An unknown member may be critical ("crit", "b64") or point at a key ("jwk", "x5u").
        raise AuthenticationError("of another kind")
    if header["alg"] != "EdDSA" or not isinstance(header["kid"], str):
        raise AuthenticationError("signed in another way than EdDSA")
    return keys.get(header["kid"])


def _noun(typ: str) -> str:
    return typ.removeprefix("pam-").removesuffix("+jwt").replace("-", " ")


def _time(claims: Mapping[str, Any], name: str, noun: str) -> int:
    value = claims.get(name)
    if type(value) is not int or not 0 < value <= _MAX_TIME:
        raise AuthenticationError(f"the {noun}'s {name} is not a time")
    return value


def _audience(gateway: str) -> str:
    if not is_label(gateway):
        raise ValueError("not the name of a gateway")
    return f"gateway:{gateway}"


# --- the two statements that meet in a session's handshake -------------------------------------------


@dataclass(frozen=True)
class Grant:
    """Who may open which account through which gateway, holding which Noise key, until when.

    ``expires`` limits only the first opening; the same grant is shown again for each further stream of
    the session, until ``session_end``. ``idle_limit`` is in seconds, 0 for none.
    """

    session: str
    user: str
    gateway: str
    account: str
    protocol: str
    client_key: bytes
    expires: int
    session_end: int
    idle_limit: int = 0

    def issue(self, key: SigningKey, *, issuer: str, now: float | None = None) -> str:
        """Return the signed grant. ``now`` must lie before ``expires``."""
        issued = int(time.time() if now is None else now)
        claims = {
            "iss": issuer,
            "aud": _audience(self.gateway),
            "jti": self.session,
            "sub": self.user,
            "cnf": {"jwk": {"kty": "OKP", "crv": "X25519", "x": b64encode(self.client_key)}},  # RFC 7800
            "account": self.account,
            "protocol": self.protocol,
            "session_end": self.session_end,
            "idle_limit": self.idle_limit,
        }
        return sign(key, GRANT, claims, lifetime=self.expires - issued, now=issued)

    @classmethod
    def parse(
        cls,
        token: str | bytes,
        keys: VerifyKeys,
        *,
        issuer: str,
        gateway: str,
        now: float,
        first_opening: bool,
    ) -> Grant:
        """Return the verified grant, or raise AuthenticationError. Its key is checked by ``require_key``.

        Who must see the session id to know whether this is the first opening passes False and calls
        ``require_openable`` when it is.
        """
        required = ("jti", "sub", "cnf", "account", "protocol", "session_end", "idle_limit")
        claims = _decode(token, keys, GRANT, issuer, _audience(gateway), required, MAX_TOKEN)
        grant = cls(
            session=claims["jti"],
            user=claims["sub"],
            gateway=gateway,
            account=claims["account"],
            protocol=claims["protocol"],
            client_key=_confirmed_key(claims["cnf"]),
            expires=claims["exp"],
            session_end=_time(claims, "session_end", "grant"),
            idle_limit=claims["idle_limit"],
        )
        grant._check_shape()
        if grant.session_end <= now:
            raise AuthenticationError("the session is over", hint="Connect again for a new one.")
        if first_opening:
            grant.require_openable(now)
        return grant

    def require_openable(self, now: float) -> None:
        """Raise AuthenticationError when it is too late to open the session for the first time."""
        if self.expires <= now:
            raise AuthenticationError(
                "the grant was not used in time", hint="Connect again; if it repeats, check the clocks."
            )

    def require_key(self, noise_public: bytes) -> None:
        """Raise AuthenticationError unless this is the key the grant was made for (in constant time)."""
        if not hmac.compare_digest(self.client_key, noise_public):
            raise AuthenticationError("the grant was made for another client key")

    def _check_shape(self) -> None:
        user_ok = (
            isinstance(self.user, str) and 0 < len(self.user) <= MAX_USER_NAME and self.user.isprintable()
        )
        idle_ok = type(self.idle_limit) is int and 0 <= self.idle_limit <= _MAX_TIME
        names_ok = is_session_id(self.session) and is_account(self.account) and is_label(self.protocol)
        if not (user_ok and idle_ok and names_ok):
            raise AuthenticationError("the grant has a claim that is not what it must be")


@dataclass(frozen=True)
class AgentStatement:
    """The platform's word that these keys are an agent of this gateway."""

    agent: str
    gateway: str
    noise_key: bytes
    identity_key: bytes

    def issue(
        self,
        key: SigningKey,
        *,
        issuer: str,
        lifetime: int = STATEMENT_LIFETIME,
        now: float | None = None,
    ) -> str:
        """Return the signed statement."""
        claims = {
            "iss": issuer,
            "aud": _audience(self.gateway),
            "sub": self.agent,
            "noise_key": b64encode(self.noise_key),
            "identity_key": b64encode(self.identity_key),
        }
        return sign(key, AGENT_STATEMENT, claims, lifetime=lifetime, now=now)

    @classmethod
    def parse(
        cls, token: str | bytes, keys: VerifyKeys, *, issuer: str, gateway: str, now: float
    ) -> AgentStatement:
        """Return the verified statement, or raise AuthenticationError. ``require_key`` checks the key."""
        claims = verify(
            token,
            keys,
            AGENT_STATEMENT,
            issuer=issuer,
            audience=_audience(gateway),
            now=now,
            required=("sub", "noise_key", "identity_key"),
        )
        try:
            noise_key = b64decode(claims["noise_key"], KEY_SIZE)
            identity_key = b64decode(claims["identity_key"], KEY_SIZE)
        except ValueError as error:
            raise AuthenticationError(f"the agent statement has a key that is {error}") from None
        if not is_label(claims["sub"]):
            raise AuthenticationError("the agent statement names no agent")
        return cls(claims["sub"], gateway, noise_key, identity_key)

    def require_key(self, noise_public: bytes) -> None:
        """Raise AuthenticationError unless the peer's Noise key is the one stated (in constant time)."""
        if not hmac.compare_digest(self.noise_key, noise_public):
            raise AuthenticationError(
                f"the peer that says it is agent {self.agent} holds another key",
                hint="Something between here and the agent answers in its place; tell your administrator.",
            )


def _confirmed_key(cnf: object) -> bytes:
    """Return the X25519 key of a ``cnf`` claim, which holds that one key and nothing else."""
    jwk = cnf.get("jwk") if isinstance(cnf, dict) and len(cnf) == 1 else None
    if not isinstance(jwk, dict) or jwk.keys() != {"kty", "crv", "x"}:
        raise AuthenticationError("the grant names no client key")
    if (jwk["kty"], jwk["crv"]) != ("OKP", "X25519"):
        raise AuthenticationError("the grant's client key is not an X25519 key")
    try:
        return b64decode(jwk["x"], KEY_SIZE)
    except ValueError as error:
        raise AuthenticationError(f"the grant's client key is {error}") from None
