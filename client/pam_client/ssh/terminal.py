"""A small SSH client, for machines that have none: a shell or a command, nothing else.

verify the host certificate ─▶ "none" ─▶ session channel ─▶ pty-req? ─▶ shell | exec
stdin ─▶ channel      (a thread; its end is the channel's EOF)
channel ─▶ stdout     (the caller's thread)
channel ─▶ stderr     (a thread)
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING

import paramiko

from pam_client.ssh import known_hosts, options
from pam_common.errors import AuthenticationError, UnavailableError
from pam_common.keys import VerifyKeys
from pam_common.ssh_certs import CERT_TYPE, verify_host_certificate

if TYPE_CHECKING:
    from pam_client.launch.base import Place

#: Key exchange and login: the agent opens the session and logs in to the server meanwhile.
LOGIN_TIMEOUT = 60.0
#: As ssh exits when the server does not say how the program ended.
NO_STATUS = 255
#: One read; what one SSH packet of paramiko holds.
_CHUNK = 32 << 10


class _Transport(paramiko.Transport):
    """Takes a host certificate and no plain host key."""

    @property
    def preferred_keys(self) -> tuple[str, ...]:
        return (CERT_TYPE,)


def run(place: Place, command: Sequence[str], terminal: bool) -> int:
    """A shell, or ``command`` on the server; returns its exit code. As ``native.run``."""
    with (
        contextlib.closing(_log_in(place)) as transport,
        contextlib.closing(transport.open_session()) as channel,
    ):
        if sys.stdin.isatty() and (terminal or not command):
            with _raw_terminal(channel):
                return _converse(channel, command)
        return _converse(channel, command)


def _log_in(place: Place) -> paramiko.Transport:
    """Raises UnavailableError or AuthenticationError; nothing was sent to a server that is not verified."""
    assert place.trust is not None
    transport = _Transport(_connect(place))
    try:
        transport.start_client(timeout=LOGIN_TIMEOUT)
        _verify(transport, known_hosts.read(place.trust), options.alias(place.gateway))
        transport.auth_timeout = LOGIN_TIMEOUT
        transport.auth_none(place.user)
    except paramiko.AuthenticationException:
        transport.close()
        raise AuthenticationError("the gateway asks for a login, which it must not") from None
    except (paramiko.SSHException, OSError, EOFError) as error:
        transport.close()
        raise UnavailableError(f"the SSH connection failed: {error or type(error).__name__}") from None
    except BaseException:
        transport.close()
        raise
    return transport


def _verify(transport: paramiko.Transport, ca: VerifyKeys, hostname: str) -> None:
    blob = getattr(transport.get_remote_server_key(), "public_blob", None)
    try:
        verify_host_certificate(
            blob.key_blob if blob is not None else b"", ca, hostname=hostname, now=time.time()
        )
    except AuthenticationError as error:
        raise AuthenticationError(f"host key verification failed: {error}", hint=error.hint) from None


def _connect(place: Place) -> socket.socket:
    if not place.host.startswith("/"):
        return socket.create_connection((place.host, place.port), timeout=LOGIN_TIMEOUT)
    local = socket.socket(socket.AF_UNIX)
    local.connect(f"{place.host}/.s.SSH.{place.port}")
    return local


@contextlib.contextmanager
def _raw_terminal(channel: paramiko.Channel) -> Iterator[None]:
    """The channel has a terminal like ours, which follows its size; ours passes every key on."""
    size = shutil.get_terminal_size()
    channel.get_pty(os.environ.get("TERM", "vt100"), size.columns, size.lines)

    def resized(_number: int, _frame: FrameType | None) -> None:
        # Not in the handler itself: the main thread may hold the transport's lock.
        size = shutil.get_terminal_size()
        threading.Thread(target=_resize, args=(channel, size.columns, size.lines), daemon=True).start()

    before = termios.tcgetattr(0)
    former = signal.signal(signal.SIGWINCH, resized)
    try:
        tty.setraw(0)
        yield
    finally:
        signal.signal(signal.SIGWINCH, former)
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def _resize(channel: paramiko.Channel, columns: int, rows: int) -> None:
    with contextlib.suppress(paramiko.SSHException, OSError):
        channel.resize_pty(columns, rows)


def _converse(channel: paramiko.Channel, command: Sequence[str]) -> int:
    if command:
        channel.exec_command(" ".join(command))  # as ssh itself: the server's shell reads it
    else:
        channel.invoke_shell()
    threading.Thread(target=_feed, args=(channel,), name="stdin", daemon=True).start()
    errors = threading.Thread(target=_drain, args=(channel.recv_stderr, 2), name="stderr", daemon=True)
    errors.start()
    _drain(channel.recv, 1)
    errors.join()
    status = channel.recv_exit_status()
    return status if status >= 0 else NO_STATUS


def _feed(channel: paramiko.Channel) -> None:
    with contextlib.suppress(OSError, paramiko.SSHException):
        while data := os.read(0, _CHUNK):
            channel.sendall(data)
        channel.shutdown_write()


def _drain(receive: Callable[[int], bytes], sink: int) -> None:
    with contextlib.suppress(OSError):
        while data := receive(_CHUNK):
            view = memoryview(data)
            while view:
                view = view[os.write(sink, view) :]
