"""What one ``connect`` was granted: checked once here, so that the rest can rely on every field."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from cryptography.hazmat.primitives.serialization import SSHCertificate, load_ssh_public_identity

from pam_common.errors import AuthenticationError, PamError, ProtocolError
from pam_common.keys import (
    KEY_SIZE,
    SigningKey,
    VerifyKeys,
    b64decode,
    b64encode,
    is_account,
    is_label,
    is_session_id,
)
from pam_common.secure_channel import generate_x25519, x25519_public
from pam_common.ssh_certs import CertificateKey
from pam_common.tokens import AgentStatement

#: A gateway with more relays or agents than this does not exist; the lists are walked one by one.
_MAX_LIST = 100

T = TypeVar("T")


class SessionKeys:
    """The two key pairs of one session. In memory only; they die with the process."""

    def __init__(self) -> None:
        self.ssh = SigningKey.generate()
        self.noise = generate_x25519()

    def __repr__(self) -> str:
        return f"<SessionKeys {self.ssh.kid}>"

    def public(self) -> dict[str, str]:
        """The public halves, as ``POST /connect`` wants them."""
        return {"ssh_key": b64encode(self.ssh.public), "noise_key": b64encode(x25519_public(self.noise))}


@dataclass(frozen=True)
class RelayAddress:
    """One relay of the platform's list."""

    name: str
    host: str
    port: int


@dataclass(frozen=True)
class Session:
    """A granted session. Times are UNIX seconds of the platform's clock."""

    id: str
    grant: str = field(repr=False)
    gateway: str
    account: str  #: ``prod-db/readonly``
    protocol: str
    expires: int  #: the first connection must be opened before
    session_end: int
    idle_limit: int  #: seconds, 0 for none
    certificate_end: int  #: until when a relay lets us in anew
    keys: SessionKeys
    ssh_key: CertificateKey
    relays: tuple[RelayAddress, ...]
    relay_host_ca: VerifyKeys
    grant_keys: VerifyKeys
    issuer: str
    agents: frozenset[tuple[str, bytes]]  #: (id, Noise key) of the gateway's active agents
    user: str
    database: str | None
    interceptor_host_ca: VerifyKeys  #: vouches for the gateway's SSH servers; empty at an old platform

    def check_agent(self, key: bytes, statement: bytes, *, now: float) -> None:
        """Raise AuthenticationError unless ``key`` is that of an active agent of our gateway.

        The platform's statement must name the very key of the handshake, and the platform must have
        listed that agent with that key when it granted this session.
        """
        stated = AgentStatement.parse(
            statement, self.grant_keys, issuer=self.issuer, gateway=self.gateway, now=now
        )
        stated.require_key(key)
        if (stated.agent, key) not in self.agents:
            raise AuthenticationError(
                f"agent {stated.agent} was not active at this gateway when the session began",
                hint="connect again: agents that start later serve new sessions only.",
            )


def parse(answer: dict[str, Any], keys: SessionKeys) -> Session:
    """The Session in the answer of ``POST /connect``. Raises ProtocolError for anything unexpected."""
    try:
        return _parse(answer, keys)
    except PamError as error:
        raise ProtocolError(f"the platform's answer cannot be used: {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"the platform's answer cannot be used: {error!r}") from None


def _parse(answer: dict[str, Any], keys: SessionKeys) -> Session:
    ssh_key = CertificateKey(keys.ssh.seed(), _is(answer["certificate"], str))
    hints: dict[str, Any] = _is(answer.get("hints") or {}, dict)
    account = _word(answer["account"], is_account)
    return Session(
        id=_word(answer["session"], is_session_id),
        grant=_is(answer["grant"], str),
        gateway=_word(answer["gateway"], is_label),
        account=account,
        protocol=_word(answer["protocol"], is_label),
        expires=_is(answer["expires"], int),
        session_end=_is(answer["session_end"], int),
        idle_limit=_is(answer.get("idle_limit") or 0, int),
        certificate_end=_end_of(ssh_key),
        keys=keys,
        ssh_key=ssh_key,
        relays=tuple(_relay(entry) for entry in _list(answer["relays"])),
        relay_host_ca=VerifyKeys.from_json(answer["relay_host_ca"]),
        grant_keys=VerifyKeys.from_json(answer["grant_keys"]),
        issuer=_is(answer["issuer"], str),
        agents=frozenset(_agent(entry) for entry in _list(answer["agents"])),
        user=_word(hints.get("user") or account.partition("/")[2], _is_argument),
        database=_word(hints["database"], _is_argument) if hints.get("database") else None,
        interceptor_host_ca=VerifyKeys.from_json(answer.get("interceptor_host_ca", [])),
    )


def _end_of(key: CertificateKey) -> int:
    certificate = load_ssh_public_identity(key.certificate.encode())
    if not isinstance(certificate, SSHCertificate):
        raise TypeError("expected a certificate")
    return certificate.valid_before


def _relay(entry: dict[str, Any]) -> RelayAddress:
    port = _is(entry["port"], int)
    if not 0 < port < 65536:
        raise ValueError(f"port {port}")
    return RelayAddress(_word(entry["name"], is_label), _word(entry["host"], _is_argument), port)


def _agent(entry: dict[str, Any]) -> tuple[str, bytes]:
    return _word(entry["id"], is_label), b64decode(entry["noise_key"], KEY_SIZE)


def _is(value: Any, kind: type[T]) -> T:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value


def _list(value: Any) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = _is(value, list)
    if len(entries) > _MAX_LIST or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"expected at most {_MAX_LIST} objects")
    return entries


def _word(value: Any, accepts: Callable[[str], bool]) -> str:
    text = _is(value, str)
    if not accepts(text):
        raise ValueError(f"unexpected {text[:80]!r}")
    return text


def _is_argument(text: str) -> bool:
    """These words reach environment variables, usage lines and the terminal."""
    return len(text) <= 255 and text.isprintable() and not text.startswith("-")
