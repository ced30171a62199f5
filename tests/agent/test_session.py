"""Sessions and their registry: opened once, joined with one key, ended by time, idleness and order."""

from __future__ import annotations

import ctypes
import gc
import socket
import threading
import time
import weakref
from types import SimpleNamespace

import pytest
from patience import Metronome

from pam_agent import session as session_module
from pam_agent.config import Limits
from pam_agent.protocols.base import Credential, Opening, Target, TargetIdentityError
from pam_agent.registry import SessionRegistry
from pam_agent.session import ENDED, IDLE, STOPPING, killed
from pam_agent.target import TargetRules
from pam_common.errors import PamError, RefusedError
from pam_common.keys import new_session_id
from pam_common.stream import SocketStream
from pam_common.tokens import Grant


class FakeClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class ListPart:
    """A recording in memory; ``full`` makes it fail."""

    def __init__(self) -> None:
        self.events: list[object] = []
        self.end: str | None = None
        self.full = False

    def record(self, connection, events) -> None:
        if self.end is not None or self.full:
            raise PamError("the disk is full")
        self.events.append((connection, list(events)))

    def finalise(self, end: str) -> None:
        self.end = end


class Scripted:
    """An Interceptor that does what the test says; ``refused`` collects its refusals."""

    script = staticmethod(lambda client, conversation: client.recv(1))
    refused: list[str]

    def __init__(self, opening: Opening) -> None:
        self.opening = opening

    def serve(self, client, conversation) -> None:
        type(self).script(client, conversation)

    @classmethod
    def refuse(cls, client, message: str, hint: str) -> None:
        cls.refused.append(message)


@pytest.fixture
def world(wait_until, monkeypatch):
    """A registry with a fake clock, a scripted protocol and a counting opener."""
    monkeypatch.setattr(session_module, "LAST_WORDS", 0.05)
    protocol = type("Protocol", (Scripted,), {"refused": []})
    state = SimpleNamespace(
        protocol=protocol,
        opened=[],
        reports=[],
        parts=[],
        alarms=[],
        clock=FakeClock(),
        pairs=[],
        threads=[],
        port=1,
        gate=None,
    )

    def opener(grant, on_failure):
        state.opened.append(grant.session)
        if state.gate is not None:
            state.gate.wait(60)
        if isinstance(getattr(state, "failure", None), Exception):
            raise state.failure
        opening = Opening(
            session=grant.session,
            part=1,
            user=grant.user,
            account=grant.account,
            protocol=grant.protocol,
            session_end=grant.session_end,
            idle_limit=grant.idle_limit,
            target=Target("127.0.0.1", state.port),
            credential=Credential("app", "s3cret-word"),
        )
        state.parts.append(ListPart())
        return opening, protocol(opening), state.parts[-1]

    def registry(**limits):
        return SessionRegistry(
            protocols={"scripted": protocol},
            limits=Limits(**limits),
            rules=lambda: TargetRules.parse(["127.0.0.1:*"]),
            opener=opener,
            report=lambda session, report: state.reports.append((session, report)),
            alarm=lambda session, reason: state.alarms.append((session, reason)),
            platform_now=lambda: 5000.0 + state.clock.now,
            clock=state.clock,
        )

    def grant(**changes):
        fields = {
            "session": new_session_id(),
            "user": "alice",
            "gateway": "dc1",
            "account": "prod-db/readonly",
            "protocol": "scripted",
            "client_key": b"\1" * 32,
            "expires": 6100,
            "session_end": 7000,
            "idle_limit": 0,
        }
        return Grant(**{**fields, **changes})

    def connect(grant, registry=None):
        """Serve one connection in a thread; the client's end of its stream."""
        near, far = socket.socketpair()
        stream = SocketStream(far)
        stream.send_error = lambda message: stream.sendall(message.encode())
        state.pairs += [near, far]
        near.settimeout(60)

        def serve() -> None:
            (registry or state.registry).serve(grant, stream)
            stream.abort()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        state.threads.append(thread)
        return SimpleNamespace(sock=near, thread=thread, far=far)

    state.make_registry, state.grant, state.connect = registry, grant, connect
    state.registry = registry()
    yield state
    state.registry.end_all(STOPPING)
    wait_until(lambda: not len(state.registry), "the sessions' end")
    for thread in state.threads:
        thread.join(60)
    for sock in state.pairs:
        sock.close()


def live(world) -> int:
    return sum(status["connections"] for status in world.registry.status())


# -- opening -------------------------------------------------------------------------------------------


def test_connections_that_arrive_together_share_one_opening(world, wait_until) -> None:
    world.gate = threading.Event()
    grant = world.grant()
    connections = [world.connect(grant) for _ in range(50)]
    wait_until(lambda: world.opened, "the opening")
    world.gate.set()
    wait_until(lambda: live(world) == 50, "all connections")
    assert world.opened == [grant.session]
    for connection in connections:
        connection.sock.close()
    wait_until(lambda: live(world) == 0, "their end")


def test_all_who_wait_get_the_same_refusal_and_may_try_again(world, wait_until) -> None:
    world.gate, world.failure = threading.Event(), RefusedError("not today")
    grant = world.grant()
    connections = [world.connect(grant) for _ in range(5)]
    wait_until(lambda: world.opened, "the opening")
    time.sleep(0.1)
    world.gate.set()
    for connection in connections:
        connection.thread.join(60)
    assert set(world.protocol.refused) == {"not today"}
    assert len(world.registry) == 0
    world.failure = None
    world.connect(grant)
    wait_until(lambda: live(world) == 1, "the second try")


def test_a_fault_while_opening_is_told_without_its_details(world) -> None:
    world.failure = ZeroDivisionError("s3cret-word")
    world.connect(world.grant()).thread.join(60)
    assert world.protocol.refused == ["the agent failed to open the session"]


def test_another_key_does_not_join(world, wait_until) -> None:
    grant = world.grant()
    world.connect(grant)
    wait_until(lambda: live(world) == 1, "the session")
    world.connect(world.grant(session=grant.session, client_key=b"\2" * 32)).thread.join(60)
    assert world.protocol.refused == ["the grant was made for another client key"]


def test_another_account_does_not_join(world, wait_until) -> None:
    grant = world.grant()
    world.connect(grant)
    wait_until(lambda: live(world) == 1, "the session")
    world.connect(world.grant(session=grant.session, account="prod-db/owner")).thread.join(60)
    assert world.protocol.refused == ["the grant is for another account than its session"]


def test_a_late_grant_joins_an_open_session(world, wait_until) -> None:
    grant = world.grant(expires=6010)
    world.connect(grant)
    wait_until(lambda: live(world) == 1, "the session")
    world.clock.now += 20
    world.connect(grant)
    wait_until(lambda: live(world) == 2, "the second connection")
    assert world.opened == [grant.session]


def test_limits_are_told(world, wait_until) -> None:
    world.registry = world.make_registry(sessions=1, connections=3, connections_per_session=2)
    grant = world.grant()
    world.connect(grant)
    wait_until(lambda: live(world) == 1, "the session")
    world.connect(world.grant()).thread.join(60)
    world.connect(grant)
    wait_until(lambda: live(world) == 2, "the second connection")
    world.connect(grant).thread.join(60)
    assert world.protocol.refused == [
        "the agent has no room for more sessions",
        "the session already has 2 connections",
    ]


def test_an_unknown_protocol_is_told(world) -> None:
    connection = world.connect(world.grant(protocol="gopher"))
    assert b"does not speak gopher" in connection.sock.recv(200)
    assert world.opened == []


# -- ends ----------------------------------------------------------------------------------------------


def test_a_session_expires_by_the_clock(world, wait_until) -> None:
    world.connect(world.grant(session_end=6500))
    wait_until(lambda: live(world) == 1, "the session")
    world.clock.now += 499
    world.registry.tick()
    assert len(world.registry) == 1
    world.clock.now += 1
    world.registry.tick()
    wait_until(lambda: world.reports, "the end")
    assert world.reports[0][1]["reason"] == "expired"
    assert world.parts[0].end == "expired"


def test_a_session_is_idle_when_all_its_connections_are(world, wait_until) -> None:
    busy = threading.Event()

    def script(client, conversation) -> None:
        while data := client.recv(1):
            if data == b"t":
                conversation.touch()
                busy.set()

    world.protocol.script = staticmethod(script)
    grant = world.grant(idle_limit=60)
    first = world.connect(grant)
    world.connect(grant)
    wait_until(lambda: live(world) == 2, "both")
    world.clock.now += 50
    first.sock.sendall(b"t")
    assert busy.wait(60)
    world.clock.now += 50
    world.registry.tick()
    assert world.registry.status()[0]["state"] == "open"
    world.clock.now += 10
    world.registry.tick()
    wait_until(lambda: world.reports, "the end")
    assert world.reports[0][1]["reason"] == IDLE.code


def test_grace_without_the_platform(world, wait_until) -> None:
    world.connect(world.grant())
    wait_until(lambda: live(world) == 1, "the session")
    world.registry.tick(silent=10, grace=10)
    assert world.registry.status()[0]["state"] == "open"
    world.registry.tick(silent=11, grace=10)
    wait_until(lambda: world.reports, "the end")
    assert world.reports[0][1]["reason"] == "unauthorised"


def test_an_ended_session_stays_ended_until_no_grant_can_be_shown(world, wait_until) -> None:
    grant = world.grant()
    world.connect(grant)
    wait_until(lambda: live(world) == 1, "the session")
    world.registry.end(grant.session, ENDED)
    wait_until(lambda: world.reports, "the end")
    world.connect(grant).thread.join(60)
    assert world.protocol.refused == [ENDED.message]
    assert world.opened == [grant.session]
    assert len(world.registry._over) == 1
    world.clock.now += 1100
    world.registry.tick()
    assert len(world.registry._over) == 0


def test_a_kill_that_comes_first_keeps_the_session_shut(world) -> None:
    grant = world.grant()
    world.registry.end(grant.session, killed("by bob"))
    world.connect(grant).thread.join(60)
    assert world.protocol.refused == ["the session was killed: by bob"]
    assert world.opened == []


def test_a_kill_while_opening_lets_nobody_in(world, wait_until) -> None:
    world.gate = threading.Event()
    grant = world.grant()
    connection = world.connect(grant)
    wait_until(lambda: world.opened, "the opening")
    world.registry.end(grant.session, killed(""))
    world.gate.set()
    connection.thread.join(60)
    wait_until(lambda: world.reports, "the end")
    assert world.protocol.refused == ["the session was killed"]
    assert world.parts[0].end == "killed"


def test_a_recording_that_fails_ends_the_session(world, wait_until) -> None:
    raised = []

    def script(client, conversation) -> None:
        world.parts[0].full = True
        try:
            conversation.record([{"kind": "query"}])
        except PamError as error:
            raised.append(str(error))
            raise

    world.protocol.script = staticmethod(script)
    world.connect(world.grant())
    wait_until(lambda: world.reports, "the end")
    assert (raised, world.reports[0][1]["reason"]) == (["the disk is full"], "recording-failed")


def test_nothing_is_recorded_after_the_end(world, wait_until) -> None:
    held = []

    def script(client, conversation) -> None:
        held.append(conversation)
        client.recv(1)

    world.protocol.script = staticmethod(script)
    grant = world.grant()
    world.connect(grant)
    wait_until(lambda: held, "the connection")
    world.registry.end(grant.session, ENDED)
    wait_until(lambda: world.reports, "the end")
    with pytest.raises(RefusedError):
        held[0].record([{"kind": "query"}])
    with pytest.raises(RefusedError):
        held[0].dial()


def test_a_standstill_takes_no_last_words(world, wait_until, monkeypatch) -> None:
    """Who has the words to say gets its time when the whole process stood still for longer than that."""
    monkeypatch.setattr(session_module, "LAST_WORDS", 0.5)
    over = threading.Event()

    def script(client, conversation) -> None:
        over.wait(60)
        time.sleep(0.1)  # its own work
        client.sendall(b"words")

    world.protocol.script = staticmethod(script)
    grant = world.grant()
    connection = world.connect(grant)
    wait_until(lambda: live(world) == 1, "the session")
    world.registry.end(grant.session, ENDED)
    time.sleep(0.05)  # so that its end is waited for
    ctypes.PyDLL(None).usleep(800_000)  # with the interpreter's lock held: no thread runs
    over.set()
    assert connection.sock.recv(100) == b"words"


# -- a kill, wherever the connection is blocked --------------------------------------------------------


@pytest.fixture
def black_hole():
    """A target that accepts into its backlog and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=16) as listener:
        yield listener.getsockname()[1]


@pytest.fixture
def unreachable():
    """A target whose backlog is full, so a connect hangs."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(server.getsockname())
        yield server.getsockname()[1]
        for filler in fillers:
            filler.close()


def blocked_in_dial(client, conversation) -> None:
    conversation.dial()


def blocked_in_target_recv(client, conversation) -> None:
    with conversation.dial() as sock:
        sock.recv(1)
        raise RefusedError(conversation.end_reason)


def blocked_in_tls_handshake(client, conversation) -> None:
    import ssl

    context = ssl.create_default_context()
    with conversation.dial() as sock, context.wrap_socket(sock, server_hostname="db") as wrapped:
        wrapped.recv(1)


def blocked_in_target_send(client, conversation) -> None:
    with conversation.dial() as sock:
        while True:
            sock.sendall(bytes(65536))


def blocked_in_client_recv(client, conversation) -> None:
    if not client.recv(1):
        raise ConnectionError


def blocked_in_client_send(client, conversation) -> None:
    while True:
        client.sendall(bytes(65536))


def dead_to_everything(client, conversation) -> None:
    """Swallows the first failure, as a careless pump would."""
    with conversation.dial() as sock:
        sock.recv(1)
    client.recv(1)


@pytest.mark.parametrize(
    "script",
    [
        blocked_in_dial,
        blocked_in_target_recv,
        blocked_in_tls_handshake,
        blocked_in_target_send,
        blocked_in_client_recv,
        blocked_in_client_send,
        dead_to_everything,
    ],
)
def test_a_kill_works_wherever_it_is_blocked(
    world, script, black_hole, unreachable, wait_until, monkeypatch
) -> None:
    monkeypatch.undo()  # with the real last words
    world.port = unreachable if script is blocked_in_dial else black_hole
    world.protocol.script = staticmethod(script)
    grant = world.grant()
    connection = world.connect(grant)
    wait_until(lambda: live(world) == 1, "the session")
    time.sleep(0.15)  # let it get to where it blocks
    returned, in_time, finish = threading.Event(), [], session_module.Session.finish

    def finish_later(session):
        in_time.append(returned.wait(60))
        return finish(session)

    monkeypatch.setattr(session_module.Session, "finish", finish_later)
    with Metronome() as beat:
        started = time.monotonic()
        world.registry.end(grant.session, killed(""))
        returned.set()
        connection.thread.join(60)
        assert not connection.thread.is_alive()
        wait_until(lambda: world.reports, "the end")
        assert time.monotonic() - started - beat.lost() < 1.5
    assert in_time == [True], "the caller must not wait"
    assert world.parts[0].end == "killed"


def test_a_thread_that_cannot_be_woken_does_not_hold_the_recording(world, wait_until, monkeypatch) -> None:
    monkeypatch.setattr(session_module, "STRAGGLER_TIMEOUT", 0.3)
    release = threading.Event()
    world.protocol.script = staticmethod(lambda client, conversation: release.wait(60))
    grant = world.grant()
    world.connect(grant)
    wait_until(lambda: live(world) == 1, "the session")
    world.registry.end(grant.session, ENDED)
    wait_until(lambda: world.reports, "the end")
    assert world.parts[0].end == "ended"
    release.set()


def test_the_credential_goes_with_the_session(world, wait_until) -> None:
    grant = world.grant()
    world.connect(grant)
    wait_until(lambda: live(world) == 1, "the session")
    session = world.registry._sessions[grant.session]
    assert "s3cret-word" not in repr(session.opening)
    world.registry.end(grant.session, ENDED)
    wait_until(lambda: world.reports, "the end")
    with pytest.raises(RefusedError):
        _ = session.opening


def test_a_target_that_is_another_one_is_told_once_a_session(world) -> None:
    words = "the target shows another host key than it should: SHA256:x"

    def fail(interceptor, client, conversation) -> None:
        raise TargetIdentityError(words)

    world.protocol.serve = fail
    grant = world.grant()
    for _ in range(2):
        world.connect(grant).thread.join(60)
    assert world.alarms == [(grant.session, words)]


def test_nothing_holds_the_credential_after_a_failure(world, wait_until) -> None:
    """A traceback that its own frame refers to would keep it until Python looks for such cycles."""
    kept = []

    def fail(interceptor, client, conversation) -> None:
        kept.append(weakref.ref(interceptor.opening.credential))
        try:
            raise RefusedError("the target refused")
        except RefusedError as error:
            failure = error
        raise failure

    world.protocol.serve = fail
    gc.disable()
    try:
        grant = world.grant()
        world.connect(grant).thread.join(60)
        world.registry.end(grant.session, ENDED)
        wait_until(lambda: not len(world.registry), "the end")
        world.registry.tick()
        assert [reference() for reference in kept] == [None]
    finally:
        gc.enable()


# -- stopping ------------------------------------------------------------------------------------------


def test_closing_waits_for_a_first_connection_that_is_being_let_in(world, wait_until) -> None:
    """A session that its first connection is opening has no connection yet, and is not unused."""
    world.gate = threading.Event()
    connection = world.connect(world.grant())
    wait_until(lambda: world.opened, "the question to the platform")
    world.registry.close(STOPPING)
    assert not world.registry.wait_empty(0.6), "which looks for unused sessions again"
    world.gate.set()
    wait_until(lambda: live(world) == 1, "the connection")
    assert world.protocol.refused == []
    connection.sock.close()
    assert world.registry.wait_empty(30)


def test_a_closing_registry_opens_nothing_and_ends_what_is_unused(world, wait_until) -> None:
    used, unused = world.grant(), world.grant()
    connection = world.connect(used)
    wait_until(lambda: live(world) == 1, "the used one's connection")
    over = world.connect(unused)
    over.sock.close()
    over.thread.join(60)
    assert (live(world), len(world.registry)) == (1, 2), "one of two is in use"
    world.registry.close(STOPPING)
    wait_until(lambda: len(world.registry) == 1, "the unused one's end")
    world.connect(world.grant()).thread.join(60)
    assert world.protocol.refused == ["the agent is stopping"]
    assert not world.registry.wait_empty(0.1)
    connection.sock.close()
    assert world.registry.wait_empty(30)
