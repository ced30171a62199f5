"""A hostile PostgreSQL server during the login.

Input: flags, then what the server sends. ``NONCE`` in it becomes the nonce of the agent's SCRAM exchange, so
that the exchange can go on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from material import Input, ScriptedStream

from pam_agent.protocols.base import Credential
from pam_agent.protocols.postgres import codec
from pam_agent.protocols.postgres.codec import UINT32, message
from pam_agent.protocols.postgres.login import _MESSAGE_LIMIT, Login, log_in
from pam_common.errors import PamError

PASSWORD = "correct horse battery staple"
TLS, NO_PASSWORD = 1, 2


class Server(ScriptedStream):
    """What the agent has of a server: a TargetStream."""

    def __init__(self, script: bytes, *, tls: bool) -> None:
        super().__init__([])
        self._script = script
        self.tls_version = "TLSv1.3" if tls else None
        self.channel_binding = b"e" * 32 if tls else None

    def recv_into(self, view: memoryview) -> int:
        self._rest = self._rest or self._next()
        return super().recv_into(view)

    def _next(self) -> bytes:
        """One message at a time, since the nonce is known only once the agent has sent it."""
        size = 1 + int.from_bytes(self._script[1:5], "big")
        out, self._script = self._script[:size], self._script[size:]
        nonce = re.search(rb"r=([^,]+)", bytes(self.sent))
        if nonce and b"NONCE" in out:
            out = message(out[:1], out[5:].replace(b"NONCE", nonce[1]))
        return out

    def end_sending(self) -> None:
        pass


def TestOneInput(data: bytes) -> None:
    source = Input(data)
    flags = source.byte()
    script = source.rest()
    credential = Credential("app_ro", None if flags & NO_PASSWORD else PASSWORD)
    server = Server(script, tls=bool(flags & TLS))
    said = ""
    try:
        login = log_in(server, credential, codec.VERSION_3_2, {"database": "app"})
    except PamError as error:
        said = f"{error} {error.hint}"
    else:
        _check(login, script)
    assert PASSWORD not in said
    if not flags & TLS:
        assert PASSWORD.encode() not in server.sent


def seeds() -> Iterator[bytes]:
    settled = (
        message(b"S", b"client_encoding\0UTF8\0")
        + message(b"N", b"SNOTICE\0Mhello\0\0")
        + message(b"K", UINT32.pack(7) + b"1234")
        + message(b"Z", b"I")
    )
    ok = message(b"R", UINT32.pack(0))
    yield bytes([0]) + ok + settled + b"early"
    yield bytes([0]) + codec.negotiate_version(codec.VERSION_3_0, ["_pq_.x"]) + ok + settled
    yield bytes([0]) + message(b"R", UINT32.pack(5) + b"salt") + ok + settled
    yield bytes([TLS]) + message(b"R", UINT32.pack(3)) + ok + settled
    yield bytes([NO_PASSWORD]) + message(b"R", UINT32.pack(3))
    yield bytes([0]) + message(b"E", b"SFATAL\0C28P01\0Mno\0\0")
    mechanisms = b"SCRAM-SHA-256\0SCRAM-SHA-256-PLUS\0\0"
    for flags in (0, TLS):
        start = message(b"R", UINT32.pack(10) + mechanisms)
        first = message(b"R", UINT32.pack(11) + b"r=NONCEabc,s=c2FsdHNhbHRzYWx0c2FsdA==,i=4096")
        final = message(b"R", UINT32.pack(12) + b"v=AAAA")
        yield bytes([flags]) + start + first + final + ok + settled
        yield bytes([flags]) + start + message(b"R", UINT32.pack(11) + b"r=NONCE,s=,i=x") + ok
        yield bytes([flags]) + start + first + ok


def _check(login: Login, script: bytes) -> None:
    """Nobody is logged in who did not say so, and nothing without bound was kept."""
    assert message(b"R", UINT32.pack(0)) in script
    assert len(login.greeting) <= 2 * _MESSAGE_LIMIT + 5
    assert len(login.secret) <= 256
