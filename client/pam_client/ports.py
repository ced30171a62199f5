"""A resource keeps its local port from day to day, so saved connections in other programs go on working."""

from __future__ import annotations

import errno
import hashlib
import socket
from collections.abc import Callable, Iterator
from typing import TypeVar

from pam_client.home import Home
from pam_common.errors import PamError

#: Registered-port space with nothing well known in it; 5000 numbers keep two of a person's hundred
#: resources apart in most cases, and a collision only means the next number.
FIRST, COUNT = 42000, 5000
HOST = "127.0.0.1"
_HOST_V6 = "::1"
#: This machine has no IPv6, or none on loopback: then nobody else has.
_NO_V6 = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EPROTONOSUPPORT)
_FILE, _LOCK = "ports.json", "ports.lock"


def preferred(platform: str, account: str) -> int:
    """The port of ``account`` ("prod-db/readonly") where nothing else decides."""
    digest = hashlib.blake2b(f"{platform}\0{account}".encode(), digest_size=8).digest()
    return FIRST + int.from_bytes(digest, "big") % COUNT


T = TypeVar("T")


def listen(home: Home, platform: str, account: str) -> socket.socket:
    """A socket listening on the account's own port, or on the next free one while that is taken."""
    return claim(home, platform, account, listen_on)


def claim(home: Home, platform: str, account: str, bind: Callable[[int], T]) -> T:
    """What ``bind`` makes of the account's own port, or of the next one that it does not refuse."""
    key = f"{platform} {account}"
    with home.lock(_LOCK):
        known = {name: port for name, port in home.read_json(_FILE).items() if _is_port(port)}
        start = known.get(key) or preferred(platform, account)
        others = {port for name, port in known.items() if name != key}
        for port in _from(start):
            if port in others:
                continue
            try:
                listener = bind(port)
            except PamError:
                continue
            # Only the first choice is remembered: a port that is taken today is free tomorrow.
            if key not in known:
                home.write_json(_FILE, known | {key: port})
            return listener
    raise PamError(
        f"no free port between {FIRST} and {FIRST + COUNT - 1}",
        hint="--port N or --socket PATH names a place.",
    )


def listen_on(port: int) -> socket.socket:
    """A socket listening on loopback at ``port`` (0: any). Raises PamError when it is taken."""
    try:
        return _listen(socket.AF_INET, HOST, port)
    except OSError as error:
        raise _taken(HOST, port, error) from None


def listen_on_both(port: int) -> tuple[socket.socket, ...]:
    """Listening on IPv4 and, where there is one, IPv6 loopback. Raises PamError when either is taken.

    Names below ``localhost`` stand for both: who held the other half would be taken for us by a browser.
    """
    first = listen_on(port)
    port = first.getsockname()[1]
    try:
        return first, _listen(socket.AF_INET6, _HOST_V6, port)
    except OSError as error:
        if error.errno in _NO_V6:
            return (first,)
        first.close()
        raise _taken(f"[{_HOST_V6}]", port, error) from None


def _listen(family: socket.AddressFamily, host: str, port: int) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        # Only past connections in TIME_WAIT are passed over; two live listeners stay impossible on Linux.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        # A burst of a connection pool; the kernel holds the rest back.
        listener.listen(64)
    except OSError:
        listener.close()
        raise
    return listener


def _taken(host: str, port: int, error: OSError) -> PamError:
    return PamError(
        f"cannot listen on {host}:{port}: {(error.strerror or str(error)).lower()}",
        hint="another program uses it; --port N names another.",
    )


def _from(start: int) -> Iterator[int]:
    for step in range(COUNT):
        yield FIRST + (start - FIRST + step) % COUNT


def _is_port(value: object) -> bool:
    return isinstance(value, int) and FIRST <= value < FIRST + COUNT
