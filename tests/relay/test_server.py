"""The relay over real sockets: what passes, what is refused, what is cut."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import threading
import time

import paramiko
import pytest

from pam_common import fast_ssh
from pam_common.errors import AuthenticationError, RefusedError, UnavailableError
from pam_common.fast_ssh import Transport
from pam_common.keys import SigningKey, VerifyKeys, new_session_id
from pam_relay.config import Limits


def echo(client: Transport, data: bytes = b"hello", gateway: str = "dc1") -> bytes:
    stream = fast_ssh.open_direct(client, gateway)
    threading.Thread(
        target=lambda: (stream.sendall(data), stream.shutdown(socket.SHUT_WR)), daemon=True
    ).start()
    answer = bytearray()
    while piece := stream.recv(1 << 17):
        answer += piece
    stream.close()
    return bytes(answer)


# -- what passes ---------------------------------------------------------------------------------------


def test_a_client_reaches_its_gateways_agent(relay, wait_for) -> None:
    agent = relay.agent()
    session = new_session_id()
    assert echo(relay.client(session)) == b"hello"
    assert agent.origins == [(session, 0)]
    wait_for(lambda: relay.relay.channels == 0)
    status = relay.relay.status()
    assert status["routes"] == [{"gateway": "dc1", "agent": "dc1-a", "slot": 1, "channels": 0}]
    assert status["transports"] == 2


def test_many_channels_carry_their_own_bytes(relay) -> None:
    relay.agent()
    client = relay.client()
    wrong: list[int] = []

    def work(number: int) -> None:
        data = os.urandom(300_000 + number)
        if hashlib.sha256(echo(client, data)).digest() != hashlib.sha256(data).digest():
            wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not wrong


def test_sessions_spread_over_agents_and_stay_where_they_are(relay, wait_for) -> None:
    agents = [relay.agent("dc1-a"), relay.agent("dc1-b")]
    clients = [relay.client(), relay.client()]
    held = [fast_ssh.open_direct(client, "dc1") for client in clients]
    wait_for(lambda: all(len(agent.streams) == 1 for agent in agents))
    for client in clients:
        for _ in range(3):
            held.append(fast_ssh.open_direct(client, "dc1"))
    wait_for(lambda: all(len(agent.streams) == 4 for agent in agents))
    assert all(len(set(agent.origins)) == 1 for agent in agents)


def test_a_slow_reader_slows_the_writer(relay, wait_for) -> None:
    """A reader that is slower than the target must not fill the relay's memory."""
    agent = relay.agent(echo=False)
    client = fast_ssh.open_direct(relay.client(), "dc1")
    wait_for(lambda: agent.streams)
    sent = [0]

    def write() -> None:
        with contextlib.suppress(OSError):
            while True:
                agent.streams[0].sendall(bytes(65536))
                sent[0] += 65536

    threading.Thread(target=write, daemon=True).start()
    last = -1
    while last != sent[0] or not sent[0]:
        last = sent[0]
        time.sleep(0.3)
    # A window, and what the relay and the sockets between may hold.
    assert sent[0] <= 3 * (1 << 20) + (1 << 18)
    client.recv(1 << 20)
    wait_for(lambda: sent[0] > last)


def test_a_cut_on_one_side_is_a_cut_on_the_other(relay, wait_for) -> None:
    agent = relay.agent(echo=False)
    client = relay.client()
    for aborts_client in (True, False):
        near = fast_ssh.open_direct(client, "dc1")
        wait_for(lambda: agent.streams)
        far = agent.streams.pop()
        first, second = (near, far) if aborts_client else (far, near)
        first.abort()
        with pytest.raises(ConnectionError):
            second.recv(10)
        wait_for(lambda: relay.relay.channels == 0)


def test_the_newest_tunnel_of_a_slot_wins_and_another_slot_stays(relay, wait_for) -> None:
    old, other, new = relay.agent(), relay.agent(slot=2), relay.agent()
    client = relay.client()
    streams = [fast_ssh.open_direct(client, "dc1") for _ in range(4)]
    wait_for(lambda: len(other.streams) == 2 and len(new.streams) == 2)
    assert not old.streams
    assert len(streams) == 4
    old.transport.close()
    wait_for(lambda: relay.relay.status()["transports"] == 3)
    assert len(relay.relay.status()["routes"]) == 2


def test_a_draining_agent_keeps_its_channels_and_gets_no_more(relay, wait_for) -> None:
    agent = relay.agent()
    client = relay.client()
    stream = fast_ssh.open_direct(client, "dc1")
    agent.transport.cancel_port_forward("dc1", 1)
    with pytest.raises(RefusedError, match="no agent of gateway dc1"):
        fast_ssh.open_direct(client, "dc1")
    stream.sendall(b"still here")
    assert stream.recv(100) == b"still here"


def test_a_dead_tunnel_is_passed_over(relay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pam_relay.server.OPEN_TIMEOUT", 5)
    dead, alive = relay.agent("dc1-a"), relay.agent("dc1-b")
    dead.transport._handler_table[90] = lambda _message: None  # takes the wish, never answers
    assert echo(relay.client()) == b"hello"
    assert len(alive.streams) == 1


# -- what is refused -----------------------------------------------------------------------------------


def test_a_client_reaches_no_other_gateway_or_port(relay) -> None:
    """Wrong gateway, other ports, other hosts: one principal decides (CVE-2022-36130)."""
    relay.agent()
    relay.agent("dc2-a", "dc2")
    client = relay.client()
    for address, port in (("dc2", 1), ("dc1", 2), ("dc1", 0), ("DC1", 1), ("127.0.0.1", 22), ("", 1)):
        with pytest.raises(paramiko.ChannelException) as refused:
            client.open_channel("direct-tcpip", (address, port), ("127.0.0.1", 0))
        assert refused.value.code == 1


def test_a_client_may_not_forward_and_an_agent_may_not_connect(relay) -> None:
    """Port forwarding that skips authorisation (Teleport 10.3.11)."""
    relay.agent()
    with pytest.raises(paramiko.SSHException):
        relay.client().request_port_forward("dc1", 1)
    with pytest.raises(RefusedError):
        fast_ssh.open_direct(relay.agent().transport, "dc1")


def test_an_agent_serves_only_its_own_gateway_and_slots(relay) -> None:
    agent = relay.agent()
    for address, port in (("dc2", 1), ("dc1", 0), ("dc1", 17), ("0.0.0.0", 8080), ("", 1), ("DC1", 1)):
        with pytest.raises(paramiko.SSHException):
            agent.transport.request_port_forward(address, port)
    assert len(relay.relay.status()["routes"]) == 1


def test_an_agent_cannot_cancel_anothers_route(relay) -> None:
    """Cancelling others' forwards (Teleport 18.9)."""
    relay.agent("dc1-a")
    other = relay.agent("dc1-b", slot=2)
    other.transport.cancel_port_forward("dc1", 1)
    relay.agent("dc2-a", "dc2").transport.cancel_port_forward("dc1", 1)
    assert {route["agent"] for route in relay.relay.status()["routes"]} == {"dc1-a", "dc1-b", "dc2-a"}


@pytest.mark.parametrize(
    "kind", ["session", "x11", "auth-agent@openssh.com", "forwarded-tcpip", "tun@openssh.com"]
)
def test_other_channels_are_refused(relay, kind: str) -> None:
    for transport in (relay.client(), relay.agent().transport):
        with pytest.raises(paramiko.ChannelException) as refused:
            transport.open_channel(kind, ("dc1", 1), ("127.0.0.1", 0))
        assert refused.value.code == 1
        assert transport.global_request("streamlocal-forward@openssh.com", ("/tmp/x",)) is None


@pytest.mark.parametrize(
    ("principal", "key_id", "options"),
    [
        ("connect:dc9", None, {}),
        ("connect:", None, {}),
        ("connect:DC1", None, {}),
        ("root", None, {}),
        ("connect:dc1", "dc1-a", {}),
        ("serve:dc1", "No-Label", {}),
        ("connect:dc1", None, {"principals": ["connect:dc1", "connect:dc2"]}),
        ("connect:dc1", None, {"principals": ["connect:dc1", "serve:dc1"]}),
        ("connect:dc1", None, {"lifetime": -10}),
        ("connect:dc1", None, {"ca": SigningKey(b"9" * 32)}),
        ("connect:dc1", None, {"source_addresses": ["192.0.2.0/24"]}),
    ],
)
def test_other_certificates_do_not_log_in(relay, principal, key_id, options) -> None:
    """Certificate trust confusion (CVE-2025-49825)."""
    with pytest.raises(RefusedError):
        relay.connect(relay.login(principal, key_id or new_session_id(), **options))
    assert relay.relay.status()["routes"] == []


def test_source_addresses_that_fit_let_in(relay) -> None:
    relay.agent()
    assert echo(relay.client(source_addresses=["192.0.2.0/24", "127.0.0.0/8"])) == b"hello"


def test_no_agent_is_said_in_words(relay) -> None:
    with pytest.raises(RefusedError, match="no agent of gateway dc1 is connected"):
        fast_ssh.open_direct(relay.client(), "dc1")


# -- limits --------------------------------------------------------------------------------------------


def test_stalled_handshakes_do_not_stop_others_and_end_in_time(world, wait_for) -> None:
    """A stalled handshake blocks the listener; slow-loris (CVE-2026-7776, CVE-2024-12289)."""
    world.start(Limits(login_timeout=20, unauthenticated_per_address=50))
    stalled = [socket.create_connection(world.address) for _ in range(30)]
    for number, sock in enumerate(stalled):
        sock.sendall((b"", b"SSH-2.0-slow", b"SSH-2.0-slow\r\n", b"SSH-2.0-slow\r\n\0\0")[number % 4])
    world.agent()
    assert echo(world.client()) == b"hello"
    for sock in stalled:
        sock.settimeout(60)
        with contextlib.suppress(ConnectionError):
            while sock.recv(4096):
                pass
        sock.close()
    wait_for(lambda: world.relay.status()["unauthenticated"] == 0)


def test_unauthenticated_connections_are_counted_per_address_and_in_all(world, wait_for) -> None:
    world.start(Limits(unauthenticated=5, unauthenticated_per_address=3))
    held = [socket.create_connection(world.address) for _ in range(3)]
    wait_for(lambda: world.relay.status()["unauthenticated"] == 3)
    with pytest.raises(UnavailableError):
        world.client()
    others = [socket.create_connection(world.address, source_address=("127.0.0.2", 0)) for _ in range(2)]
    wait_for(lambda: world.relay.status()["unauthenticated"] == 5)
    # Full: the longest waiting one gives way, so that those who log in at once still can.
    extra = socket.create_connection(world.address, source_address=("127.0.0.3", 0))
    held[0].settimeout(60)
    with contextlib.suppress(ConnectionError):
        while held[0].recv(4096):
            pass
    wait_for(lambda: world.relay.status()["transports"] == 5)
    world.client()
    for sock in (*held, *others, extra):
        sock.close()
    wait_for(lambda: world.relay.status()["unauthenticated"] == 0)


def test_transports_and_channels_are_limited(world, wait_for) -> None:
    world.start(Limits(transports=3, channels=4, channels_per_session=3, channels_per_agent=4))
    world.agent()
    first, second = world.client(), world.client()
    with pytest.raises(UnavailableError):
        world.client()
    held = [fast_ssh.open_direct(first, "dc1") for _ in range(3)]
    with pytest.raises(RefusedError, match="the session has too many channels"):
        fast_ssh.open_direct(first, "dc1")
    held.append(fast_ssh.open_direct(second, "dc1"))
    with pytest.raises(RefusedError, match="the relay has too many channels"):
        fast_ssh.open_direct(second, "dc1")
    held.pop().abort()
    wait_for(lambda: world.relay.channels == 3)
    held.append(fast_ssh.open_direct(second, "dc1"))


def test_an_agents_channels_are_limited(world) -> None:
    world.start(Limits(channels_per_agent=1))
    world.agent()
    held = fast_ssh.open_direct(world.client(), "dc1")
    with pytest.raises(RefusedError, match="agent dc1-a has too many channels"):
        fast_ssh.open_direct(world.client(), "dc1")
    held.close()


def test_refused_channels_leave_no_count_behind(relay, wait_for) -> None:
    agent = relay.agent()
    agent.transport._tcp_handler = None  # the agent refuses every channel
    client = relay.client()
    for _ in range(5):
        with pytest.raises(RefusedError):
            fast_ssh.open_direct(client, "dc1")
    wait_for(lambda: relay.relay.channels == 0)
    assert relay.relay.status()["sessions"] == 0


# -- revocation, expiry, renewal, drain ----------------------------------------------------------------


def test_a_revoked_session_is_cut_and_stays_out(relay, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session outlives its revocation (CVE-2021-41767)."""
    monkeypatch.setattr("pam_relay.server.LAST_WORDS", 10.0)  # on a busy machine words take longer, too
    relay.agent()
    session = new_session_id()
    client, other = relay.client(session), relay.client()
    stream, kept = fast_ssh.open_direct(client, "dc1"), fast_ssh.open_direct(other, "dc1")
    relay.relay.update(relay.bundle(2, revoked_sessions=frozenset({session})))
    with pytest.raises(RefusedError, match="revoked"):
        fast_ssh.open_direct(client, "dc1")
    stream.sendall(b"last words")  # the agent may still say why
    assert stream.recv(10) == b"last words"
    with pytest.raises(ConnectionError):
        stream.recv(10)
    with pytest.raises(RefusedError):
        relay.client(session)
    kept.sendall(b"x")
    assert kept.recv(10) == b"x"


def test_a_revoked_agent_is_cut_with_all_its_channels(relay, wait_for) -> None:
    agent = relay.agent()
    stream = fast_ssh.open_direct(relay.client(), "dc1")
    relay.relay.update(relay.bundle(2, revoked_agents=frozenset({"dc1-a"})))
    with pytest.raises(ConnectionError):
        stream.recv(10)
    wait_for(lambda: not agent.transport.is_active())
    wait_for(lambda: relay.relay.status()["routes"] == [])  # the relay's own thread takes note of the end
    with pytest.raises(RefusedError):
        relay.agent()


def test_a_deleted_gateway_or_ca_ends_its_links(relay, wait_for) -> None:
    """A session outlives the deletion of its gateway (Teleport 9.3.25)."""
    agent, client = relay.agent(), relay.client()
    other = relay.client(gateway="dc2")
    relay.relay.update(relay.bundle(2, gateways=frozenset({"dc2"})))
    wait_for(lambda: not agent.transport.is_active() and not client.is_active())
    assert other.is_active()
    relay.relay.update(relay.bundle(3, user_ca=VerifyKeys.of(SigningKey.generate().public)))
    wait_for(lambda: not other.is_active())


def test_an_older_bundle_is_refused(relay) -> None:
    relay.relay.update(relay.bundle(5))
    with pytest.raises(AuthenticationError, match="older"):
        relay.relay.update(relay.bundle(4))
    assert relay.relay.bundle.serial == 5


def test_a_tunnel_ends_with_its_certificate(relay, wait_for) -> None:
    agent = relay.agent(lifetime=20)
    stays = relay.agent("dc1-b")
    wait_for(lambda: not agent.transport.is_active())
    assert stays.transport.is_active()
    wait_for(lambda: len(relay.relay.status()["routes"]) == 1)


def test_a_clients_connection_ends_with_its_certificate_once_it_is_idle(relay, wait_for) -> None:
    relay.agent()
    idle, busy = relay.client(lifetime=20), relay.client(lifetime=20)
    stream = fast_ssh.open_direct(busy, "dc1")
    wait_for(lambda: not idle.is_active())
    stream.sendall(b"still in its session")
    assert stream.recv(100) == b"still in its session"
    stream.close()
    wait_for(lambda: not busy.is_active())


def test_the_host_certificate_is_renewed_live(relay) -> None:
    before = relay.client()
    renewed = relay.host_certificate(lifetime=9999)
    relay.relay.update(relay.bundle(2, host_certificate=renewed))
    after = relay.client()
    assert before.is_active()
    assert after.host_certificate() != before.host_certificate()
    assert relay.relay.status()["host_certificate_expires"] > time.time() + 9000


def test_a_bundle_for_another_host_key_changes_nothing(relay) -> None:
    other = SigningKey.generate()
    relay_key, relay.host = relay.host, other
    bundle = relay.bundle(2)
    relay.host = relay_key
    with pytest.raises(AuthenticationError, match="another key"):
        relay.relay.update(bundle)
    assert relay.relay.bundle.serial == 1


def test_draining_refuses_the_new_and_keeps_the_open(relay, wait_for) -> None:
    relay.agent()
    client = relay.client()
    stream = fast_ssh.open_direct(client, "dc1")
    relay.relay.drain()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(relay.address)
    with pytest.raises(RefusedError, match="the relay is stopping"):
        fast_ssh.open_direct(client, "dc1")
    stream.sendall(b"still here")
    assert stream.recv(100) == b"still here"
    assert relay.relay.channels == 1
    stream.close()
    wait_for(lambda: relay.relay.channels == 0)
    relay.relay.close()
    wait_for(lambda: not client.is_active())
