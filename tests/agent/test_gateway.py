"""A whole agent in this process, between a platform over HTTP, a relay over ssh and a target over TCP."""

from __future__ import annotations

import json
import socket
import threading
import time

import pytest
from patience import Metronome

from pam_agent import gateway as gateway_module
from pam_agent import session as session_module
from pam_agent.gateway import Gateway
from pam_common.daemon import read_status
from pam_common.errors import ConfigError, PamError, ProtocolError, RefusedError, TruncatedError

#: As the product has it. Where a test wants to hear the words, the machine may take longer to say them.
LAST_WORDS = session_module.LAST_WORDS


@pytest.fixture
def start(monkeypatch, enrolled, relay, echo_interceptor, wait_until):
    """Starts an agent whose only protocol is the echo, and waits for its tunnel."""
    monkeypatch.setitem(gateway_module.PROTOCOLS, "echo", echo_interceptor)
    monkeypatch.setattr(gateway_module, "FLUSH_TIMEOUT", 0.3)
    monkeypatch.setattr(session_module, "LAST_WORDS", 10)
    running = []

    def make(**changes):
        agent = Gateway(enrolled(**changes))
        running.append(agent)
        agent.start()
        wait_until(lambda: relay.live() and agent.tunnels.counts()[0], "the tunnel")
        # What a test sends before the first poll would not be heard.
        wait_until(lambda: agent.inbox._cursor >= 0, "the first poll")
        return agent

    yield make
    relay.cut()  # so that nobody is left for whom a session's end would wait
    for agent in running:
        agent.config = agent.config.__class__(**{**vars(agent.config), "drain_timeout": 0})
        agent.stop()


@pytest.fixture
def agent(start, platform, target):
    platform.account("prod-db/readonly", "127.0.0.1", target.port)
    return start()


def read_line(channel) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        more = channel.recv(1000)
        if not more:
            break
        line += more
    return line


def read_all(channel) -> bytes:
    data = b""
    while more := channel.recv(1000):
        data += more
    return data


def connect(client, grant, **options):
    channel = client.connect(grant, **options)
    assert read_line(channel) == b"ready\n"
    return channel


# -- what works ----------------------------------------------------------------------------------------


def test_a_session_carries_bytes_is_recorded_and_reported(agent, client, platform, wait_until) -> None:
    grant = platform.grant(client.public)
    channel = connect(client, grant)
    channel.sendall(b"hello\n")
    assert read_line(channel) == b"hello\n"
    channel.shutdown(socket.SHUT_WR)
    assert read_all(channel) == b""
    channel.close()
    platform.send("end", grant.session)
    wait_until(lambda: platform.closed, "the report")
    session, report = platform.closed[0]
    assert (session, report["reason"], report["connections"]) == (grant.session, "ended", 1)
    assert (report["bytes_up"], report["bytes_down"]) == (6, 12)
    wait_until(lambda: (grant.session, 1) in platform.complete, "the upload")
    assert b"s3cret-word" not in bytes(platform.recordings[grant.session, 1])


def test_many_connections_at_once_open_the_session_once(agent, client, platform) -> None:
    grant = platform.grant(client.public)
    platform.open_gate.clear()
    done = []

    def one() -> None:
        channel = connect(client, grant)
        channel.sendall(b"x\n")
        done.append(read_line(channel))
        channel.close()

    threads = [threading.Thread(target=one) for _ in range(20)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)  # let most of them arrive before the answer
    platform.open_gate.set()
    for thread in threads:
        thread.join(60)
    assert done == [b"x\n"] * 20
    assert platform.opened == [grant.session]


def test_status_says_what_runs(agent, client, platform) -> None:
    grant = platform.grant(client.public)
    channel = connect(client, grant)
    status = read_status(agent.config.status_socket)
    assert (status["agent"], status["gateway"], status["ok"]) == ("dc1-a", "dc1", True)
    assert [(t["relay"], t["state"], t["channels"]) for t in status["tunnels"]] == [("r1", "up", 1)]
    assert [s["session"] for s in status["sessions"]] == [grant.session]
    assert status["certificate_left"] > 80000
    assert "s3cret-word" not in json.dumps(status)
    channel.close()


# -- who is refused ------------------------------------------------------------------------------------


def test_a_grant_for_another_key_is_refused(agent, client, platform) -> None:
    grant = platform.grant(b"\7" * 32)
    channel = client.connect(grant)
    with pytest.raises(RefusedError, match="another client key"):
        channel.recv(10)
    assert platform.opened == []


def test_a_grant_for_another_gateway_is_refused(agent, client, platform) -> None:
    grant = platform.grant(client.public, gateway="dc2")
    channel = client.connect(grant)
    with pytest.raises(RefusedError, match="not valid"):
        channel.recv(10)
    assert platform.opened == []


def test_a_handshake_for_another_gateway_fails(agent, client, platform) -> None:
    grant = platform.grant(client.public)
    with pytest.raises(PamError):
        client.connect(grant, gateway="dc2")


def test_a_grant_signed_by_a_stranger_is_refused(agent, client, platform) -> None:
    grant = platform.grant(client.public)
    token = grant.issue(platform.user_ca, issuer=platform.issuer).encode()
    channel = client.connect(grant, token=token)
    with pytest.raises(RefusedError, match="not trusted"):
        channel.recv(10)


def test_a_late_grant_opens_nothing_but_joins_an_open_session(agent, client, platform, wait_until) -> None:
    now = int(time.time())
    late = platform.grant(client.public, expires=now - 1)
    token = platform.token(late, now=now - 100)
    assert read_all(client.connect(late, token=token)).startswith(b"refused: the grant was not used in time")
    wait_until(lambda: platform.closed, "the word that nothing came of it")
    grant = platform.grant(client.public)
    first = connect(client, grant)
    old = platform.grant(client.public, session=grant.session, expires=now - 1, session_end=grant.session_end)
    second = connect(client, old, token=platform.token(old, now=now - 100))
    assert platform.opened == [late.session, grant.session]
    first.close()
    second.close()


def test_a_session_of_a_living_agent_is_refused_with_the_platforms_words(agent, client, platform) -> None:
    platform.refuse_open = 409, "the session belongs to agent dc1-b, which is alive"
    answer = read_all(client.connect(platform.grant(client.public)))
    assert answer.startswith(b"refused: the session belongs to agent dc1-b, which is alive")


def test_a_late_grant_goes_on_with_a_session_that_the_platform_knows(agent, client, platform) -> None:
    """Its agent is gone: the platform lets this one take over, in a further part."""
    now = int(time.time())
    late = platform.grant(client.public, expires=now - 1)
    platform.change_opening = lambda body: body.update(part=2)
    connect(client, late, token=platform.token(late, now=now - 100)).close()
    assert platform.opened == [late.session]


def test_an_ended_session_does_not_reopen(agent, client, platform, wait_until) -> None:
    grant = platform.grant(client.public)
    connect(client, grant).close()
    platform.send("kill", grant.session, "that was enough")
    wait_until(lambda: platform.closed, "the end")
    answer = read_all(client.connect(grant))
    assert answer.startswith(b"refused: the session was killed: that was enough")
    assert platform.opened == [grant.session]


def test_the_platforms_refusal_reaches_the_client(agent, client, platform) -> None:
    platform.refuse_open = (403, "the policy ends at five")
    grant = platform.grant(client.public)
    assert read_all(client.connect(grant)).startswith(b"refused: the policy ends at five")
    platform.refuse_open = None
    connect(client, grant).close()  # it was never open, so it may be tried again


def test_an_unreachable_platform_stops_new_sessions_only(agent, client, platform) -> None:
    running = connect(client, platform.grant(client.public))
    platform.down = True
    answer = read_all(client.connect(platform.grant(client.public)))
    assert b"the agent does not reach the platform" in answer
    running.sendall(b"still here\n")
    assert read_line(running) == b"still here\n"
    running.close()


def test_a_target_outside_the_local_list_is_never_dialled(start, client, platform, target) -> None:
    start(allow_targets=["127.0.0.1:1"])
    platform.account("prod-db/readonly", "127.0.0.1", target.port)
    answer = read_all(client.connect(platform.grant(client.public)))
    assert b"may not dial" in answer
    assert target.accepted == []


def test_a_recording_for_strangers_is_refused(start, client, platform, target, wait_until) -> None:
    start(recording={"recipients": ["0123456789abcdef"]})
    platform.account("prod-db/readonly", "127.0.0.1", target.port)
    answer = read_all(client.connect(platform.grant(client.public)))
    assert b"does not allow" in answer
    wait_until(lambda: platform.closed, "the report that nothing happened")
    assert platform.closed[0][1]["reason"] == "failed"


@pytest.mark.parametrize("field", ["session", "account", "agent"])
def test_a_credential_sealed_for_something_else_is_refused(agent, client, platform, field) -> None:
    from nacl.public import PublicKey, SealedBox

    from pam_common.keys import b64decode, b64encode

    grant = platform.grant(client.public)
    secret = {
        "session": grant.session,
        "account": grant.account,
        "agent": "dc1-a",
        "user": "x",
        "password": "y",
    }
    secret[field] = "other"
    box = SealedBox(PublicKey(b64decode(platform.agents["dc1-a"]["sealing_key"])))
    sealed = b64encode(box.encrypt(json.dumps(secret).encode()))
    platform.change_opening = lambda body: body.update(credential=sealed)
    assert b"another session, account or agent" in read_all(client.connect(grant))


def test_too_many_connections_of_one_session_are_refused(start, client, platform, target) -> None:
    start(limits={"connections_per_session": 2})
    platform.account("prod-db/readonly", "127.0.0.1", target.port)
    grant = platform.grant(client.public)
    first, second = connect(client, grant), connect(client, grant)
    assert b"already has 2 connections" in read_all(client.connect(grant))
    first.close()
    second.close()


def test_strangers_that_stall_do_not_keep_others_out(agent, client, platform, relay) -> None:
    stalled = [relay.open("s-" + "a" * 26) for _ in range(30)]
    with Metronome() as beat:
        started = time.monotonic()
        connect(client, platform.grant(client.public)).close()
        assert time.monotonic() - started - beat.lost() < 5
    for stream in stalled:
        stream.abort()


def test_a_stranger_who_never_speaks_is_cut(agent, relay, monkeypatch) -> None:
    monkeypatch.setattr("pam_agent.doorstep.HANDSHAKE_TIMEOUT", 0.3)
    stream = relay.open("s-" + "a" * 26)
    with pytest.raises(OSError, match=r"cut|closed"):
        stream.recv(10)


# -- ends ----------------------------------------------------------------------------------------------


def test_a_kill_cuts_at_once_and_says_why(agent, client, platform) -> None:
    grant = platform.grant(client.public)
    channel = connect(client, grant)
    with Metronome() as beat:
        started = time.monotonic()
        platform.send("kill", grant.session, "by bob")
        assert read_all(channel) == b"error: the session was killed: by bob\n"
        assert time.monotonic() - started - beat.lost() < 1


def test_a_kill_cuts_a_client_that_does_not_read(
    agent, client, platform, target, wait_until, monkeypatch
) -> None:
    monkeypatch.setattr(session_module, "LAST_WORDS", LAST_WORDS)
    grant = platform.grant(client.public)
    channel = connect(client, grant)
    stop = threading.Event()

    def flood() -> None:
        block = bytes(65536)
        try:
            while not stop.is_set():
                target.accepted[0].sendall(block)
        except OSError:
            stop.set()

    wait_until(lambda: target.accepted, "the target's end of it")
    thread = threading.Thread(target=flood, daemon=True)
    thread.start()
    time.sleep(0.5)  # windows and buffers fill up
    with Metronome() as beat:
        started = time.monotonic()
        platform.send("kill", grant.session)
        wait_until(stop.is_set, "the target's end")
        wait_until(lambda: platform.closed, "the session's end")
        assert time.monotonic() - started - beat.lost() < 3
    thread.join(60)
    channel.close()


def test_a_client_that_ends_without_an_end_is_a_cut(agent, client, platform, wait_until) -> None:
    grant = platform.grant(client.public)
    connect(client, grant).close()
    wait_until(lambda: agent.registry.status()[0]["connections"] == 0, "the connection's end")


def test_an_error_of_the_protocol_ends_the_connection_only(agent, client, platform) -> None:
    grant = platform.grant(client.public)
    channel = connect(client, grant)
    channel.sendall(b"malformed\n")
    assert read_line(channel) == b"error: malformed\n"
    connect(client, grant).close()


def test_a_fault_of_the_interceptor_is_a_cut_not_an_end(agent, client, platform) -> None:
    grant = platform.grant(client.public)
    channel = connect(client, grant)
    channel.sendall(b"fault\n")
    with pytest.raises((TruncatedError, ProtocolError)):
        read_all(channel)
    connect(client, grant).close()


def test_revoking_the_agent_ends_everything_and_tunnels(
    agent, client, platform, relay, wait_until, monkeypatch
) -> None:
    channel = connect(client, platform.grant(client.public))
    heard, asked = threading.Event(), []

    def wait_empty(seconds) -> bool:
        """The moment for last words, which takes here until they were heard."""
        asked.append(seconds)
        return not heard.wait(60)

    with monkeypatch.context() as patch:
        patch.setattr(agent.registry, "wait_empty", wait_empty)
        platform.revoked.add("dc1-a")
        assert b"no longer part of its gateway" in read_all(channel)
        heard.set()
        wait_until(lambda: not relay.live(), "the tunnel's end")
    assert asked == [gateway_module.LAST_WORDS]
    assert agent.status()["state"] == "revoked"


def test_the_sessions_end_when_the_platform_stays_silent(start, client, platform, target) -> None:
    start(grace=0)
    platform.account("prod-db/readonly", "127.0.0.1", target.port)
    channel = connect(client, platform.grant(client.public))
    platform.down = True
    with platform.condition:
        platform.condition.notify_all()
    assert b"can no longer be asked" in read_all(channel)


def test_a_recorder_that_fails_ends_the_session(agent, client, platform, wait_until) -> None:
    grant = platform.grant(client.public)
    channel = connect(client, grant)
    agent.spool.max_bytes = 1
    channel.sendall(b"not to be forwarded\n")
    data = read_all(channel)
    assert b"not to be forwarded" not in data
    wait_until(lambda: platform.closed, "the session's end")
    assert platform.closed[0][1]["reason"] == "recording-failed"


# -- tunnels -------------------------------------------------------------------------------------------


def test_a_lost_tunnel_comes_back(agent, client, platform, relay, wait_until) -> None:
    relay.cut()
    wait_until(lambda: relay.live(), "the tunnel")
    connect(client, platform.grant(client.public)).close()


@pytest.mark.slow
def test_a_new_certificate_makes_a_new_link_and_cuts_nothing(
    start, client, platform, relay, target, wait_until, monkeypatch
) -> None:
    platform.lifetime = 20
    monkeypatch.setattr("pam_agent.renewal.SHORTEST", 0.5)
    platform.account("prod-db/readonly", "127.0.0.1", target.port)
    start()
    old = relay.live()[-1]
    channel = connect(client, platform.grant(client.public))
    wait_until(lambda: relay.live()[-1] is not old, "the new link")
    assert old.is_active()
    channel.sendall(b"over the old link\n")
    assert read_line(channel) == b"over the old link\n"
    connect(client, platform.grant(client.public)).close()
    channel.shutdown(socket.SHUT_WR)
    channel.close()
    wait_until(lambda: not old.is_active(), "the old link's end")


def test_a_relay_with_a_foreign_host_certificate_gets_no_login(
    agent, platform, another_relay, wait_until
) -> None:
    foreign = another_relay("r2", host_ca=platform.user_ca)
    platform.send("reload")
    wait_until(lambda: any("unknown" in str(t["error"]) or "not trusted" in str(t["error"])
                           for t in agent.status()["tunnels"]), "the refusal")  # fmt: skip
    assert not any(transport.is_authenticated() for transport, _ in foreign.links)


def test_a_new_relay_gets_a_tunnel_and_a_dropped_one_is_drained(
    agent, client, platform, relay, another_relay, wait_until
) -> None:
    channel = connect(client, platform.grant(client.public))
    second = another_relay("r2")
    platform.relays.pop(0)
    platform.send("reload")
    wait_until(lambda: second.live(), "the second relay's tunnel")
    wait_until(lambda: not relay.live(), "the first relay's drain")
    channel.sendall(b"still\n")
    assert read_line(channel) == b"still\n"
    channel.close()


def test_several_tunnels_per_relay_take_their_slots(
    start, client, platform, relay, target, wait_until
) -> None:
    start(tunnels_per_relay=3)
    wait_until(lambda: all(relay.live(slot) for slot in (1, 2, 3)), "three slots")


# -- stop and reload -----------------------------------------------------------------------------------


def test_stop_drains_then_cuts_and_uploads(
    start, client, platform, target, relay, wait_until, monkeypatch
) -> None:
    agent = start(drain_timeout=10)
    monkeypatch.setattr(gateway_module, "FLUSH_TIMEOUT", 30)
    platform.account("prod-db/readonly", "127.0.0.1", target.port)
    grant = platform.grant(client.public)
    channel = connect(client, grant)
    stopping = threading.Thread(target=agent.stop)
    stopping.start()
    wait_until(lambda: not relay.live(), "the drain")
    channel.sendall(b"while draining\n")
    assert read_line(channel) == b"while draining\n"
    assert read_all(channel) == b"error: the agent is stopping\n"
    channel.close()
    stopping.join(60)
    assert not stopping.is_alive()
    assert (grant.session, 1) in platform.complete
    assert platform.closed[0][1]["reason"] == "agent-stopped"


def test_reload_takes_new_targets_and_refuses_what_needs_a_restart(agent, client, platform, settings) -> None:
    settings(allow_targets=["10.0.0.0/8:5432"])
    agent.reload()
    assert b"may not dial" in read_all(client.connect(platform.grant(client.public)))
    settings(limits={"sessions": 1})
    with pytest.raises(ConfigError, match="limits: needs a restart"):
        agent.reload()
