"""Tell an SSH program why its connection cannot be carried: our identification, then SSH_MSG_DISCONNECT.

    program                        here
      SSH-2.0-OpenSSH_9.2 ──▶
                               ◀── SSH-2.0-pam
                               ◀── SSH_MSG_DISCONNECT (reason, text), then close

https://www.rfc-editor.org/rfc/rfc4253 sections 4.2, 6 and 11.1. Before the key exchange packets are plain,
so no key is needed, and a program shows the text as it would any server's.
"""

from __future__ import annotations

import os
import struct

#: An identification line is at most 255 bytes; a program that sends more first is none.
MAX_IDENTIFICATION = 255
HEAD = 4
_DISCONNECT = 1
#: SSH_DISCONNECT_BY_APPLICATION: not the network's fault, so nothing to try again by itself.
_BY_APPLICATION = 11
#: Within any program's buffer for a line on the terminal.
_MAX_TEXT = 1000


class SshRefusal:
    """One refusal in progress: ``feed`` what the program sends, send back what it returns."""

    def __init__(self, message: str, hint: str = "") -> None:
        self._answer = b"SSH-2.0-pam\r\n" + _disconnect(message + (f" HINT: {hint}" if hint else ""))
        self._seen = 0
        #: Nothing more is to be said; close.
        self.done = False

    def feed(self, data: bytes) -> bytes:
        """Take the program's next bytes and return the answer, once its identification is complete."""
        if self.done:
            return b""
        self._seen += len(data)
        if b"\n" in data:
            self.done = True
            return self._answer
        self.done = self._seen > MAX_IDENTIFICATION
        return b""


def starts_ssh(head: bytes) -> bool:
    """Whether these 4 bytes can begin an SSH connection."""
    return head == b"SSH-"


def _disconnect(text: str) -> bytes:
    shown = "".join(char if char.isprintable() else "?" for char in text[:_MAX_TEXT]).encode()
    payload = struct.pack("!BII", _DISCONNECT, _BY_APPLICATION, len(shown)) + shown + struct.pack("!I", 0)
    # Length, padding length, payload and padding together are a multiple of 8; at least 4 of padding.
    padding = 8 - (5 + len(payload)) % 8
    padding += 8 if padding < 4 else 0
    return struct.pack("!IB", 1 + len(payload) + padding, padding) + payload + os.urandom(padding)
