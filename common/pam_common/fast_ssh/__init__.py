"""SSH transports as this product uses them; the one package that knows paramiko's private names.

``tests/common/test_fast_ssh.py`` holds those names: a paramiko upgrade that moves one fails there, and says
which. What is different from a stock ``paramiko.Transport``:

- AES-GCM, X25519 (with ML-KEM-768 first) and Ed25519 *certificates* only; strict key exchange is required
  of the peer (CVE-2023-48795); a plain host key is never accepted;
- packets by :mod:`pam_common.fast_ssh.packets`: bounded, without polling, never a reader thread that waits;
- channels of our own: handed on by the reader thread, or joined to another's without a thread
  (:class:`Switch`); the peer's use of its window is checked, so a channel buffers one window at most;
- global requests are answered in order and have a deadline, so a keepalive can ask for a reply.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

import paramiko

from pam_common.errors import RefusedError, UnavailableError
from pam_common.fast_ssh.channel import PACKET, WINDOW, ChannelStream
from pam_common.fast_ssh.switch import Switch
from pam_common.fast_ssh.transport import CHANNEL_TIMEOUT, HANDSHAKE_TIMEOUT, IncomingChannel, Transport
from pam_common.ssh_certs import CertificateKey, verify_host_certificate
from pam_common.tokens import VerifyKeys

_CLOSED_EARLY = "the relay closed the connection during the key exchange"

__all__ = [
    "PACKET",
    "WINDOW",
    "ChannelStream",
    "IncomingChannel",
    "Switch",
    "Transport",
    "connect",
    "open_direct",
    "open_forwarded",
    "serve",
    "start",
]


def connect(
    sock: socket.socket,
    *,
    name: str,
    host_ca: VerifyKeys,
    hostname: str,
    login: CertificateKey,
    now: Callable[[], float] = time.time,
    timeout: float = HANDSHAKE_TIMEOUT,
) -> Transport:
    """Log in to the relay behind ``sock``, whose host certificate must be for ``hostname``.

    Nothing is sent under our name before the host certificate is verified. ``name`` is the thread's. Raises
    AuthenticationError (it is not who it must be), RefusedError (it does not let us in) and
    UnavailableError; the socket is closed then.
    """
    transport = Transport(sock, name=name)
    try:
        _begin_lending(transport)
        _negotiate(transport, timeout)
        verify_host_certificate(_host_certificate(transport), host_ca, hostname=hostname, now=now())
        _log_in(transport, login)
    except BaseException:
        transport.close()
        raise
    transport.watch()
    return transport


def _begin_lending(transport: Transport) -> None:
    try:
        transport.packets.begin_lending()
    except OSError as error:
        raise UnavailableError(f"the system has no room for one more connection: {error.strerror}") from None


def _negotiate(transport: Transport, timeout: float) -> None:
    done = threading.Event()
    transport.start_client(event=done)
    if not done.wait(timeout):
        raise UnavailableError(f"the relay did not finish the key exchange in {timeout:.0f} s")
    if not transport.is_active():
        error = transport.get_exception()
        if isinstance(error, paramiko.SSHException) and not isinstance(error, EOFError):
            raise UnavailableError(f"no key exchange with the relay: {error}")
        raise UnavailableError(_CLOSED_EARLY)


def _host_certificate(transport: Transport) -> bytes:
    try:
        return transport.host_certificate()
    except paramiko.SSHException:  # it was lost this very moment
        raise UnavailableError(_CLOSED_EARLY) from None


def _log_in(transport: Transport, login: CertificateKey) -> None:
    try:
        transport.auth_publickey("pam", login)
    except paramiko.AuthenticationException as error:
        if not transport.is_active():  # a lost connection is an AuthenticationException, too
            raise UnavailableError(f"the relay closed the connection during login: {error}") from None
        raise RefusedError(f"the relay refused the certificate: {error}") from None
    except (paramiko.SSHException, EOFError, OSError) as error:
        reason = f": {error}" if str(error) else ""  # an EOFError has no words
        raise UnavailableError(f"the relay closed the connection during login{reason}") from None
    if not transport.is_authenticated():
        raise RefusedError("the relay wants more than a certificate")


def serve(
    sock: socket.socket, *, name: str, host_key: CertificateKey, server: paramiko.ServerInterface
) -> Transport:
    """Return a server transport that is not started yet: set its callbacks, then :func:`start`."""
    transport = Transport(sock, name=name)
    transport.add_server_key(host_key)
    transport.server_object = server
    return transport


def start(transport: Transport, server: paramiko.ServerInterface) -> None:
    """Begin the server's side in the transport's own thread and return at once."""
    transport.start_server(event=threading.Event(), server=server)


def open_direct(
    transport: Transport, gateway: str, *, origin: str = "127.0.0.1", timeout: float = CHANNEL_TIMEOUT
) -> ChannelStream:
    """Open a client's channel to ``gateway``. Raises RefusedError or UnavailableError."""
    return transport.open_stream("direct-tcpip", (gateway, 1), (origin, 0), timeout)


def open_forwarded(
    transport: Transport,
    gateway: str,
    slot: int,
    *,
    session: str,
    timeout: float = CHANNEL_TIMEOUT,
    window: int = WINDOW,
    packet: int = PACKET,
) -> ChannelStream:
    """Open the relay's channel down an agent's tunnel; the originator's address is the session's id.

    The agent may send ``window`` bytes at first, ``packet`` in each packet. Raises RefusedError or
    UnavailableError.
    """
    return transport.open_stream(
        "forwarded-tcpip", (gateway, slot), (session, 0), timeout, window=window, packet=packet
    )
