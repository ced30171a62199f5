"""Logins against scripted targets and clients: what a hostile one tries, without a server."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading

import pytest
from scramp import ScramMechanism

from pam_agent.protocols.base import (
    ClientProtocolError,
    Credential,
    Opening,
    Target,
    TargetLoginError,
    TargetProtocolError,
    TlsPolicy,
)
from pam_agent.protocols.postgres import PostgresInterceptor, codec, startup
from pam_agent.protocols.postgres.cancel import CancelKeys
from pam_agent.protocols.postgres.codec import CancelRequest, message
from pam_agent.protocols.postgres.login import TargetRefusalError, log_in, secure
from pam_common.errors import PamError, RefusedError, UnavailableError
from pam_common.stream import SocketStream

CREDENTIAL = Credential("app_ro", "hunter2")
OK = message(b"R", struct.pack("!I", 0))
READY = message(b"Z", b"I")
KEY = message(b"K", struct.pack("!I", 42) + b"abcd")
SETTING = message(b"S", b"server_version\x0015.1\0")


class Scripted:
    """A target that says one thing after another, each once the client has said something."""

    channel_binding = None
    tls_version = None

    def __init__(self, *says):
        self.says = list(says)
        self.heard = []
        self._pending = b""

    def sendall(self, data):
        self.heard.append(bytes(data))
        if self.says:
            say = self.says.pop(0)
            self._pending += say(self.heard[-1]) if callable(say) else say

    def recv_into(self, view):
        size = min(len(view), len(self._pending), 7)  # in small pieces
        view[:size] = self._pending[:size]
        self._pending = self._pending[size:]
        return size


def login(*says, version=codec.VERSION_3_0, credential=CREDENTIAL):
    target = Scripted(*says)
    return log_in(target, credential, version, {"database": "d"}), target


def test_postgres_login_trust_and_greeting():
    result, target = login(OK + SETTING + KEY + message(b"N", b"SNOTICE\0\0") + READY + b"more")
    assert target.heard == [codec.startup(codec.VERSION_3_0, {"user": "app_ro", "database": "d"})]
    assert (result.pid, result.secret, result.settings) == (42, b"abcd", {"server_version": "15.1"})
    assert result.greeting == SETTING + message(b"N", b"SNOTICE\0\0")
    assert result.ready == READY
    assert b"more".startswith(result.rest)  # as much as came along
    assert "abcd" not in repr(result)


def sasl(step, data):
    return message(b"R", struct.pack("!I", step) + data)


OFFER = sasl(10, b"SCRAM-SHA-256\0\0")


class ScramServer:
    """A target that knows ``password``."""

    def __init__(self, password="hunter2"):
        mechanism = ScramMechanism("SCRAM-SHA-256")
        auth = mechanism.make_auth_info(password)
        self.server = mechanism.make_server(lambda user: auth)

    def first(self, heard):
        assert heard[5:].startswith(b"SCRAM-SHA-256\0")
        self.server.set_client_first(heard[5 + 14 + 4 :].decode())
        return sasl(11, self.server.get_server_first().encode())

    def last(self, heard):
        self.server.set_client_final(heard[5:].decode())
        return sasl(12, self.server.get_server_final().encode()) + OK + READY


def test_postgres_login_scram():
    server = ScramServer()
    result, _ = login(OFFER, server.first, server.last)
    assert result.method == "SCRAM-SHA-256"


def test_postgres_login_scram_target_that_does_not_know_the_password():
    server = ScramServer()
    forged = sasl(12, b"v=" + b"A" * 43 + b"=") + OK + READY
    with pytest.raises(TargetLoginError, match="SCRAM with the target failed"):
        login(OFFER, server.first, forged)


@pytest.mark.parametrize("after", [1, 2])
def test_postgres_login_scram_ok_without_proof(after):
    server = ScramServer()
    script = [OFFER, server.first, OK + READY]
    if after == 1:
        script[1] = OK + READY
    with pytest.raises(TargetProtocolError, match="skipped the end of SCRAM"):
        login(*script)


@pytest.mark.parametrize(
    ("script", "kind"),
    [
        ([sasl(11, b"r=x")], TargetProtocolError),
        ([sasl(12, b"v=x")], TargetProtocolError),
        ([OFFER, OFFER], TargetProtocolError),
        ([OFFER, sasl(11, b"r=other,s=AAAAAAAAAAAAAAAAAAAAAA==,i=4096")], TargetLoginError),
        ([OFFER, sasl(11, b"r=x,s=AAAA,i=1")], TargetLoginError),
        ([OFFER, sasl(11, b"\xff\xfe")], TargetLoginError),
        ([OFFER, message(b"R", struct.pack("!I", 5) + b"salt")], TargetProtocolError),
        ([OFFER, message(b"R", struct.pack("!I", 3))], TargetProtocolError),
        ([sasl(10, b"SCRAM-SHA-1\0\0")], TargetLoginError),
        ([sasl(10, b"SCRAM-SHA-256-PLUS\0\0")], TargetLoginError),  # no TLS to bind to
        ([message(b"R", struct.pack("!I", 3))], TargetLoginError),
        ([message(b"R", struct.pack("!I", 7))], TargetLoginError),
        ([message(b"R", struct.pack("!I", 99))], TargetLoginError),
        ([message(b"R", b"\0")], TargetProtocolError),
        ([READY], TargetProtocolError),
        ([message(b"D", b"\0\0")], TargetProtocolError),
        ([OK + message(b"D", b"\0\0")], TargetProtocolError),
        ([OK + message(b"K", b"\0\0\0\1" + b"x" * 300)], TargetProtocolError),
        ([OK + OK], TargetProtocolError),
        ([OK + SETTING * 5000], TargetProtocolError),
        ([struct.pack("!cI", b"R", 3)], TargetProtocolError),
        ([struct.pack("!cI", b"R", 0xFFFFFFFF)], TargetProtocolError),
        ([message(b"v", struct.pack("!II", codec.VERSION_3_2, 0))], TargetProtocolError),
        ([message(b"v", struct.pack("!II", 2 << 16, 0))], TargetProtocolError),
        ([b""], UnavailableError),
        ([OK], UnavailableError),
    ],
)
def test_postgres_login_hostile_targets(script, kind):
    with pytest.raises(kind) as caught:
        login(*script)
    assert "hunter2" not in str(caught.value) + caught.value.hint


def test_postgres_login_negotiates_down_only():
    down = message(b"v", struct.pack("!II", codec.VERSION_3_0, 0))
    result, _ = login(down + OK + READY, version=codec.VERSION_3_2)
    assert result.version == codec.VERSION_3_0


def test_postgres_login_errors():
    with pytest.raises(TargetLoginError, match="refused the account's credential"):
        login(codec.error_response("28P01", 'password authentication failed for user "app_ro"'))
    with pytest.raises(TargetRefusalError, match="does not exist") as caught:
        login(codec.error_response("3D000", 'database "d" does not exist'))
    assert caught.value.sqlstate == "3D000"
    with pytest.raises(TargetLoginError, match="the account has none"):
        login(OFFER, credential=Credential("app_ro"))


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"N", TargetLoginError),
        (b"Sx", TargetProtocolError),
        (b"E", TargetProtocolError),
        (b"Nx", TargetProtocolError),
        (b"", UnavailableError),
        (b"S", TargetLoginError),
    ],
)
def test_postgres_tls_answers(answer, kind):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(answer)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(kind):
            secure(ours, Target("db", 5432, TlsPolicy("require")), CREDENTIAL)
        assert theirs.recv(8) == struct.pack("!II", 8, codec.SSL_REQUEST)


# --- the client's start ----------------------------------------------------------------------------------


def opening(**fields):
    return Opening(
        session="s-" + "a" * 26,
        part=1,
        user="alice",
        account="prod-db/readonly",
        protocol="postgres",
        session_end=2**31,
        idle_limit=0,
        target=Target("127.0.0.1", 1, TlsPolicy("disable")),
        credential=CREDENTIAL,
        **fields,
    )


def asked(**parameters):
    version = parameters.pop("version", codec.VERSION_3_0)
    return codec.Startup(version, parameters)


def test_postgres_narrow_replaces_the_identity():
    request = startup.narrow(
        asked(user="super", password="x", database="d", application_name="a", options="-c role=x"), opening()
    )
    assert request.parameters == {"database": "d", "application_name": "a", "options": "-c role=x"}


@pytest.mark.parametrize("name", ["App", "app ", " app", "app\u200b", "аpp", "app" + "x" * 60, "", "b,app"])
def test_postgres_narrow_compares_databases_exactly(name):
    if not name:
        assert startup.narrow(asked(user="u", database=name), opening(databases=("app",))).database == "app"
        return
    with pytest.raises(RefusedError, match="is not open to"):
        startup.narrow(asked(user="u", database=name), opening(databases=("app", "b")))


@pytest.mark.parametrize(
    ("value", "allowed", "passes"),
    [
        ("database", True, True),
        ("true", True, True),
        ("maybe", True, False),
        ("database", False, False),
        ("true", False, False),
        ("TRUE", False, False),
        ("t", False, False),
        ("false", False, True),
    ],
)
def test_postgres_narrow_replication(value, allowed, passes):
    startup_ = asked(user="u", database="app", replication=value)
    if passes:
        request = startup.narrow(startup_, opening(allow_replication=allowed))
        assert request.parameters.get("replication") == (value if allowed else None)
    else:
        with pytest.raises(RefusedError):
            startup.narrow(startup_, opening(allow_replication=allowed))


def test_postgres_narrow_no_database_is_open():
    with pytest.raises(RefusedError, match="not open"):
        startup.narrow(asked(user="u"), opening(databases=()))


SSL = struct.pack("!II", 8, codec.SSL_REQUEST)
GSS = struct.pack("!II", 8, codec.GSSENC_REQUEST)
START = codec.startup(codec.VERSION_3_0, {"user": "u"})


def read(*parts):
    """What ``startup.read`` makes of a client that waits for each answer."""
    ours, theirs = socket.socketpair()

    def talk():
        with contextlib.suppress(OSError):
            for part in parts:
                theirs.sendall(part)
                if part[:8] in (SSL, GSS):
                    theirs.recv(1)
            theirs.shutdown(socket.SHUT_WR)

    with ours, theirs:
        ours.settimeout(60)
        thread = threading.Thread(target=talk)
        thread.start()
        try:
            return startup.read(SocketStream(ours))
        finally:
            ours.shutdown(socket.SHUT_RDWR)
            thread.join()


def test_postgres_startup_encryption_is_declined_once_each():
    for parts in ([START], [SSL, START], [GSS, START], [SSL, GSS, START], [GSS, SSL, START]):
        assert read(*parts) == (codec.Startup(codec.VERSION_3_0, {"user": "u"}), b"")
    assert read() is None
    with pytest.raises(ClientProtocolError, match="twice"):
        read(SSL, SSL, START)


@pytest.mark.parametrize("parts", [[SSL + START], [GSS + b"x"], [SSL, GSS + START]])
def test_postgres_startup_bytes_behind_an_encryption_request(parts):
    with pytest.raises(ClientProtocolError, match="before its answer"):
        read(*parts)


@pytest.mark.parametrize(
    "data", [b"\0\0\0\4", b"\xff" * 8, b"\x16\3\1\2\0\1", struct.pack("!I", 10_001), START[:-1], b"\0\0"]
)
def test_postgres_startup_lengths(data):
    with pytest.raises(ClientProtocolError):
        read(data)


def test_postgres_refuse_speaks_the_protocol():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(START)
        PostgresInterceptor.refuse(SocketStream(ours), "the grant has expired", "connect again")
        answer = codec.parse_error(theirs.recv(1000)[5:])
    assert (answer["message"], answer["hint"]) == ("the grant has expired", "connect again")
    assert answer["severity"] == "FATAL"


# --- cancel keys -----------------------------------------------------------------------------------------


def test_postgres_cancel_keys():
    keys = CancelKeys()
    first = keys.issue(7, b"real", codec.VERSION_3_0)
    second = keys.issue(7, b"r" * 32, codec.VERSION_3_2)
    assert (len(first.secret), len(second.secret)) == (4, 32)
    assert keys.find(first) == CancelRequest(7, b"real")
    assert keys.find(second) == CancelRequest(7, b"r" * 32)
    assert keys.find(CancelRequest(7, b"real")) is None
    assert keys.find(CancelRequest(8, first.secret)) is None
    assert keys.find(CancelRequest(7, second.secret[:4])) is None
    keys.withdraw(first)
    assert keys.find(first) is None


class Silent:
    """A Conversation whose target is a scripted socket, or none."""

    number = 1
    end_reason = None

    def __init__(self, target):
        self.target = target
        self.events = []

    def record(self, events):
        self.events += events

    def dial(self):
        if self.target is None:
            raise UnavailableError("no way to the target", hint="wait")
        return self.target

    def touch(self):
        pass


def test_postgres_dial_failure_is_told_in_the_protocol():
    ours, theirs = socket.socketpair()
    conversation = Silent(None)
    with ours, theirs:
        theirs.sendall(START)
        with pytest.raises(PamError):
            PostgresInterceptor(opening()).serve(SocketStream(ours), conversation)
        answer = codec.parse_error(theirs.recv(1000)[5:])
    assert (answer["code"], answer["message"], answer["hint"]) == ("08001", "no way to the target", "wait")
    assert conversation.events == [{"kind": "refused", "reason": "no way to the target"}]


def test_postgres_target_that_sends_garbage_after_the_login():
    """The other side is told; nothing of the garbage is forwarded."""
    client, near = socket.socketpair()
    target, far = socket.socketpair()
    with client, near, target, far:
        client.sendall(START)
        far.sendall(OK + KEY + READY + b"R\0\0\0\x08\0\0\0\5")
        with pytest.raises(TargetProtocolError):
            PostgresInterceptor(opening()).serve(SocketStream(near), Silent(target))
        near.shutdown(socket.SHUT_RDWR)
        got = b""
        while part := client.recv(4096):
            got += part
    assert got.startswith(OK)
    assert b"abcd" not in got
    assert b"C08P01" in got
    assert b"\0\0\0\5" not in got.partition(b"I")[2][:9]
