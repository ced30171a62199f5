"""Telling the user's program why it is not let in, before there are any keys: SSH_MSG_DISCONNECT.

RFC 4253 lets either side disconnect at any time; OpenSSH prints the words.
"""

from __future__ import annotations

import struct

from pam_agent.protocols.ssh.codec import BY_APPLICATION, DISCONNECT, string
from pam_common.errors import PamError
from pam_common.stream import Stream

#: RFC 4253, 4.2: the identification line; some programs send others before it.
MAX_FIRST = 4096
#: OpenSSH prints so much of it.
MAX_WORDS = 400

_IDENTIFICATION = b"SSH-2.0-pam\r\n"


def words(message: str, hint: str) -> str:
    """One line: the message, and what to do about it."""
    text = f"{message}. HINT: {hint}" if hint else message
    text = "".join(char if char.isprintable() else "?" for char in text)
    return text.encode()[:MAX_WORDS].decode("utf-8", "ignore")


def disconnect(message: str, hint: str) -> bytes:
    """The whole of what a server says that refuses a connection: its line, and one packet without keys."""
    text = words(message, hint).encode()
    payload = struct.pack(">BI", DISCONNECT, BY_APPLICATION) + string(text) + string(b"en")
    padding = 4 + -(len(payload) + 9) % 8
    packet = struct.pack(">IB", 1 + len(payload) + padding, padding) + payload + bytes(padding)
    return _IDENTIFICATION + packet


def refuse(client: Stream, message: str, hint: str) -> None:
    """Read the client's identification, refuse it, and let it close first."""
    first = b""
    while b"\n" not in first and len(first) < MAX_FIRST:
        data = client.recv(MAX_FIRST)
        if not data:
            return
        first += data
    client.sendall(disconnect(message, hint))


def explain(error: PamError) -> str:
    """An error as the line that a disconnecting server sends."""
    return words(str(error), error.hint)
