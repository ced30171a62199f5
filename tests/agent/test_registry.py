"""The bounds of sessions and their registry: what waits is given up, what is remembered is forgotten."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from pam_agent import registry as registry_module
from pam_agent import session as session_module
from pam_agent.config import Limits
from pam_agent.conversation import MAX_DIALS, LiveConversation
from pam_agent.protocols.base import Credential, Opening, Target
from pam_agent.registry import SessionRegistry
from pam_agent.session import ENDED, Session
from pam_agent.target import TargetRules
from pam_common.errors import RefusedError
from pam_common.keys import new_session_id
from pam_common.stream import SocketStream
from pam_common.tokens import Grant

RULES = TargetRules.parse(["127.0.0.1:*"])


def grant_for() -> Grant:
    return Grant(
        session=new_session_id(),
        user="alice",
        gateway="dc1",
        account="prod-db/readonly",
        protocol="deaf",
        client_key=b"\1" * 32,
        expires=6100,
        session_end=7000,
        idle_limit=0,
    )


def new_session() -> Session:
    return Session(grant_for(), rules=lambda: RULES, max_connections=5, on_end=lambda _session: None)


class Deaf:
    """An Interceptor that waits for its client; its refusals wait as well."""

    def __init__(self, opening: Opening) -> None:
        self.opening = opening

    def serve(self, client: Any, conversation: Any) -> None:
        """Ends at once."""

    @classmethod
    def refuse(cls, client: Any, message: str, hint: str) -> None:
        client.recv(1)


class World:
    def __init__(self) -> None:
        self.now = 1000.0

        def refused(grant: Grant, _failed: object) -> Any:
            raise RefusedError("not today")

        self.registry = SessionRegistry(
            protocols={"deaf": Deaf},  # type: ignore[dict-item]  # all that is used of one
            limits=Limits(),
            rules=lambda: RULES,
            opener=refused,
            report=lambda _session, _report: None,
            platform_now=lambda: 5000.0,
            clock=lambda: self.now,
        )


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def stream() -> Iterator[SocketStream]:
    near, far = socket.socketpair()
    yield SocketStream(near)
    near.close()
    far.close()


# -- sessions ------------------------------------------------------------------------------------------


def test_an_opening_that_takes_too_long_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "OPENING_TIMEOUT", 0.05)
    with pytest.raises(RefusedError, match="still being opened"):
        new_session().wait_open()


def test_an_end_does_not_wait_for_ever_for_an_opening_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "SETTLE_TIMEOUT", 0.05)
    session = new_session()
    session.request_end(ENDED)
    assert session.finish() is None


def test_one_connection_dials_a_few_times_only(stream: SocketStream) -> None:
    with socket.create_server(("127.0.0.1", 0)) as target:
        grant, session = grant_for(), new_session()
        opening = Opening(
            session=grant.session,
            part=1,
            user="alice",
            account=grant.account,
            protocol="deaf",
            session_end=7000,
            idle_limit=0,
            target=Target("127.0.0.1", target.getsockname()[1]),
            credential=Credential("app"),
        )
        session.set_open(opening, Deaf(opening), None, 60)  # type: ignore[arg-type]  # nothing is recorded
        conversation = LiveConversation(session, 1, stream)
        for _ in range(MAX_DIALS):
            conversation.dial().close()
        with pytest.raises(RefusedError, match="too many connections to the target"):
            conversation.dial()
        conversation.release()


# -- the registry --------------------------------------------------------------------------------------


def test_a_client_that_does_not_hear_its_refusal_is_cut(
    world: World, stream: SocketStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_module, "REFUSAL_TIMEOUT", 0.1)
    started = time.monotonic()
    world.registry.serve(grant_for(), stream)  # type: ignore[arg-type]  # a stream will do
    assert time.monotonic() - started < 60


def test_a_client_that_does_not_take_its_end_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_module, "FAREWELL_TIMEOUT", 0.1)
    cut = threading.Event()

    class Stuck:
        """Whose reader does not read: what is sent waits until the stream is cut."""

        def shutdown(self, how: int) -> None:
            assert cut.wait(60)
            raise BrokenPipeError

        def abort(self) -> None:
            cut.set()

        recv = sendall = close = None

    registry_module._end_cleanly(LiveConversation(new_session(), 1, Stuck()))  # type: ignore[arg-type]
    assert cut.is_set()


def test_the_oldest_of_too_many_ended_sessions_is_forgotten(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_module, "MAX_REMEMBERED", 3)
    sessions = [new_session_id() for _ in range(5)]
    for session in sessions:
        world.registry.end(session, ENDED)
    assert list(world.registry._over) == sessions[-3:]


def test_a_kill_of_an_unknown_session_is_forgotten_when_no_grant_can_be_left(world: World) -> None:
    world.registry.end(new_session_id(), ENDED)
    world.now += registry_module.REMEMBER_UNSEEN
    world.registry.tick()
    assert len(world.registry._over) == 1
    world.now += 61
    world.registry.tick()
    assert len(world.registry._over) == 0
