"""Logs in to the target with the account's credential: TLS, start-up, authentication, until it is ready.

https://www.postgresql.org/docs/current/protocol-flow.html#PROTOCOL-FLOW-START-UP
https://www.postgresql.org/docs/current/sasl-authentication.html
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from scramp import ScramClient, ScramException

from pam_agent.protocols.base import Credential, Target, TargetLoginError, TargetProtocolError
from pam_agent.protocols.postgres import codec
from pam_agent.target_tls import PlainTarget, TargetStream, TlsTarget, make_context
from pam_common.errors import PamError, UnavailableError

#: Longest message during a login. Real ones are below 1 kB; 64 KiB leaves room for a long error.
_MESSAGE_LIMIT: Final = 1 << 16
#: Messages until ready: about twenty settings, some notices. A target that sends more never finishes.
_MESSAGES_LIMIT: Final = 1000
#: One answer of the target during the login. Scanning for a free worker or a slow DNS take seconds.
ANSWER_SECONDS: Final = 30.0

_OK: Final = 0
_CLEARTEXT: Final = 3
_MD5: Final = 5
_SASL: Final = 10
_SASL_CONTINUE: Final = 11
_SASL_FINAL: Final = 12
_OTHER_METHODS: Final = {2: "Kerberos V5", 6: "SCM", 7: "GSSAPI", 9: "SSPI"}

_SCRAM: Final = ("SCRAM-SHA-256", "SCRAM-SHA-256-PLUS")
#: SQLSTATEs by which the target says that the credential is wrong (class 28).
_REFUSED: Final = ("28P01", "28000")


class TargetRefusalError(PamError):
    """The target's own error during the login (no such database, too many clients), as it said it."""

    def __init__(self, fields: Mapping[str, str]) -> None:
        super().__init__(fields.get("message", "the target refused"), hint=fields.get("hint", ""))
        self.sqlstate = fields.get("code", "08004")


@dataclass
class Login:
    """A target that is ready for queries. ``greeting`` are the ParameterStatus and notice messages for the
    client, ``rest`` what came behind ReadyForQuery."""

    stream: TargetStream
    version: int
    pid: int = 0
    secret: bytes = field(default=b"", repr=False)
    settings: dict[str, str] = field(default_factory=dict)
    greeting: bytearray = field(default_factory=bytearray)
    ready: bytes = b""
    rest: bytes = b""
    method: str = "trust"
    unsupported: list[str] = field(default_factory=list)


def secure(sock: socket.socket, target: Target, credential: Credential) -> TargetStream:
    """Bring the target's TLS policy about on a fresh socket. Raises PamError."""
    if target.tls.mode == "disable":
        return PlainTarget(sock)
    context = make_context(target, credential.client_key_pem)
    sock.sendall(codec.UINT32.pack(8) + codec.UINT32.pack(codec.SSL_REQUEST))
    # Two bytes are asked for to see whether somebody has put something between the answer and the
    # handshake (CVE-2021-23222); what comes later fails as TLS.
    answer = sock.recv(2)
    if answer == b"S":
        return TlsTarget(sock, context, target.tls.server_name or target.host)
    if answer[:1] == b"S":
        raise TargetProtocolError("the target sent unencrypted bytes before TLS")
    if answer == b"N":
        raise TargetLoginError(
            "the target does not offer TLS", hint="turn TLS on there, or set the resource's tls mode"
        )
    if not answer:
        raise UnavailableError("the target closed the connection")
    raise TargetProtocolError("the target answered the request for TLS with neither yes nor no")


def log_in(
    stream: TargetStream, credential: Credential, version: int, parameters: Mapping[str, str]
) -> Login:
    """Start up and authenticate; ``parameters`` without the user. Raises PamError without secrets."""
    stream.sendall(codec.startup(version, {"user": credential.user, **parameters}))
    return _Login(stream, credential, version).run()


class _Login:
    """One login. States: authenticating, then settling in until ReadyForQuery."""

    def __init__(self, stream: TargetStream, credential: Credential, version: int) -> None:
        self._stream = stream
        self._credential = credential
        self._buffer = bytearray()
        self._scram: ScramClient | None = None
        self._verified = False  # the target has proved that it knows the password
        self._authenticated = False
        self.login = Login(stream, version)

    def run(self) -> Login:
        for _ in range(_MESSAGES_LIMIT):
            kind, body = self._receive()
            if kind == "E":
                raise self._refusal(codec.parse_error(body))
            if kind == "N":
                self._greet(kind, body)
            elif not self._authenticated:
                self._authenticate(kind, body)
            elif kind == "Z":
                if len(body) != 1:
                    break
                self.login.ready = codec.message(b"Z", body)
                self.login.rest = bytes(self._buffer)
                return self.login
            else:
                self._settle(kind, body)
        raise TargetProtocolError("the target does not become ready after the login")

    def _receive(self) -> tuple[str, bytes]:
        self._fill(codec.HEADER_SIZE)
        kind, length = codec.HEADER.unpack_from(self._buffer)
        if not 4 <= length <= _MESSAGE_LIMIT:
            raise TargetProtocolError(f"the target sent a message of an impossible length: {length}")
        self._fill(length + 1)
        body = bytes(self._buffer[codec.HEADER_SIZE : length + 1])
        del self._buffer[: length + 1]
        return chr(kind), body

    def _fill(self, size: int) -> None:
        while len(self._buffer) < size:
            chunk = bytearray(16384)
            with memoryview(chunk) as view:
                try:
                    got = self._stream.recv_into(view)
                except TimeoutError:
                    raise UnavailableError("the target does not answer") from None
                if not got:
                    raise UnavailableError("the target closed the connection during the login")
                self._buffer += view[:got]

    def _greet(self, kind: str, body: bytes) -> None:
        if len(self.login.greeting) > _MESSAGE_LIMIT:
            raise TargetProtocolError("the target says too much before it is ready")
        self.login.greeting += codec.message(kind.encode("latin-1"), body)

    def _settle(self, kind: str, body: bytes) -> None:
        reader = codec.Reader(body, "login", TargetProtocolError)
        if kind == "S":
            name = reader.string().decode(errors="replace")
            self.login.settings[name] = reader.string().decode(errors="replace")
            self._greet(kind, body)
        elif kind == "K":
            self.login.pid = reader.uint32()
            if not 4 <= reader.left <= 256:
                raise TargetProtocolError("the target's cancel key has an impossible length")
            self.login.secret = reader.take(reader.left)
        else:
            raise TargetProtocolError(f"unexpected message {kind!r} before the target is ready")

    def _authenticate(self, kind: str, body: bytes) -> None:
        if kind == "v":
            self._negotiated(body)
            return
        if kind != "R":
            raise TargetProtocolError(f"unexpected message {kind!r} during authentication")
        reader = codec.Reader(body, "authentication", TargetProtocolError)
        method = reader.uint32()
        if method == _OK:
            if self._scram is not None and not self._verified:
                raise TargetProtocolError(
                    "the target skipped the end of SCRAM, which would prove its identity"
                )
            self._authenticated = True
        elif method in (_SASL, _SASL_CONTINUE, _SASL_FINAL):
            self._sasl(method, reader)
        elif self._scram is not None:
            raise TargetProtocolError("the target changed its mind about how to authenticate")
        elif method == _MD5:
            self._md5(reader.take(4))
        elif method == _CLEARTEXT:
            self._cleartext()
        else:
            name = _OTHER_METHODS.get(method, f"number {method}")
            raise TargetLoginError(
                f"the target asks for authentication by {name}, which is not supported",
                hint="let pg_hba.conf ask for scram-sha-256 or cert",
            )

    def _negotiated(self, body: bytes) -> None:
        """NegotiateProtocolVersion: the target knows an older protocol than was asked for."""
        reader = codec.Reader(body, "version negotiation", TargetProtocolError)
        version = reader.uint32()
        if not codec.VERSION_3_0 <= version <= self.login.version or version == codec.VERSION_3_0 + 1:
            raise TargetProtocolError("the target negotiates a protocol version that was not asked for")
        self.login.version = version

    def _password(self) -> str:
        password = self._credential.password
        if password is None:
            raise TargetLoginError(
                "the target asks for a password, but the account has none",
                hint="store a password for the account, or let pg_hba.conf ask for cert",
            )
        return password

    def _answer(self, data: bytes) -> None:
        self._stream.sendall(codec.message(b"p", data))

    def _cleartext(self) -> None:
        if self._stream.tls_version is None:
            raise TargetLoginError(
                "the target asks for the password in clear, without TLS",
                hint="turn on TLS for the resource, or let pg_hba.conf ask for scram-sha-256",
            )
        self.login.method = "password"
        self._answer(self._password().encode() + b"\0")

    def _md5(self, salt: bytes) -> None:
        """https://www.postgresql.org/docs/current/protocol-flow.html: AuthenticationMD5Password."""
        self.login.method = "md5"
        user = self._credential.user.encode()
        inner = hashlib.md5(self._password().encode() + user, usedforsecurity=False).hexdigest()
        outer = hashlib.md5(inner.encode() + salt, usedforsecurity=False).hexdigest()
        self._answer(b"md5" + outer.encode() + b"\0")

    def _sasl(self, step: int, reader: codec.Reader) -> None:
        try:
            if step == _SASL and self._scram is None:
                self._sasl_start(reader)
            elif step == _SASL_CONTINUE and self._scram is not None:
                self._scram.set_server_first(reader.take(reader.left).decode())
                self._answer(self._scram.get_client_final().encode())
            elif step == _SASL_FINAL and self._scram is not None:
                self._scram.set_server_final(reader.take(reader.left).decode())
                self._verified = True
            else:
                raise TargetProtocolError("the target's SASL messages come in a wrong order")
        except (ScramException, UnicodeDecodeError):
            # The exception's text is left out: it may quote parts of the exchange.
            raise TargetLoginError(
                "SCRAM with the target failed",
                hint="the target may not be the one that knows this password, or the password has "
                "characters that SASLprep forbids",
            ) from None

    def _sasl_start(self, reader: codec.Reader) -> None:
        offered = []
        while name := reader.string():
            offered.append(name.decode())
        known = [name for name in offered if name in _SCRAM]
        binding = self._stream.channel_binding
        if binding is None:
            known = [name for name in known if not name.endswith("-PLUS")]
        if not known:
            raise TargetLoginError("the target offers no SASL mechanism that is supported")
        # With TLS and no -PLUS on offer scramp says "y": a server that did offer it then knows that
        # somebody in the middle has struck it out.
        bound = ("tls-server-end-point", binding) if binding is not None else None
        self._scram = ScramClient(known, self._credential.user, self._password(), channel_binding=bound)
        self.login.method = self._scram.mechanism_name
        first = self._scram.get_client_first().encode()
        mechanism = self._scram.mechanism_name.encode() + b"\0"
        self._answer(mechanism + codec.UINT32.pack(len(first)) + first)

    def _refusal(self, fields: Mapping[str, str]) -> PamError:
        if fields.get("code") in _REFUSED:
            return TargetLoginError(
                "the target refused the account's credential",
                hint="ask an administrator to check the account's user, password or client certificate "
                "in the vault, and pg_hba.conf of the target",
            )
        return TargetRefusalError(fields)
