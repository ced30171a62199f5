"""The agent behind the relay as it is: admission, routing, reconnects and drain, with a client's ssh."""

from __future__ import annotations

import os
import socket
import threading
import time

import pytest
from nacl.public import PrivateKey
from patience import Metronome

from pam_agent import gateway as gateway_module
from pam_agent import session as session_module
from pam_agent.gateway import Gateway
from pam_common import fast_ssh, ssh_certs
from pam_common.errors import PamError, RefusedError
from pam_common.keys import SigningKey, VerifyKeys
from pam_common.secure_channel import SecureChannel
from pam_common.ssh_certs import CertificateKey
from pam_relay.bundle import Bundle
from pam_relay.server import RelayServer


@pytest.fixture
def relay_server(platform):
    host, now = SigningKey.generate(), int(time.time())
    certificate = ssh_certs.make_host_certificate(
        platform.host_ca,
        host.public,
        key_id="r1",
        principals=["r1", "127.0.0.1"],
        valid_after=now - 300,
        valid_before=now + 3600,
    )
    bundle = Bundle(
        relay="r1",
        serial=1,
        user_ca=VerifyKeys.of(platform.user_ca.public),
        gateways=frozenset({"dc1"}),
        host_certificate=certificate,
        issued=now,
    )
    server = RelayServer(bundle, host.seed())
    address = server.listen("127.0.0.1", 0)
    platform.relays.append({"name": "r1", "host": address[0], "port": address[1]})
    yield address
    server.close()


@pytest.fixture
def agent(monkeypatch, enrolled, relay_server, echo_interceptor, platform, target, wait_until):
    monkeypatch.setattr("pam_agent.tunnel.PULSE", 0.2)
    monkeypatch.setitem(gateway_module.PROTOCOLS, "echo", echo_interceptor)
    monkeypatch.setattr(gateway_module, "FLUSH_TIMEOUT", 0.3)
    monkeypatch.setattr(session_module, "LAST_WORDS", 10)  # a busy machine may take longer to say them
    platform.account("prod-db/readonly", "127.0.0.1", target.port)
    running = Gateway(enrolled(drain_timeout=1))
    running.start()
    wait_until(lambda: running.tunnels.counts()[0], "the tunnel")
    wait_until(lambda: running.inbox._cursor >= 0, "the first poll")  # what is sent before is not heard
    yield running
    running.stop()


@pytest.fixture
def open_session(platform, relay_server):
    """A client's whole way in: a certificate, an ssh connection, channels with Noise on them."""
    transports = []

    def make(**changes):
        key, login, now = os.urandom(32), SigningKey.generate(), int(time.time())
        grant = platform.grant(bytes(PrivateKey(key).public_key), **changes)
        line = ssh_certs.make_user_certificate(
            platform.user_ca,
            login.public,
            key_id=grant.session,
            principals=["connect:dc1"],
            valid_after=now - 300,
            valid_before=now + 300,
        )
        transport = fast_ssh.connect(
            socket.create_connection(relay_server),
            name="client",
            host_ca=VerifyKeys.of(platform.host_ca.public),
            hostname="r1",
            login=CertificateKey(login.seed(), line),
        )
        transports.append(transport)

        def channel() -> SecureChannel:
            return SecureChannel.connect(
                fast_ssh.open_direct(transport, "dc1"),
                gateway="dc1",
                static=key,
                check_agent=lambda *_: None,
                grant=platform.token(grant),
            )

        return grant, channel

    yield make
    for transport in transports:
        transport.close()


def echoed(channel: SecureChannel, data: bytes) -> bytes:
    got = b""
    while len(got) < len(data):
        got += channel.recv(65536)
    return got


def ready(channel: SecureChannel) -> SecureChannel:
    assert channel.recv(100) == b"ready\n"
    return channel


def test_a_session_through_the_relay(agent, open_session, platform, wait_until) -> None:
    grant, channel = open_session()
    channels = [ready(channel()) for _ in range(5)]
    block = os.urandom(300_000)
    for one in channels:
        sender = threading.Thread(target=one.sendall, args=(block,))
        sender.start()
        assert echoed(one, block) == block
        sender.join()
        one.close()
    assert platform.opened == [grant.session]
    platform.send("end", grant.session)
    wait_until(lambda: (grant.session, 1) in platform.complete, "the upload")


def test_a_kill_through_the_relay_says_why(agent, open_session, platform) -> None:
    grant, channel = open_session()
    one = ready(channel())
    with Metronome() as beat:
        started = time.monotonic()
        platform.send("kill", grant.session, "by bob")
        assert one.recv(100) == b"error: the session was killed: by bob\n"
        assert one.recv(100) == b""
        assert time.monotonic() - started - beat.lost() < 1
    one.close()


def test_a_renewed_link_takes_over_its_slot(agent, open_session, monkeypatch, wait_until) -> None:
    _, channel = open_session()
    one = ready(channel())
    tunnel = next(iter(agent.tunnels._wanted.values()))
    old = tunnel._link
    monkeypatch.setattr(tunnel, "_wants_renewal", lambda link: link is old)
    wait_until(lambda: tunnel._link is not old, "the new link")
    one.sendall(b"old link")
    assert echoed(one, b"old link") == b"old link"
    two = ready(open_session()[1]())
    assert tunnel._link.channels == 1
    one.close()
    wait_until(lambda: not old.alive, "the old link's end")
    two.sendall(b"new link")
    assert echoed(two, b"new link") == b"new link"
    two.close()


def test_a_draining_agent_gets_nothing_new(agent, open_session, wait_until) -> None:
    one = ready(open_session()[1]())
    stopping = threading.Thread(target=agent.stop)
    stopping.start()
    _, channel = open_session()

    def refused() -> bool:
        try:
            channel().close()
        except RefusedError:
            return True
        except (PamError, OSError):
            return False  # on a slow machine the agent's time to drain may be over in the middle of it
        return False

    wait_until(refused, "the route's end")
    assert one.recv(100) == b"error: the agent is stopping\n"
    one.close()
    stopping.join(60)
    assert not stopping.is_alive()
