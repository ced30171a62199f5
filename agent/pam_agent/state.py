"""What an agent keeps in ``state_dir``: its keys, and what the platform last signed for it.

    identity.key  noise.key  sealing.key   32 raw bytes each, 0600, made here, never sent anywhere
    agent.json                             agent, gateway, issuer, relays
    trust.json                             the trust list: its token and its claims
    statement  certificate                 "this Noise key serves this gateway", as a token and for ssh

Everything the platform sends is verified against the stored trust list before it replaces what is there.
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pam_agent.trust import Trust, check_certificate, check_statement
from pam_common.errors import AuthenticationError, PamError, ProtocolError
from pam_common.files import make_private_dir, read_private, write_private
from pam_common.keys import SigningKey
from pam_common.secure_channel import generate_x25519, x25519_public

#: Relays one agent keeps tunnels to; beyond it the platform's answer is a mistake.
MAX_RELAYS = 64
_KEY_SIZE = 32


@dataclass(frozen=True)
class AgentKeys:
    """The agent's three private keys (32 raw bytes each)."""

    identity_seed: bytes = field(repr=False)
    noise: bytes = field(repr=False)
    sealing: bytes = field(repr=False)

    @property
    def identity(self) -> SigningKey:
        return SigningKey(self.identity_seed)

    @property
    def noise_public(self) -> bytes:
        return x25519_public(self.noise)

    @property
    def sealing_public(self) -> bytes:
        return x25519_public(self.sealing)


@dataclass(frozen=True)
class Relay:
    """A relay as the platform lists it."""

    name: str
    host: str
    port: int


@dataclass(frozen=True)
class Standing:
    """Who this agent is and what it shows for it; replaced whole at each renewal."""

    agent: str
    gateway: str
    issuer: str
    trust: Trust
    statement: str
    statement_expires: int
    certificate: str
    certificate_expires: int
    relays: tuple[Relay, ...]


class AgentState:
    """The loaded ``state_dir``. Safe for use from several threads."""

    def __init__(self, folder: Path, keys: AgentKeys, standing: Standing) -> None:
        self.folder = folder
        self.keys = keys
        self._standing = standing
        self._lock = threading.Lock()

    @property
    def standing(self) -> Standing:
        return self._standing

    @classmethod
    def load(cls, folder: Path) -> AgentState:
        """Raises PamError when the agent is not enrolled or anything in the folder is not as it must be."""
        keys = load_keys(folder)
        about = _read_json(folder / "agent.json")
        stored = _read_json(folder / "trust.json")
        trust = Trust.from_claims(stored.get("claims"), str(stored.get("token")))
        statement = _read(folder / "statement").decode("ascii", "replace")
        certificate = _read(folder / "certificate").decode("ascii", "replace")
        try:
            agent, gateway, issuer = (str(about[key]) for key in ("agent", "gateway", "issuer"))
            relays = parse_relays(about["relays"])
        except (KeyError, ProtocolError) as error:
            raise PamError(f"{folder / 'agent.json'} is damaged: {error}", hint=_ANEW) from None
        # How old they are is for the renewal to mend; that they are ours is checked here already.
        statement_expires = check_statement(statement, trust, agent, gateway, issuer, keys, now=None)
        certificate_expires = check_certificate(certificate, trust, agent, gateway, keys, now=None)
        standing = Standing(
            agent,
            gateway,
            issuer,
            trust,
            statement,
            statement_expires,
            certificate,
            certificate_expires,
            relays,
        )
        return cls(folder, keys, standing)

    def renew(self, answer: dict[str, Any], now: float) -> bool:
        """Take the platform's ``renew`` answer if every part of it verifies; returns whether relays or
        certificate changed. Raises AuthenticationError or ProtocolError, and then nothing has changed."""
        with self._lock:
            old = self._standing
            trust = old.trust.successor(text_of(answer, "trust"), old.issuer, now)
            new = verified_standing(answer, old.agent, old.gateway, old.issuer, trust, self.keys, now)
            save_standing(self.folder, new)
            self._standing = new
        return (new.certificate, new.relays) != (old.certificate, old.relays)


_ANEW = "empty the state folder and enrol the agent anew with a fresh token."


def load_keys(folder: Path) -> AgentKeys:
    """Raises PamError when one is missing or not private."""
    keys = [_read(folder / f"{name}.key") for name in ("identity", "noise", "sealing")]
    if any(len(key) != _KEY_SIZE for key in keys) or len(set(keys)) != len(keys):
        raise PamError(f"a key in {folder} is damaged", hint=_ANEW)
    return AgentKeys(*keys)


def make_keys(folder: Path) -> AgentKeys:
    """The keys in ``folder``, made first where they are missing: an enrolment repeats with the same."""
    make_private_dir(folder)
    for name in ("identity", "noise", "sealing"):
        path = folder / f"{name}.key"
        if not path.exists():
            write_private(path, generate_x25519())
    return load_keys(folder)


def verified_standing(
    answer: dict[str, Any],
    agent: str,
    gateway: str,
    issuer: str,
    trust: Trust,
    keys: AgentKeys,
    now: float,
) -> Standing:
    """The standing in an ``enrol`` or ``renew`` answer, every signature of it checked against ``trust``."""
    if answer.get("gateway", gateway) != gateway:
        raise AuthenticationError(
            f"the platform moved this agent to gateway {answer['gateway']}", hint="enrol it anew there."
        )
    statement, certificate = text_of(answer, "statement"), text_of(answer, "certificate")
    return Standing(
        agent=agent,
        gateway=gateway,
        issuer=issuer,
        trust=trust,
        statement=statement,
        statement_expires=check_statement(statement, trust, agent, gateway, issuer, keys, now=now),
        certificate=certificate,
        certificate_expires=check_certificate(certificate, trust, agent, gateway, keys, now=now),
        relays=parse_relays(answer.get("relays")),
    )


def save_standing(folder: Path, standing: Standing) -> None:
    """Write it; ``agent.json`` last, since its presence is what says "enrolled"."""
    trust = {"token": standing.trust.token, "claims": standing.trust.claims}
    write_private(folder / "trust.json", json.dumps(trust, indent=1).encode())
    write_private(folder / "statement", standing.statement.encode())
    write_private(folder / "certificate", standing.certificate.encode())
    about = {
        "agent": standing.agent,
        "gateway": standing.gateway,
        "issuer": standing.issuer,
        "relays": [vars(relay) for relay in standing.relays],
    }
    write_private(folder / "agent.json", json.dumps(about, indent=1).encode())


def parse_relays(value: object) -> tuple[Relay, ...]:
    """Raises ProtocolError for anything but a list of name, host and port."""
    if not isinstance(value, list) or len(value) > MAX_RELAYS:
        raise ProtocolError("the list of relays is not one")
    relays = []
    for item in value:
        match item:
            case {"name": str(name), "host": str(host), "port": int(port)} if name and host:
                if not 1 <= port <= 65535 or len(host) > 255 or not (name + host).isprintable():
                    raise ProtocolError("the list of relays holds a bad address")
                relays.append(Relay(name, host, port))
            case _:
                raise ProtocolError("the list of relays holds something else")
    if len({relay.name for relay in relays}) != len(relays):
        raise ProtocolError("the list of relays names one twice")
    return tuple(relays)


def text_of(answer: dict[str, Any], key: str) -> str:
    """A non-empty string of the platform's answer. Raises ProtocolError."""
    value = answer.get(key)
    if not isinstance(value, str) or not value:
        raise ProtocolError(f"the platform's answer has no {key}")
    return value


def _read(path: Path) -> bytes:
    try:
        return read_private(path)
    except FileNotFoundError:
        raise PamError(
            f"this agent is not enrolled: {path} is missing",
            hint="pam-agent --config FILE enrol --token-file FILE --name NAME",
        ) from None
    except OSError as error:
        raise PamError(f"{path}: {error.strerror or error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(_read(path))
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise PamError(f"{path} is damaged", hint=_ANEW)
    return document
