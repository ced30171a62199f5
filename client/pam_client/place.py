"""Where a connect listens: the account's own TCP port, a chosen one, or a UNIX socket."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pam_client import ports
from pam_client.home import Home, has_peer_check
from pam_client.launch import Launch, Place
from pam_client.listener import listen_unix
from pam_client.session import Session
from pam_common.errors import PamError

#: sun_path holds 104 bytes on macOS, with the NUL at its end.
MAX_SOCKET_PATH = 103


@dataclass(frozen=True)
class Wish:
    """What was asked for on the command line; at most one of the first two."""

    port: int | None = None
    path: Path | None = None
    database: str | None = None
    command: bool = False  #: a COMMAND is to use it


def check(wish: Wish) -> None:
    """Raise PamError for a wish that this system cannot grant safely; before anything is opened."""
    if wish.port is not None and not has_peer_check():
        raise PamError(
            "this system does not tell who connects to a local TCP port, so other users could use it",
            hint="leave --port out: a UNIX socket in a private folder is used, as psql -h FOLDER.",
        )


@contextlib.contextmanager
def listening(home: Home, platform: str, session: Session, launch: Launch, wish: Wish) -> Iterator[_Found]:
    """Listen as wished, or by default where this system can protect it; gives the sockets and the Place.

    The sockets are handed over to a Listener; a UNIX socket's file is removed at the end.
    """
    trust = launch.trust(home, platform, session) if launch.trust else None
    if launch.origin is not None:
        sockets = _listen_web(home, platform, session.account, wish)
        port = sockets[0].getsockname()[1]
        origin = launch.origin(session.account, port, wish.command)
        where = (ports.HOST, port, session.user, None, session.gateway, session.account)
        yield sockets, Place(*where, origin=origin)
        return

    def at(host: str, port: int) -> Place:
        database = wish.database or session.database
        return Place(host, port, session.user, database, session.gateway, session.account, trust)

    path = wish.path
    if path is None and wish.port is None and not has_peer_check():
        path = _private_folder(home, session.account, launch)
    if path is None:
        sock = (
            ports.listen(home, platform, session.account) if wish.port is None else ports.listen_on(wish.port)
        )
        yield (sock,), at(ports.HOST, sock.getsockname()[1])
        return
    port = launch.socket_port(path.name)
    # Native programs look for one name in a folder; any other path is that folder.
    folder = (path if port is None else path.parent).absolute()
    port = port or launch.default_port
    file = folder / launch.socket_name(port)
    sock = listen_unix(file)
    try:
        yield (sock,), at(str(folder), port)
    finally:
        file.unlink(missing_ok=True)


def _listen_web(home: Home, platform: str, account: str, wish: Wish) -> tuple[socket.socket, ...]:
    """For a browser the account's own port, for a COMMAND any. Raises PamError."""
    if wish.path is not None:
        raise PamError("a web application cannot be brought to a UNIX socket", hint="leave --socket out.")
    if wish.command:
        if not has_peer_check():
            raise PamError(
                "this system does not tell who connects to a local TCP port, so other users could use it",
                hint="leave the COMMAND out: a browser shows who it is by a link.",
            )
        return (ports.listen_on(wish.port or 0),)
    if wish.port is not None:
        return ports.listen_on_both(wish.port)
    return ports.claim(home, platform, account, ports.listen_on_both)


def _private_folder(home: Home, account: str, launch: Launch) -> Path:
    """A folder of the account's own, the same every day, short enough for a socket's address."""
    run = home.make() / "run"
    folder = run / account.replace("/", ".")  # which no name contains
    if len(os.fsencode(folder / launch.socket_name(launch.default_port))) <= MAX_SOCKET_PATH:
        return folder
    return run / hashlib.blake2b(account.encode(), digest_size=4).hexdigest()


_Found = tuple[tuple[socket.socket, ...], Place]
