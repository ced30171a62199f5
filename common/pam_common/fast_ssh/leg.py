"""A transport whose connection layer belongs to its owner: one of the two legs of an SSH interceptor.

Key exchange, login, rekeying and liveness are the Transport's. Every message of a channel and every global
request of a logged-in peer (RFC 4254) goes to ``on_message`` instead, whole, in the reader thread, and what
the owner queues goes out as it is: the two legs can so be joined message by message, with nothing lost that
a channel's programming interface hides (the order of EOF, exit status and CLOSE, terminal modes, extended
data).
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Any

import paramiko
from paramiko.common import MSG_REQUEST_FAILURE, MSG_REQUEST_SUCCESS

from pam_common.errors import UnavailableError
from pam_common.fast_ssh.legacy import LegacyPackets
from pam_common.fast_ssh.transport import MAX_REQUESTS, Transport
from pam_common.ssh_certs import CertificateKey

#: SSH_MSG_GLOBAL_REQUEST to SSH_MSG_CHANNEL_FAILURE: the connection protocol.
_FIRST, _LAST = 80, 100
_DISCONNECT = 1
#: What follows OpenSSH's own list of secure defaults, as far as paramiko has it.
_TARGET_KEX = (
    "mlkem768x25519-sha256",
    "curve25519-sha256@libssh.org",
    "ecdh-sha2-nistp256",
    "ecdh-sha2-nistp384",
    "ecdh-sha2-nistp521",
    "diffie-hellman-group16-sha512",
    "diffie-hellman-group14-sha256",
)
_TARGET_KEYS = (
    "ssh-ed25519",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "rsa-sha2-512",
    "rsa-sha2-256",
)

#: One is agreed on and, beside AES-GCM, never used: so whatever a server has.
_TARGET_MACS = (
    "hmac-sha2-256-etm@openssh.com",
    "hmac-sha2-512-etm@openssh.com",
    "hmac-sha2-256",
    "hmac-sha2-512",
    "hmac-sha1",
)

_Stock: Any = paramiko.Transport


class Leg(Transport):
    """One side of an interceptor. ``on_message`` gets a message's number and all of its bytes, and must not
    block; what it raises ends the connection."""

    def __init__(self, sock: socket.socket, *, name: str) -> None:
        super().__init__(sock, name=name)
        self.on_message: Callable[[int, memoryview], None] | None = None
        self._logged_in = False

    def _auth_trigger(self) -> None:
        super()._auth_trigger()
        self._logged_in = True

    def _divert(self, kind: int, payload: memoryview) -> bool:
        # Before the login, and within a key exchange, paramiko says what is allowed: next to nothing.
        if not _FIRST <= kind <= _LAST or not self._logged_in or self._expected_packet:
            return False
        if kind in (MSG_REQUEST_SUCCESS, MSG_REQUEST_FAILURE):
            return False  # answers to what this side asked
        if self.on_message is not None:
            # What is passed on in a queue outlives the buffer it was read into.
            self.on_message(kind, memoryview(bytes(payload)))
        return True

    def ask(self, request: bytes, answered: Callable[[bytes | None], None]) -> None:
        """Queue a global request that wants an answer. ``answered`` gets what came with it, None for a
        refusal, in the reader thread; never when the connection ends first. Raises UnavailableError when
        too many wait."""
        with self._request_lock:
            if len(self._requests) >= MAX_REQUESTS:
                raise UnavailableError("the peer leaves too many requests without answer")
            self._requests.append(_Asked(answered))  # type: ignore[arg-type]
            self.queue(request)

    def say_goodbye(self, reason: int, text: str) -> None:
        """Queue SSH_MSG_DISCONNECT (RFC 4253, 11.1) and send what can be sent without waiting."""
        message = paramiko.Message()
        message.add_byte(bytes([_DISCONNECT]))
        message.add_int(reason)
        message.add_string(text)
        message.add_string("en")
        self.send_soon(message.asbytes())

    @property
    def ended(self) -> bool:
        """Whether the connection is over, and ``on_end`` was called or never will be."""
        return self._ended

    @property
    def peer_version(self) -> str:
        """The peer's identification line, such as ``SSH-2.0-OpenSSH_9.2p1``."""
        return str(self.remote_version)

    @property
    def cipher(self) -> str:
        """What this side encrypts with."""
        return str(self.local_cipher)


class _Asked:
    """A global request whose answer is for a function. Its own event, as the Transport expects one."""

    def __init__(self, call: Callable[[bytes | None], None]) -> None:
        self._call = call
        self.answer: paramiko.Message | None = None
        self.answered = self

    def set(self) -> None:
        self._call(None if self.answer is None else self.answer.get_remainder())


class TargetLeg(Leg):
    """The client's side, towards servers that are not ours: their algorithms, as far as they are secure.

    AES-GCM only, which needs no strict key exchange to be safe from prefix truncation; strict all the same
    where the server can. ``host_keys`` are the algorithms to accept a host key of, best first.
    """

    _preferred_kex: Any = _TARGET_KEX
    _preferred_macs: Any = _TARGET_MACS
    _preferred_pubkeys: Any = _TARGET_KEYS

    def __init__(self, sock: socket.socket, *, name: str, host_keys: Sequence[str]) -> None:
        super().__init__(sock, name=name)
        self._host_key_algorithms = tuple(host_keys)

    @property
    def preferred_keys(self) -> tuple[str, ...]:
        return self._host_key_algorithms

    def _parse_kex_init(self, m: paramiko.Message) -> None:
        _Stock._parse_kex_init(self, m)

    def host_key_blob(self) -> bytes:
        """The host key or host certificate that the server proved to hold the private half of."""
        return self.host_certificate() or self.get_remote_server_key().asbytes()


class LegacyTargetLeg(TargetLeg):
    """Towards servers without AES-GCM, or with groups of their own only: AES-CTR with HMAC as well. SHA-1
    signatures are not spoken, so a server's host key is ECDSA, Ed25519, or RSA with SHA-2."""

    _packets_class = LegacyPackets
    _preferred_kex: Any = (*_TARGET_KEX, "diffie-hellman-group-exchange-sha256")
    _preferred_ciphers: Any = (
        "aes128-gcm@openssh.com",
        "aes256-gcm@openssh.com",
        "aes128-ctr",
        "aes192-ctr",
        "aes256-ctr",
    )


def serve_leg(
    sock: socket.socket, *, name: str, host_key: CertificateKey, server: paramiko.ServerInterface
) -> Leg:
    """The server's side, not started yet: set ``on_message`` and ``on_end``, then :func:`start`."""
    leg = Leg(sock, name=name)
    leg.add_server_key(host_key)
    leg.server_object = server
    return leg
