"""What a protocol says about its local end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pam_client.home import Home
from pam_client.session import Session
from pam_client.web.origin import Origin


class Refusal(Protocol):
    """Says no in a protocol's own form: bytes of the program in, bytes for it out."""

    done: bool  #: nothing more is to be said; close

    def feed(self, data: bytes) -> bytes: ...


@dataclass(frozen=True)
class Place:
    """Where the listener is, and what the program should ask for there."""

    host: str  #: an address, or the folder of a UNIX socket
    port: int
    user: str
    database: str | None
    gateway: str = ""
    account: str = ""  #: ``web-01/deploy``
    trust: Path | None = None  #: the file that :attr:`Launch.trust` wrote
    origin: Origin | None = None  #: what :attr:`Launch.origin` made


@dataclass(frozen=True)
class Launch:
    """What is special about one protocol at the local end."""

    program: str  #: the native program, for the usage line
    variables: Callable[[Place], dict[str, str]]  #: what a COMMAND finds in its environment
    removed: frozenset[str]  #: variables of the caller that would lead the program elsewhere
    usage: Callable[[Place], str]  #: one line to copy
    socket_name: Callable[[int], str]  #: the name of a UNIX socket in a folder, by port
    socket_port: Callable[[str], int | None]  #: the port in such a name; None for another name
    default_port: int  #: which port number a UNIX socket carries in its name
    head: int  #: the client speaks first, and this many bytes tell its protocol; 0: the server does
    accepts: Callable[[bytes], bool]  #: whether those bytes are the protocol's
    refusal: Callable[[str, str], Refusal]  #: (message, hint) → how to say it in the protocol's own form
    #: Writes into the home what the native program must believe; gives the file.
    trust: Callable[[Home, str, Session], Path] | None = None
    #: (place, command, terminal) → exit code. What runs when no port is asked for: the protocol's own
    #: program, and a COMMAND is then one of the far side.
    native: Callable[[Place, Sequence[str], bool], int] | None = None
    #: (account, port, for a COMMAND) → the name under which a browser or a program reaches it.
    origin: Callable[[str, int, bool], Origin] | None = None
    #: A proxy that the environment names must not be asked for it.
    direct: bool = False

    def environment(self, place: Place, inherited: Mapping[str, str]) -> dict[str, str]:
        """The whole environment for a COMMAND."""
        kept = {name: value for name, value in inherited.items() if name not in self.removed}
        return kept | self.variables(place) | (_without_proxy(inherited) if self.direct else {})


def _without_proxy(inherited: Mapping[str, str]) -> dict[str, str]:
    """No proxy for this machine, besides those names that have none already."""
    known = inherited.get("no_proxy") or inherited.get("NO_PROXY") or ""
    names = ",".join([*filter(None, [known]), "127.0.0.1", "localhost"])
    return {"no_proxy": names, "NO_PROXY": names}
