"""Who may log in to the relay, as what, and what they may ask for.

The only way in is an Ed25519 user certificate of a relay-user CA, whose one principal decides everything:

    connect:<gateway>   may open direct-tcpip to <gateway>:1        key id = session id
    serve:<gateway>     may ask for tcpip-forward <gateway>:1..16   key id = agent id

All else is refused with a log line: sessions, subsystems, agent and X11 forwarding, other addresses.

An *offer* of a certificate is no proof: until the signature is verified nothing is known (``identity`` is
None), and until then paramiko refuses channels and global requests by itself; each method here checks again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, cast

import paramiko
from paramiko.common import AUTH_FAILED, AUTH_SUCCESSFUL, OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED

from pam_common.errors import AuthenticationError
from pam_common.keys import is_label, is_session_id
from pam_common.logging import get_logger, kv
from pam_common.ssh_certs import CERT_TYPE, Certificate, verify_user_certificate
from pam_relay.bundle import Bundle
from pam_relay.routes import MAX_SLOT

log = get_logger("relay.admission")

#: A stock client may offer a few other keys before its certificate; nobody honest needs more.
MAX_ATTEMPTS = 6

Role = Literal["connect", "serve"]


@dataclass(frozen=True)
class Identity:
    """Who logged in: ``name`` is the session's id (role connect) or the agent's (role serve)."""

    role: Role
    gateway: str
    name: str
    valid_before: int
    ca_kid: str


def admit(blob: bytes, bundle: Bundle, *, now: float, source_address: str) -> tuple[Identity, Certificate]:
    """Return who ``blob``, a certificate as the protocol carries it, lets in. Raises AuthenticationError."""
    certificate = verify_user_certificate(blob, bundle.user_ca, now=now, source_address=source_address)
    if len(certificate.principals) != 1:
        raise AuthenticationError("the certificate has more than one principal")
    role, _, gateway = certificate.principals[0].partition(":")
    if role not in ("connect", "serve") or not is_label(gateway):
        raise AuthenticationError("the certificate's principal is none of a relay's")
    identity = Identity(
        role=cast("Role", role),
        gateway=gateway,
        name=certificate.key_id,
        valid_before=certificate.valid_before,
        ca_kid=certificate.ca_kid,
    )
    valid_name = is_session_id if role == "connect" else is_label
    if not valid_name(identity.name):
        raise AuthenticationError(f"the key id of a {role} certificate is not what it must be")
    check_standing(identity, bundle)
    return identity, certificate


def check_standing(identity: Identity, bundle: Bundle) -> None:
    """Raise AuthenticationError when ``bundle`` no longer lets ``identity`` be here."""
    if identity.gateway not in bundle.gateways:
        raise AuthenticationError(f"there is no gateway {identity.gateway}")
    revoked = bundle.revoked_sessions if identity.role == "connect" else bundle.revoked_agents
    if identity.name in revoked:
        raise AuthenticationError(f"{'session' if identity.role == 'connect' else 'agent'} is revoked")
    bundle.user_ca.get(identity.ca_kid)


class Requests(Protocol):
    """What an admitted peer may ask of the relay."""

    def add_route(self, slot: int) -> bool: ...

    def cancel_route(self, slot: int) -> None: ...


class Admission(paramiko.ServerInterface):
    """One SSH connection's door; all methods run in that connection's reader thread."""

    def __init__(
        self, bundle: Callable[[], Bundle], now: Callable[[], float], source: str, requests: Requests
    ) -> None:
        self._bundle = bundle
        self._now = now
        self._source = source
        self._requests = requests
        self._attempts = 0
        self._claimed: Identity | None = None
        self.identity: Identity | None = None

    def authenticated(self) -> Identity:
        """Called when the signature of the last certificate was verified: it is who it claimed to be.

        paramiko asks ``check_auth_publickey`` right before it verifies that same request's signature, so the
        last claim is the proven one, whatever was offered earlier.
        """
        assert self._claimed is not None
        self.identity = self._claimed
        return self.identity

    # -- login -----------------------------------------------------------------------------------------

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        self._claimed = None
        self._attempts += 1
        try:
            self._claimed = self._check(key)
        except AuthenticationError as error:
            log.info("login refused", extra=kv(source=self._source, reason=error))
            return AUTH_FAILED
        return AUTH_SUCCESSFUL

    def _check(self, key: paramiko.PKey) -> Identity:
        if self._attempts > MAX_ATTEMPTS:
            raise AuthenticationError("too many attempts")
        blob = getattr(key, "public_blob", None)
        if blob is None or blob.key_type != CERT_TYPE:
            raise AuthenticationError("a key without a certificate")
        identity, certificate = admit(
            blob.key_blob, self._bundle(), now=self._now(), source_address=self._source
        )
        # paramiko parsed the blob by itself, and verifies with what it found: it must be the same key.
        if key.asbytes()[-32:] != certificate.public_key:
            raise AuthenticationError("the certificate's key is ambiguous")
        return identity

    # -- an agent's forwards ---------------------------------------------------------------------------

    def check_port_forward_request(self, address: str, port: int) -> int:
        """Return the slot, or 0 for no."""
        if self._may("serve", address, range(1, MAX_SLOT + 1), port) and self._requests.add_route(port):
            return port
        self._refused("tcpip-forward", address=address, port=port)
        return 0

    def cancel_port_forward_request(self, address: str, port: int) -> None:
        if self._may("serve", address, range(1, MAX_SLOT + 1), port):
            self._requests.cancel_route(port)
        else:
            self._refused("cancel-tcpip-forward", address=address, port=port)

    # -- a client's channels ---------------------------------------------------------------------------

    def may_connect(self, address: str, port: int) -> bool:
        """Whether this peer may have a channel to ``address:port``; logs when it may not."""
        if self._may("connect", address, range(1, 2), port):
            return True
        self._refused("direct-tcpip", address=address, port=port)
        return False

    def check_channel_direct_tcpip_request(
        self, chanid: int, origin: tuple[str, int], destination: tuple[str, int]
    ) -> int:
        # These go through may_connect and the transport's on_direct_tcpip; none may come this way.
        self._refused("direct-tcpip", address=destination[0], port=destination[1])
        return OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED

    # -- everything else -------------------------------------------------------------------------------

    def check_channel_request(self, kind: str, chanid: int) -> int:
        self._refused("channel", kind=kind)
        return OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED

    def check_global_request(self, kind: str, msg: paramiko.Message) -> bool:
        # The answer "no" is all that a keepalive wants.
        if not kind.startswith("keepalive@"):
            self._refused("global request", kind=kind)
        return False

    def _may(self, role: Role, address: str, ports: range, port: int) -> bool:
        identity = self.identity
        return (
            identity is not None and identity.role == role and address == identity.gateway and port in ports
        )

    def _refused(self, what: str, **details: object) -> None:
        identity = self.identity
        who = {identity.role: identity.name, "gateway": identity.gateway} if identity else {}
        log.warning("request refused", extra=kv(request=what, source=self._source, **who, **details))
