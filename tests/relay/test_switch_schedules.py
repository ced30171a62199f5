"""Any order of what the ends of joined channels can do, against a model of what must come of it."""

from __future__ import annotations

import contextlib
import importlib.util
import random
import socket
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pam_common import fast_ssh
from pam_common.fast_ssh import ChannelStream, Transport
from pam_common.fast_ssh.channel import WINDOW

PATTERN = random.Random(2).randbytes(65537)
NEAR, FAR = 0, 1
SIDES = st.sampled_from((NEAR, FAR))
SIZES = st.integers(1, 200) | st.integers(1, 70_000) | st.just(WINDOW)


def pattern(at: int, size: int) -> bytes:
    at %= len(PATTERN)
    return (PATTERN * (2 + size // len(PATTERN)))[at : at + size]


def wait_for(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.001)


@cache
def relay() -> Any:
    """One relay with a client and an agent for all examples; each leaves it as it found it."""
    spec = importlib.util.spec_from_file_location("relay_peers", Path(__file__).parent / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    world = module.World()
    world.start()
    world.far = world.agent(echo=False, lifetime=7200)
    world.near = world.client(lifetime=7200)
    links = [link.transport for link in world.relay._links.values()]
    world.all_ends = [world.near, world.far.transport, *links]
    for transport in world.all_ends:
        transport.packets._count_exchange = lambda _old: None  # of those that nothing calls for are few
    return world


@pytest.fixture(autouse=True, scope="module")
def end_of_the_relay() -> Iterator[None]:
    yield
    relay().close()


class Joined:
    """A channel through the relay: its two ends, and what was done with them."""

    def __init__(self) -> None:
        world = relay()
        count = len(world.far.streams)
        near = fast_ssh.open_direct(world.near, "dc1")
        wait_for(lambda: len(world.far.streams) > count, "the agent's side")
        self.ends: tuple[ChannelStream, ChannelStream] = (near, world.far.streams.pop())
        self.sent = [0, 0]  # by side
        self.got = [0, 0]
        self.shut = [False, False]
        self.ended = [False, False]  # it read the other's end
        self.cut = False

    def send(self, side: int, size: int) -> None:
        """What fits: more would wait for the reader, which is this very thread."""
        size = min(size, self.ends[side].window)
        if size:
            self.ends[side].sendall(pattern(self.sent[side], size))
            self.sent[side] += size

    def receive(self, side: int, size: int) -> None:
        """All that is there of what was sent must come, and nothing else."""
        if self.got[side] < self.sent[1 - side]:
            data = self.ends[side].recv(size)
            assert data == pattern(self.got[side], len(data))
            assert data
            self.got[side] += len(data)
        elif self.shut[1 - side]:
            assert self.ends[side].recv(1) == b""
            self.ended[side] = True

    def shut_down(self, side: int) -> None:
        self.ends[side].shutdown(socket.SHUT_WR)
        self.shut[side] = True

    def drain(self, side: int) -> None:
        """After a cut: what still comes is what was sent, up to somewhere."""
        with contextlib.suppress(OSError):
            while data := self.ends[side].recv(WINDOW):
                assert data == pattern(self.got[side], len(data))
                self.got[side] += len(data)
        assert self.got[side] <= self.sent[1 - side]


class Schedules(RuleBasedStateMachine):
    """Up to four channels on the same two links."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[Joined] = [Joined()]

    def _pick(self, number: int) -> Joined:
        return self.open[number % len(self.open)]

    @precondition(lambda self: len(self.open) < 4)
    @rule()
    def join(self) -> None:
        self.open.append(Joined())

    @precondition(lambda self: self.open)
    @rule(number=st.integers(0, 3), side=SIDES, size=SIZES)
    def send(self, number: int, side: int, size: int) -> None:
        joined = self._pick(number)
        if not joined.shut[side]:
            joined.send(side, size)

    @precondition(lambda self: self.open)
    @rule(number=st.integers(0, 3), side=SIDES, size=SIZES)
    def receive(self, number: int, side: int, size: int) -> None:
        joined = self._pick(number)
        if not joined.ended[side]:
            joined.receive(side, size)

    @precondition(lambda self: self.open)
    @rule(number=st.integers(0, 3), side=SIDES)
    def shut_down(self, number: int, side: int) -> None:
        self._pick(number).shut_down(side)

    @precondition(lambda self: self.open)
    @rule(number=st.integers(0, 3), side=SIDES)
    def cut(self, number: int, side: int) -> None:
        joined = self._pick(number)
        self.open.remove(joined)
        joined.ends[side].abort()
        joined.drain(1 - side)
        joined.ends[1 - side].close()

    @precondition(lambda self: self.open)
    @rule(number=st.integers(0, 3), side=SIDES)
    def close(self, number: int, side: int) -> None:
        """Closed in order: all that was sent before arrives."""
        joined = self._pick(number)
        self.open.remove(joined)
        joined.ends[side].close()
        joined.drain(1 - side)
        assert joined.got[1 - side] == joined.sent[side]
        joined.ends[1 - side].close()

    @rule(which=st.integers(0, 3))
    def rekey(self, which: int) -> None:
        """New keys on one of the four ends, from the next packet on."""
        transport: Transport = relay().all_ends[which]
        transport.packets._need_rekey = True

    @invariant()
    def nobody_keeps_more_than_a_window(self) -> None:
        for joined in self.open:
            for side in (NEAR, FAR):
                assert joined.ends[side].buffered <= WINDOW

    def teardown(self) -> None:
        """Whatever is left open ends well, and the relay keeps nothing."""
        world = relay()
        for joined in self.open:
            for side in (NEAR, FAR):
                joined.shut_down(side)
            for side in (NEAR, FAR):
                joined.drain(side)
                assert joined.got[side] == joined.sent[1 - side]
                joined.ends[side].close()
        wait_for(lambda: world.relay.channels == 0, "the relay to count all channels off")
        for transport in (world.near, world.far.transport):
            wait_for(lambda transport=transport: not transport._streams, "both ends to forget all channels")
            assert transport.is_active(), transport.fault


TestSchedules = Schedules.TestCase
TestSchedules.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
