"""What a protocol module gets and gives.

One :class:`Interceptor` object serves one session. The session calls ``serve`` once per local
connection of the user, each in a thread of its own, so what the connections share (PostgreSQL's cancel
keys, say) lives in the object. Order for every connection: dial → log in → tell the client it is in →
carry bytes. What a client asked for is recorded before it is forwarded to the target, and what a target
answered before it is forwarded to the client.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

from pam_common.errors import PamError
from pam_common.stream import Stream

#: One recorded event without its time and connection number, which the Recorder adds:
#: ``{"kind": "query", "sql": "select 1"}``. JSON values only.
Event: TypeAlias = dict[str, Any]

TlsMode: TypeAlias = Literal["disable", "require", "verify-ca", "verify-full"]


class ClientProtocolError(PamError):
    """The user's program sent something its protocol does not allow here."""


class TargetProtocolError(PamError):
    """The target sent something its protocol does not allow here."""


class TargetLoginError(PamError):
    """The target refused the account's credential or cannot be logged in to as policy demands."""


class TargetIdentityError(TargetLoginError):
    """The target, or a jump host before it, is not who it must be: an administrator is to know of it."""


@dataclass(frozen=True)
class TlsPolicy:
    """How the target must be spoken to. ``server_name`` defaults to the target's host."""

    mode: TlsMode = "verify-full"
    server_name: str | None = None
    ca_pem: str | None = None
    client_cert_pem: str | None = None


@dataclass(frozen=True)
class Target:
    """Where a resource is, seen from the agent."""

    host: str
    port: int
    tls: TlsPolicy = field(default_factory=TlsPolicy)


@dataclass(frozen=True)
class Credential:
    """What logs in to the target. In memory for the session only; never shown by ``repr``."""

    user: str
    password: str | None = field(default=None, repr=False)
    client_key_pem: str | None = field(default=None, repr=False)
    #: What else the account, or its resource's jump host, needs: ``private_key``, ``passphrase``, ``token`` …
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class SshIdentity:
    """The keys that this agent made for one SSH session, and what the platform's CAs signed on them."""

    host_seed: bytes = field(repr=False)  #: Ed25519; what the user's program sees as the host key
    user_seed: bytes = field(repr=False)  #: Ed25519; what logs in to the target with a certificate
    host_certificate: str
    user_certificate: str | None = None  #: only for accounts that log in with one


@dataclass(frozen=True)
class Opening:
    """What the platform answered when the session was opened; the agent's whole knowledge of it."""

    session: str
    part: int
    user: str  #: the person, as the platform names them
    account: str  #: ``prod-db/readonly``
    protocol: str
    session_end: int  #: UNIX seconds
    idle_limit: int  #: seconds, 0 for none
    target: Target
    credential: Credential
    databases: tuple[str, ...] | None = None  #: None: any
    rows_bytes: int = 16384  #: result rows to record per statement, in bytes; 0 for none
    allow_replication: bool = False
    #: The protocol's own settings of the resource, those of the account under ``account``. Of bounded size,
    #: otherwise unchecked: each protocol checks what it uses.
    options: Mapping[str, Any] = field(default_factory=dict)
    ssh: SshIdentity | None = None  #: for the protocol ssh only


class Conversation(Protocol):
    """One local connection of the user, as the session lends it to the Interceptor."""

    @property
    def number(self) -> int:
        """Counts the connections of a session from 1; events carry it."""

    @property
    def end_reason(self) -> str | None:
        """Why the session is being ended ("killed by …", "session expired"), or None while it runs.

        Set before the target's socket is aborted, so whoever is woken finds it. The client's stream
        is aborted about 0.3 s later: enough for a last message in the protocol's own form.
        """

    def record(self, events: Sequence[Event]) -> None:
        """Append events to the recording; returns when the kernel has them. Raises PamError when it
        cannot (full disk, dead recorder): nothing may be forwarded then, and the session ends."""

    def dial(self, host: str | None = None, port: int | None = None) -> socket.socket:
        """A new TCP connection to the opening's target (or to ``host``, a jump host that the opening
        names), within the local ``allow_targets``; TCP_NODELAY set, blocking, aborted by the session when
        it ends. Raises PamError with a message for the user. The caller closes it."""

    def permitted(self, host: str, port: int) -> str:
        """An address of ``host`` that ``allow_targets`` permits, for a target that another host dials.
        Raises PamError with a message for the user."""

    def touch(self) -> None:
        """Bytes flowed: the idle clock starts anew. Cheap; called per batch."""


class Interceptor(Protocol):
    """Speaks one protocol to both sides for one session."""

    def __init__(self, opening: Opening) -> None: ...

    def serve(self, client: Stream, conversation: Conversation) -> None:
        """Carry one connection from its first byte to its end. Does not close ``client``. Returns at the
        end of either side; tells the client of every failure in the protocol's own form first, then
        raises PamError for the log and the recording."""

    @staticmethod
    def refuse(client: Stream, message: str, hint: str) -> None:
        """Answer a connection that was never authorised or opened, in the protocol's own form: reads at
        most what the protocol makes the client say first (bounded in size), sends the error."""
