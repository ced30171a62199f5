"""The times that the running agent keeps at its start, at its stop and for its watchdog."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from patience import Metronome

from pam_agent import gateway as gateway_module
from pam_agent import session as session_module
from pam_agent import tunnels as tunnels_module
from pam_agent.gateway import Gateway


@pytest.fixture
def start(enrolled, relay, wait_until, monkeypatch, echo_interceptor):
    """Starts an agent that is to be stopped by the test."""
    monkeypatch.setitem(gateway_module.PROTOCOLS, "echo", echo_interceptor)

    def make(**changes: Any) -> Gateway:
        agent = Gateway(enrolled(**changes))
        agent.start()
        wait_until(lambda: relay.live() and agent.tunnels.counts()[0], "the tunnel")
        return agent

    return make


def test_a_loop_that_does_not_go_round_is_stuck(start, wait_until) -> None:
    agent = start(drain_timeout=0)
    limits = {
        "inbox": gateway_module.INBOX_LIMIT,
        "renewal": gateway_module.RENEWAL_LIMIT,
        "clock": gateway_module.CLOCK_LIMIT,
        "tunnel-r1-1": tunnels_module.BEAT_LIMIT,
    }
    wait_until(lambda: len(agent.liveness._due) == len(limits), "every loop's first round")
    due, now = dict(agent.liveness._due), time.monotonic()
    assert {name for name, limit in limits.items() if now < due[name] <= now + limit} == set(due)
    assert agent.healthy()
    agent.stop()
    for name, limit in limits.items():
        agent.liveness.beat("probe", limit)
        agent.liveness._clock = lambda limit=limit: time.monotonic() + limit + 1  # that much later
        assert "probe" in agent.liveness.stuck(), name
        assert not agent.healthy()
        agent.liveness._clock = time.monotonic


def test_ready_is_said_though_no_relay_answers(enrolled, monkeypatch) -> None:
    monkeypatch.setattr(gateway_module, "READY_TIMEOUT", 0.1)
    agent = Gateway(enrolled())
    agent.tunnels._wanted[None, 1] = SimpleNamespace(tried=threading.Event())  # type: ignore[index,assignment]
    said = threading.Event()
    agent.announce(SimpleNamespace(ready=said.set))  # type: ignore[arg-type]
    assert said.wait(60)
    agent.tunnels._wanted.clear()
    agent.stop()


def test_a_session_that_cannot_be_cut_does_not_hold_the_stop(
    start, client, platform, target, wait_until, monkeypatch
) -> None:
    monkeypatch.setattr(gateway_module, "CUT_TIMEOUT", 0.2)
    monkeypatch.setattr(session_module, "LAST_WORDS", 0.05)
    release, busy = threading.Event(), threading.Event()

    def stuck(_self: Any, _client: Any, _conversation: Any) -> None:
        busy.set()
        release.wait(60)

    monkeypatch.setattr(gateway_module.PROTOCOLS["echo"], "serve", stuck)
    monkeypatch.setattr(session_module, "STRAGGLER_TIMEOUT", 120.0)  # it does not give up by itself
    platform.account("prod-db/readonly", "127.0.0.1", target.port)
    agent = start(drain_timeout=0)
    client.connect(platform.grant(client.public))
    assert busy.wait(60)
    with Metronome() as beat:
        started = time.monotonic()
        agent.stop()
        assert time.monotonic() - started - beat.lost() < 8
    assert len(agent.registry) == 1
    release.set()
    wait_until(lambda: not len(agent.registry), "the session's end")


def test_reports_and_uploads_do_not_hold_the_stop(start, platform, monkeypatch) -> None:
    monkeypatch.setattr(gateway_module, "FLUSH_TIMEOUT", 0.2)
    agent = start(drain_timeout=0)
    platform.down = True
    agent.reports.add("s-" + "a" * 26, {"reason": "ended"})
    with Metronome() as beat:
        started = time.monotonic()
        agent.stop()
        assert time.monotonic() - started - beat.lost() < 8
    assert platform.closed == []
