"""The client's side of the start: encryption requests, StartupMessage, what of it goes to the target.

https://www.postgresql.org/docs/current/protocol-flow.html#PROTOCOL-FLOW-START-UP
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pam_agent.protocols.base import ClientProtocolError, Opening
from pam_agent.protocols.postgres import codec
from pam_agent.protocols.postgres.codec import CancelRequest, Startup
from pam_common.errors import RefusedError
from pam_common.stream import Stream

#: PostgreSQL's own authentication_timeout.
SECONDS: Final = 60.0

#: What a client may not say about who it is: the account's user and credential are used in any case.
_IDENTITY: Final = frozenset({"user", "password", "passfile", "sslpassword"})
_FALSE: Final = frozenset({"false", "off", "no", "0"})
_TRUE: Final = frozenset({"true", "on", "yes", "1"})


def read(client: Stream) -> tuple[Startup | CancelRequest, bytes] | None:
    """The client's request and the bytes behind it; None if it closes without a word (a port check).

    Answers requests for encryption with no: the stream is already encrypted from the user's machine to
    the agent. Raises ClientProtocolError.
    """
    asked: set[int] = set()
    packet, rest = _packet(client)
    if not packet:
        return None
    while True:
        request = codec.parse_startup(packet)
        if not isinstance(request, int):
            if isinstance(request, CancelRequest) and rest:
                raise ClientProtocolError("bytes behind a cancel request")
            return request, rest
        if request in asked:
            raise ClientProtocolError("encryption is requested twice")
        if rest:
            # Whatever stands here would be taken as if it had come encrypted (CVE-2021-23214).
            raise ClientProtocolError("bytes behind a request for encryption, before its answer")
        asked.add(request)
        client.sendall(b"N")
        packet, rest = _packet(client)


def _packet(client: Stream) -> tuple[bytes, bytes]:
    """A packet without its length, and what came behind it; both empty at the end of the stream."""
    data = client.recv(codec.STARTUP_LIMIT)
    while data:
        if len(data) >= 4:
            length = int.from_bytes(data[:4], "big")
            if not 8 <= length <= codec.STARTUP_LIMIT:
                raise ClientProtocolError(
                    "start-up packet has an impossible length",
                    hint="is it a PostgreSQL client? turn direct TLS off (sslnegotiation=postgres)",
                )
            if len(data) >= length:
                return data[4:length], data[length:]
        more = client.recv(codec.STARTUP_LIMIT)
        if not more:
            raise ClientProtocolError("start-up packet is incomplete")
        data += more
    return b"", b""


@dataclass(frozen=True)
class Request:
    """What goes to the target. ``unsupported`` are protocol options that the client must do without."""

    version: int
    parameters: dict[str, str]
    unsupported: list[str]
    database: str | None
    application: str


def narrow(startup: Startup, opening: Opening) -> Request:
    """Take from a start-up what the account allows. Raises RefusedError.

    Everything else goes through unchanged, ``options`` too: what it sets (a role, a search path), the
    user could set by a statement as well, and the target's rights for the account's user bound both.
    """
    parameters = {}
    unsupported = []
    for name, value in startup.parameters.items():
        if name.startswith("_pq_."):
            unsupported.append(name)  # such an option may change what messages look like
        elif name.lower() not in _IDENTITY:
            parameters[name] = value
    replication = _replication(parameters, opening)
    if replication != "physical":
        database = _database(startup, opening)
        parameters.pop("database", None)
        if database is not None:
            parameters["database"] = database
    version = codec.VERSION_3_2 if startup.version >= codec.VERSION_3_2 else codec.VERSION_3_0
    application = parameters.get("application_name", "")
    return Request(version, parameters, unsupported, parameters.get("database"), application)


def _replication(parameters: dict[str, str], opening: Opening) -> str:
    value = parameters.get("replication")
    if value is None or value.lower() in _FALSE:
        parameters.pop("replication", None)
        return ""
    if not opening.allow_replication:
        raise RefusedError(
            f"replication is not allowed for {opening.account}",
            hint="an administrator can set allow_replication for the account",
        )
    if value.lower() in _TRUE:
        return "physical"  # the whole server: no database is chosen, no limit to databases applies
    if value == "database":
        return "logical"
    raise RefusedError("replication must be true, false or database")


def _database(startup: Startup, opening: Opening) -> str | None:
    """The database to log in to; None: the target's default. Names are compared as they are, byte by
    byte: PostgreSQL neither folds nor trims them here, and cuts off only what is longer than any name."""
    asked = startup.parameters.get("database") or None
    allowed = opening.databases
    if allowed is None or asked in allowed:
        return asked
    # Clients that are told no database ask for one named like the user they were told.
    if allowed and (asked is None or asked == startup.parameters.get("user")):
        return allowed[0]
    raise RefusedError(
        f"database {asked!a} is not open to {opening.account}",
        hint="allowed: " + (", ".join(allowed) or "none"),
    )
