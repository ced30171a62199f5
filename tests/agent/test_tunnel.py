"""A tunnel's bounds: its channels, how long it tries to reach a relay, and how long it waits to try again."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from pam_agent import tunnel as tunnel_module
from pam_agent.backoff import Backoff
from pam_agent.state import AgentState, Relay
from pam_agent.tunnel import Tunnel
from pam_common.errors import PamError


class Room:
    """A doorstep that keeps every stream."""

    def __init__(self) -> None:
        self.streams: list[Any] = []

    def welcome(self, stream: Any, origin: str, done: Any) -> None:
        self.streams.append(stream)


@pytest.fixture
def room() -> Room:
    return Room()


@pytest.fixture
def new_tunnel(enrolled, room) -> Iterator[Any]:
    state = AgentState.load(enrolled().state_dir)
    made: list[Tunnel] = []

    def make(port: int) -> Tunnel:
        made.append(Tunnel(Relay("r1", "127.0.0.1", port), 1, state, room, now=time.time))
        made[-1].start()
        return made[-1]

    yield make
    for tunnel in made:
        tunnel.stop()
        tunnel.join(60)
        assert not tunnel.running


def test_channels_beyond_the_limit_are_cut(new_tunnel, relay, room, wait_until, monkeypatch) -> None:
    monkeypatch.setattr(tunnel_module, "MAX_CHANNELS", 2)
    tunnel = new_tunnel(relay.port)
    wait_until(relay.live, "the tunnel")
    held = [relay.open("s-" + "a" * 26) for _ in range(2)]
    wait_until(lambda: len(room.streams) == 2, "two channels")
    with pytest.raises((OSError, PamError)):
        relay.open("s-" + "a" * 26).recv(1)
    assert len(room.streams) == 2
    wait_until(lambda: tunnel.channels == 2, "the third one to be forgotten")
    for stream in held:
        stream.abort()


def test_a_relay_that_does_not_answer_is_not_waited_for(new_tunnel, monkeypatch) -> None:
    monkeypatch.setattr(tunnel_module, "CONNECT_TIMEOUT", 0.1)
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:  # its backlog is full, so a connect to it hangs
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        tunnel = new_tunnel(full.getsockname()[1])
        assert tunnel.tried.wait(60)
        assert "timed out" in tunnel.status()["error"]
        for filler in fillers:
            filler.close()


def test_the_wait_between_attempts_grows_to_its_cap() -> None:
    backoff = Backoff(tunnel_module.BACKOFF_FIRST, tunnel_module.BACKOFF_CAP)
    waits = [backoff.next() for _ in range(40)]
    assert 0.25 <= waits[0] <= 0.5
    assert max(waits) <= 20
    assert min(waits[-10:]) >= 10
    backoff.reset()
    assert backoff.next() <= 0.5


def test_tunnels_that_were_lost_together_come_back_apart(
    new_tunnel, relay, wait_until, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each waits by itself; and several losses in a row do not make the wait long."""
    asked: list[float] = []
    scatter = tunnel_module.scatter
    monkeypatch.setattr(tunnel_module, "scatter", lambda most: asked.append(most) or scatter(most / 100))
    monkeypatch.setattr(tunnel_module, "STABLE", 0.0)
    tunnel = new_tunnel(relay.port)
    for count in range(1, 5):
        wait_until(lambda: tunnel.up)
        relay.cut()
        wait_until(lambda count=count: len(asked) == count)
    wait_until(lambda: tunnel.up)
    assert asked == [tunnel_module.SPREAD] * 4
    waits = [scatter(tunnel_module.SPREAD) for _ in range(1000)]
    assert min(waits) < 0.5 < 2.5 < max(waits) <= tunnel_module.SPREAD
    assert tunnel_module.BACKOFF_CAP + tunnel_module.SPREAD < 30  # all are back by then
