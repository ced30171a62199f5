"""The platform's answer to "open this session": checked against the grant, its sealed credential opened.

The answer is data from another machine: every field is checked before anything is built from it. The
sealed box names session, account and agent, so that one copied from elsewhere is refused. Nothing here
puts a secret into a message: errors name fields only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from nacl.exceptions import CryptoError
from nacl.public import PrivateKey, SealedBox

from pam_agent.config import AllowedRecipient
from pam_agent.protocols.base import Credential, Opening, SshIdentity, Target, TlsPolicy
from pam_agent.trust import Trust
from pam_common.errors import AuthenticationError, ProtocolError
from pam_common.keys import SigningKey, b64decode, b64encode
from pam_common.recording.format import Recipient, RecordingError
from pam_common.tokens import Grant

#: A password or a client key with its chain; libsodium adds 48 bytes.
MAX_BOX = 64 << 10
#: CA bundles of a company; a system's whole bundle is about 200 KiB.
MAX_PEM = 256 << 10
MAX_NAMES = 1000
#: Settings of a protocol, written by hand: host keys and lists of rules.
MAX_OPTIONS = 64 << 10
#: A password, key, passphrase and token of the account, two more of a jump host, and room to grow.
MAX_SECRETS = 16
#: An Ed25519 certificate's line with its principals has about 1 KiB.
MAX_CERTIFICATE_LINE = 16 << 10
#: Events hold at most so much of rows; the recording's own bound per event is 1 MiB.
MAX_ROWS_BYTES = 1 << 20

_TLS_MODES = ("disable", "require", "verify-ca", "verify-full")
_T = TypeVar("_T")


@dataclass(frozen=True)
class OpenedSession:
    """An opening and who may read its recording."""

    opening: Opening
    recipients: tuple[Recipient, ...]


@dataclass(frozen=True)
class SshKeys:
    """The Ed25519 keys that an agent makes for one SSH session: nothing long-lived lies on its disk."""

    host: SigningKey
    user: SigningKey

    @classmethod
    def generate(cls) -> SshKeys:
        return cls(SigningKey.generate(), SigningKey.generate())

    def public(self) -> dict[str, str]:
        """What the platform is asked to sign."""
        return {"host": b64encode(self.host.public), "user": b64encode(self.user.public)}


def parse_opening(
    body: Mapping[str, Any],
    grant: Grant,
    *,
    agent: str,
    sealing: bytes,
    allowed: Mapping[str, bytes],
    ssh_keys: SshKeys | None = None,
) -> OpenedSession:
    """Check ``body`` (the ``open`` answer) against ``grant``, open its credential with ``sealing``.

    ``allowed`` are the recipients that this agent's administrator accepts, ``ssh_keys`` what it asked the
    platform to sign. Raises ProtocolError for a
    malformed answer and AuthenticationError for one that is about something else.
    """
    for name, expected in (
        ("session", grant.session),
        ("account", grant.account),
        ("protocol", grant.protocol),
        ("user", grant.user),
    ):
        if _need(body, name, str) != expected:
            raise AuthenticationError(f"the platform opened another {name} than the grant names")
    session_end = min(grant.session_end, _number(body, "session_end", 1, 1 << 40))
    idle_limits = [limit for limit in (grant.idle_limit, _number(body, "idle_limit", 0, 1 << 31)) if limit]
    budgets = body.get("budgets") or {}
    if not isinstance(budgets, dict):
        raise ProtocolError("the opening's budgets are not a mapping")
    opening = Opening(
        session=grant.session,
        part=_number(body, "part", 1, 999_999_999),
        user=grant.user,
        account=grant.account,
        protocol=grant.protocol,
        session_end=session_end,
        idle_limit=min(idle_limits, default=0),
        target=_target(_need(body, "target", dict)),
        credential=_unseal(_need(body, "credential", str), grant, agent, sealing),
        databases=_databases(_need(body, "target", dict).get("database")),
        rows_bytes=_number(budgets, "rows_bytes", 0, MAX_ROWS_BYTES) if "rows_bytes" in budgets else 16384,
        allow_replication=body.get("allow_replication") is True,
        options=_options(_need(body, "target", dict).get("options")),
        ssh=None if ssh_keys is None else _ssh_identity(_need(body, "ssh", dict), ssh_keys),
    )
    return OpenedSession(opening, _recipients(_need(body, "recipients", list), allowed))


def allowed_recipients(configured: tuple[AllowedRecipient, ...] | None, trust: Trust) -> dict[str, bytes]:
    """Who may be given a recording's key: the local list, or the trust list's keys where there is none."""
    if configured is None:
        return dict(trust.recording_keys)
    named = {kid: key or trust.recording_keys.get(kid) for kid, key in configured}
    return {kid: key for kid, key in named.items() if key is not None}


def _recipients(value: list[Any], allowed: Mapping[str, bytes]) -> tuple[Recipient, ...]:
    try:
        chosen = tuple(Recipient.from_json(item) for item in value)
    except RecordingError as error:
        raise ProtocolError(f"the opening names a recipient that is none: {error}") from None
    if not chosen:
        raise ProtocolError("the opening names nobody who could read the recording")
    for recipient in chosen:
        if allowed.get(recipient.kid) != recipient.key:
            raise AuthenticationError(
                f"the recording would be readable with key {recipient.kid}, which this agent does not allow",
                hint="an administrator of the agent can add it to recording.recipients in agent.yml.",
            )
    return chosen


def _target(value: Mapping[str, Any]) -> Target:
    tls = _need(value, "tls", dict)
    mode = tls.get("mode")
    if mode not in _TLS_MODES:
        raise ProtocolError("the opening's tls mode is not one of " + ", ".join(_TLS_MODES))
    policy = TlsPolicy(
        mode=mode,
        server_name=_optional_text(value, "server_name", 253),
        ca_pem=_optional_text(tls, "ca_pem", MAX_PEM),
        client_cert_pem=_optional_text(tls, "client_cert_pem", MAX_PEM),
    )
    host = _need(value, "host", str)
    if not 1 <= len(host) <= 253:
        raise ProtocolError("the opening's host is not one")
    return Target(host, _number(value, "port", 1, 65535), policy)


def _options(value: object) -> Mapping[str, Any]:
    if value is None:
        return {}
    try:
        size = len(json.dumps(value)) if isinstance(value, dict) else MAX_OPTIONS + 1
    except RecursionError:
        size = MAX_OPTIONS + 1
    if not isinstance(value, dict) or size > MAX_OPTIONS:
        raise ProtocolError(f"the opening's options are not a mapping of at most {MAX_OPTIONS} bytes")
    return value


def _ssh_identity(value: Mapping[str, Any], keys: SshKeys) -> SshIdentity:
    host = _optional_text(value, "host_certificate", MAX_CERTIFICATE_LINE)
    if host is None:
        raise ProtocolError("the opening has no host certificate for this agent")
    return SshIdentity(
        host_seed=keys.host.seed(),
        user_seed=keys.user.seed(),
        host_certificate=host,
        user_certificate=_optional_text(value, "user_certificate", MAX_CERTIFICATE_LINE),
    )


def _databases(value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_NAMES:
        raise ProtocolError("the opening's databases are not a list of names")
    if not all(isinstance(name, str) and name and "\0" not in name for name in value):
        raise ProtocolError("the opening's databases are not a list of names")
    return tuple(value)


def _unseal(box: str, grant: Grant, agent: str, sealing: bytes) -> Credential:
    try:
        sealed = b64decode(box) if len(box) <= MAX_BOX else b""
        secret = json.loads(SealedBox(PrivateKey(sealing)).decrypt(sealed))
    except (ValueError, CryptoError, RecursionError):
        # "from None": the cause could quote what it was parsing.
        raise AuthenticationError(
            "the credential is not sealed to this agent", hint="was the agent enrolled anew meanwhile?"
        ) from None
    if not isinstance(secret, dict):
        raise ProtocolError("the sealed credential is not a mapping")
    if [secret.get(key) for key in ("session", "account", "agent")] != [grant.session, grant.account, agent]:
        raise AuthenticationError("the sealed credential is for another session, account or agent")
    return Credential(
        user=_need(secret, "user", str),
        password=_optional_text(secret, "password", MAX_BOX),
        client_key_pem=_optional_text(secret, "client_key_pem", MAX_BOX),
        secrets=_secrets(secret.get("secrets")),
    )


def _secrets(value: object) -> Mapping[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_SECRETS:
        raise ProtocolError(f"the sealed secrets are not a mapping of at most {MAX_SECRETS}")
    if not all(isinstance(text, str) and text for text in value.values()):
        raise ProtocolError("the sealed secrets are not all text")
    return value


def _need(body: Mapping[str, Any], name: str, kind: type[_T]) -> _T:
    value = body.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ProtocolError(f"the opening's {name} is missing or of the wrong type")
    return value


def _number(body: Mapping[str, Any], name: str, low: int, high: int) -> int:
    value = _need(body, name, int)
    if not low <= value <= high:
        raise ProtocolError(f"the opening's {name} is not within {low} to {high}")
    return value


def _optional_text(body: Mapping[str, Any], name: str, limit: int) -> str | None:
    value = body.get(name)
    if value is not None and (not isinstance(value, str) or not value or len(value) > limit):
        raise ProtocolError(f"the opening's {name} is not text of 1 to {limit} characters")
    return value
