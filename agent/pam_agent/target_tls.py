"""TLS towards the target, usable by two threads at once.

OpenSSL forbids reading and writing one connection in two threads at a time, which Python's blocking
``SSLSocket`` does not prevent (and some 3.13 releases dead-lock on). So the bytes go through memory: a lock
around each TLS operation, the socket's calls outside of it. That also leaves the socket that the session
dialled in place, so that its ``abort`` works.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
import threading
from typing import Final, Protocol, cast

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from pam_agent.protocols.base import Target, TargetLoginError, TargetProtocolError
from pam_common.buffer import ReadBuffer
from pam_common.stream import Data

#: What one socket read takes in: a few TLS records of 16 KiB each.
_CHUNK: Final = 1 << 17


class TargetStream(Protocol):
    """What a protocol needs of its target, with TLS or without."""

    channel_binding: bytes | None
    tls_version: str | None

    def fileno(self) -> int:
        """The socket's, to wait for."""

    @property
    def pending(self) -> bool:
        """Whether bytes or the end came and were not given out: waiting for the socket would miss them."""

    def release(self) -> None:
        """Give memory back that reading took, when nothing is pending."""

    def recv_into(self, view: memoryview, /) -> int:
        """Read at least one byte into ``view``; 0 at the end."""

    def recv_soon(self, view: memoryview, /) -> int | None:
        """The same without waiting: None when there is nothing yet."""

    def quiet(self, seconds: float, /) -> bool:
        """Wait until there is something to read, or ``seconds`` have passed: then True."""

    def sendall(self, data: Data, /) -> None: ...

    def send_soon(self, data: Data, /) -> Data:
        """Send what goes without waiting, and return what is left, as :meth:`send_rest` takes it. A target
        that is gone takes nothing."""

    def send_rest(self, left: Data, /) -> None: ...

    def end_sending(self) -> None:
        """Half-close: the target reads the end, its last answers still come."""

    def abort(self) -> None:
        """End both directions at once, from any thread."""


class PlainTarget:
    """A TCP socket as it is."""

    channel_binding: bytes | None = None
    tls_version: str | None = None

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def pending(self) -> bool:
        return False

    def release(self) -> None:
        """There is none."""

    def recv_into(self, view: memoryview) -> int:
        return self._socket.recv_into(view)

    def recv_soon(self, view: memoryview) -> int | None:
        try:
            return self._socket.recv_into(view, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None

    def quiet(self, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return not poll.poll(seconds * 1000)

    def sendall(self, data: Data) -> None:
        self._socket.sendall(data)

    def send_soon(self, data: Data) -> Data:
        try:
            sent = self._socket.send(data, socket.MSG_DONTWAIT)
        except OSError:
            sent = 0  # full, or gone: send_rest finds out
        return data[sent:]

    def send_rest(self, left: Data) -> None:
        self._socket.sendall(left)

    def end_sending(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def abort(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)


class TlsTarget(PlainTarget):
    """A TCP socket with TLS on it. ``channel_binding`` is tls-server-end-point (RFC 5929)."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, server_name: str) -> None:
        """Shake hands. Raises TargetLoginError if the target's certificate is not what it must be."""
        super().__init__(sock)
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=server_name)
        self._lock = threading.Lock()
        self._at_end = False
        self._memory = ReadBuffer(_CHUNK)
        self._handshake()
        self.tls_version = self._tls.version()
        certificate = self._tls.getpeercert(binary_form=True)
        self.channel_binding = _end_point(certificate) if certificate else None

    def _handshake(self) -> None:
        try:
            while True:
                try:
                    self._tls.do_handshake()
                    return
                except ssl.SSLWantReadError:
                    self._flush()
                    self._fill()
                finally:
                    self._flush()  # the last flight, or the alert that says why not
        except ssl.SSLCertVerificationError as error:
            raise TargetLoginError(
                f"the target's certificate is refused: {error.verify_message}",
                hint="check the resource's tls settings: mode, ca and server_name",
            ) from None
        except ssl.SSLError as error:
            raise TargetLoginError(f"no TLS with the target: {error.reason or 'handshake failed'}") from None

    def _flush(self) -> None:
        if self._outgoing.pending:
            self._socket.sendall(self._outgoing.read())

    def _fill(self, flags: int = 0) -> None:
        size = self._socket.recv_into(self._memory.view, 0, flags)
        self._memory.note(size)
        with self._lock:
            if size:
                self._incoming.write(self._memory.view[:size])
            else:
                self._incoming.write_eof()

    def recv_into(self, view: memoryview) -> int:
        while True:
            size = self._decrypt(view)
            if size is not None:
                return size
            self._fill()

    def recv_soon(self, view: memoryview) -> int | None:
        size = self._decrypt(view)
        if size is None:
            # Once: a target could go on and on with records that hold nothing.
            with contextlib.suppress(BlockingIOError):
                self._fill(socket.MSG_DONTWAIT)
                size = self._decrypt(view)
        return size

    @property
    def pending(self) -> bool:
        with self._lock:
            return self._at_end or bool(self._incoming.pending or self._tls.pending())

    def release(self) -> None:
        self._memory.release()

    def quiet(self, seconds: float) -> bool:
        if self.pending or not super().quiet(seconds):
            return False
        self.release()
        return True

    def _decrypt(self, view: memoryview) -> int | None:
        """Records that have arrived, up to the view's size; None if none has. 0 at the end.

        An end without close_notify is an end too: protocols say themselves where a message ends (PostgreSQL
        by its Terminate or a FATAL error, HTTP by a length or chunks), and many servers just close.
        """
        size = 0
        with self._lock:
            while size < len(view):
                try:
                    # One call gives one record, 16 KiB at most.
                    got = self._tls.read(len(view) - size, view[size:])
                except ssl.SSLWantReadError:
                    return size or None
                except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                    self._at_end = True  # told by the next call, if data came before it
                    return size
                except ssl.SSLError as error:
                    raise TargetProtocolError(f"TLS with the target broke: {error.reason}") from None
                if not got:
                    self._at_end = True
                    return size
                size += cast(int, got)  # a count, as a buffer is given
        return size

    def send_soon(self, data: Data) -> Data:
        with memoryview(data) as view, self._lock:
            position = 0
            while position < len(view):
                position += self._tls.write(view[position:])
            sealed = self._outgoing.read()
        return super().send_soon(sealed)

    def sendall(self, data: Data) -> None:
        with memoryview(data) as view:
            position = 0
            while position < len(view):
                with self._lock:
                    # Memory never refuses, so each call takes all it is given: one record.
                    position += self._tls.write(view[position : position + _CHUNK])
                    sealed = self._outgoing.read()
                # Only one thread sends, so the order is kept without the lock.
                self._socket.sendall(sealed)


def _end_point(certificate: bytes) -> bytes | None:
    """The digest of the certificate by its own signature's hash; None where RFC 5929 names none."""
    algorithm = x509.load_der_x509_certificate(certificate).signature_hash_algorithm
    if algorithm is None:  # Ed25519
        return None
    if isinstance(algorithm, (hashes.MD5, hashes.SHA1)):
        algorithm = hashes.SHA256()
    digest = hashes.Hash(algorithm)
    digest.update(certificate)
    return digest.finalize()


def make_context(target: Target, client_key_pem: str | None) -> ssl.SSLContext:
    """The TLS policy of a target. Raises TargetLoginError for certificates and keys that cannot be loaded."""
    policy = target.tls
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.check_hostname = policy.mode == "verify-full"
    if policy.mode == "require" and policy.ca_pem is None:
        context.verify_mode = ssl.CERT_NONE
    try:
        if policy.ca_pem is not None:
            context.load_verify_locations(cadata=policy.ca_pem)
        elif policy.mode in ("verify-ca", "verify-full"):
            context.load_default_certs(ssl.Purpose.SERVER_AUTH)
        if policy.client_cert_pem is not None and client_key_pem is not None:
            _load_client_certificate(context, policy.client_cert_pem, client_key_pem)
    except (ssl.SSLError, ValueError):
        # The exception's text is left out: it may quote what it could not read.
        raise TargetLoginError(
            "the CA, client certificate or key for the target cannot be loaded",
            hint="ask an administrator to check the resource's tls settings and the account's key",
        ) from None
    return context


def _load_client_certificate(context: ssl.SSLContext, certificate: str, key: str) -> None:
    """``ssl`` reads keys from files only; this one is in memory, without a name, for these few lines."""
    descriptor = os.memfd_create("client-certificate", os.MFD_CLOEXEC)
    try:
        os.fchmod(descriptor, 0o600)
        os.write(descriptor, f"{key.rstrip()}\n{certificate.rstrip()}\n".encode())
        # A password callback, lest OpenSSL asks for one on a terminal.
        context.load_cert_chain(f"/proc/self/fd/{descriptor}", password=lambda: "")
    finally:
        os.close(descriptor)
