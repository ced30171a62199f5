"""Who is at the other end of a local connection: a listener on loopback is open to every user.

UNIX sockets are asked for the peer's credentials. TCP has no such question, but Linux lists every
socket with its owner in ``/proc/net/tcp`` and ``tcp6`` (proc(5)): the peer's row is the one whose local
address is our remote address and the other way round. No row, no access.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from collections.abc import Iterable
from pathlib import Path

_HAS_UCRED = hasattr(socket, "SO_PEERCRED")  # Linux
#: struct ucred: pid, uid, gid (unix(7)).
_UCRED = struct.Struct("iII")
#: LOCAL_PEERCRED on SOL_LOCAL, struct xucred: version, uid, … (macOS and the BSDs, unix(4)).
_SOL_LOCAL, _LOCAL_PEERCRED = 0, 1
_XUCRED_START = struct.Struct("II")


def is_own(connection: socket.socket) -> bool:
    """Whether the process at the other end of an accepted connection runs as our user.

    Nobody else passes, root neither: fails closed when the owner cannot be found.
    """
    try:
        uid = _unix_peer(connection) if connection.family == socket.AF_UNIX else tcp_peer_uid(connection)
    except (OSError, ValueError, struct.error):
        return False
    return uid == os.geteuid()


def tcp_peer_uid(connection: socket.socket) -> int | None:
    """The uid that owns the other end of a loopback TCP connection, or None when it is not listed."""
    here, there = connection.getsockname()[:2], connection.getpeername()[:2]
    for table in ("tcp", "tcp6"):
        path = Path("/proc/self/net") / table
        if not path.exists():
            continue
        with path.open("rb") as rows:
            next(rows, None)  # the heading
            uid = find_owner(rows, local=there, remote=here)
        if uid is not None:
            return uid
    return None


def find_owner(rows: Iterable[bytes], *, local: tuple[str, int], remote: tuple[str, int]) -> int | None:
    """The uid of the row with these addresses. ``rows`` are lines of ``/proc/net/tcp`` or ``tcp6``."""
    # An IPv4 pair also as that of IPv4-mapped IPv6 sockets: the peer may be of either family.
    families = (True,) if ":" in local[0] else (False, True)
    wanted = {(v6, encode(*local, v6=v6), encode(*remote, v6=v6)) for v6 in families}
    for row in rows:
        fields = row.split()
        # sl local_address rem_address st tx:rx tr:tm->when retrnsmt uid timeout inode …
        if len(fields) < 10:
            continue
        key = (len(fields[1]) > 13, fields[1], fields[2])
        # Inode 0: an orphan whose process has gone; the kernel then shows uid 0, which is nobody's.
        if key in wanted and fields[9] != b"0":
            return int(fields[7])
    return None


def encode(host: str, port: int, *, v6: bool) -> bytes:
    """An address as the tables print it: 32-bit words in the machine's own byte order, in hex.

    With ``v6`` an IPv4 address is IPv4-mapped; an IPv6 address needs it.
    """
    packed = ipaddress.ip_address(host).packed
    if v6 and len(packed) == 4:
        packed = b"\0" * 8 + b"\0\0\xff\xff" + packed
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return ("".join(f"{word:08X}" for word in words) + f":{port:04X}").encode()


def _unix_peer(connection: socket.socket) -> int:
    if _HAS_UCRED:
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        return int(_UCRED.unpack(raw)[1])
    raw = connection.getsockopt(_SOL_LOCAL, _LOCAL_PEERCRED, 76)
    return int(_XUCRED_START.unpack_from(raw)[1])
