"""The user's stream as a socket, and its end."""

from __future__ import annotations

import select
import socket

from pam_agent.protocols.ssh.bridge import Bridge
from pam_common.stream import SocketStream


def test_what_the_transport_leaves_unread_is_no_failure() -> None:
    """The kernel tells of it by ECONNRESET, after all that was written: the connection ends as any other."""
    here, there = socket.socketpair()
    with here, there:
        bridge = Bridge(SocketStream(here), "up")
        bridge.start()
        there.sendall(b"sent ahead")
        assert select.select([bridge.far], [], [], 60)[0]
        bridge.far.sendall(b"goodbye")
        bridge.far.close()
        bridge.run()
        assert there.recv(100) == b"goodbye"
        there.shutdown(socket.SHUT_RDWR)
        bridge.finish()
