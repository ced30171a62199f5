"""The SSH transport's bounds: what goes past each of them ends, and nothing grows or waits for ever."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import paramiko
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from paramiko.common import MSG_CHANNEL_DATA, MSG_GLOBAL_REQUEST
from patience import Metronome

from pam_common import fast_ssh, ssh_certs
from pam_common.errors import RefusedError, UnavailableError
from pam_common.fast_ssh import Transport, outgoing, packets, transport
from pam_common.fast_ssh.cipher import Key
from pam_common.keys import KeyEntry, SigningKey, VerifyKeys
from pam_common.ssh_certs import CertificateKey

CA, HOST, USER = (SigningKey(bytes([number]) * 32) for number in (1, 2, 3))


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair()
    yield near, far
    near.close()
    far.close()


class Door(paramiko.ServerInterface):
    """Lets everybody in."""

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        return 0  # paramiko.AUTH_SUCCESSFUL

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"


@pytest.fixture
def sides(sockets: tuple[socket.socket, socket.socket]) -> Iterator[tuple[Transport, Transport]]:
    """A client and a server that are logged in; the server leaves wishes for channels alone."""
    now = int(time.time())
    limits: dict[str, Any] = {"valid_after": now - 300, "valid_before": now + 600}
    host = ssh_certs.make_host_certificate(CA, HOST.public, key_id="r1", principals=["r1"], **limits)
    user = ssh_certs.make_user_certificate(
        CA, USER.public, key_id="s-1", principals=["connect:dc1"], **limits
    )
    door = Door()
    server = fast_ssh.serve(
        sockets[1], name="server", host_key=CertificateKey(HOST.seed(), host), server=door
    )
    server.on_direct_tcpip = lambda wish: None
    fast_ssh.start(server, door)
    client = fast_ssh.connect(
        sockets[0],
        name="client",
        host_ca=VerifyKeys([KeyEntry(CA.kid, CA.public)]),
        hostname="r1",
        login=CertificateKey(USER.seed(), user),
    )
    yield client, server
    for side in (client, server):
        side.close()
        side.join(60)
        assert not side.is_alive()


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def ended_with(side: Transport) -> str:
    side.join(60)
    assert not side.is_alive()
    return str(side.get_exception())


# -- before the login ----------------------------------------------------------------------------------


def test_an_endless_identification_is_refused(sockets: tuple[socket.socket, socket.socket]) -> None:
    sockets[1].sendall(b"x" * (packets.MAX_LINE + 1))
    with pytest.raises(paramiko.SSHException, match="line is too long"):
        packets.Packets(sockets[0]).readline(60)


@pytest.mark.parametrize(
    ("keyed", "most"), [(False, packets.MAX_PLAIN), (True, packets.MAX_PACKET)], ids=["plain", "keyed"]
)
def test_a_packet_beyond_the_limit_is_refused_before_it_comes(
    sockets: tuple[socket.socket, socket.socket], keyed: bool, most: int
) -> None:
    reader = packets.Packets(sockets[0])
    if keyed:
        reader._key_in = Key(AESGCM(bytes(16)), bytes(12))
    size = most + 16 - most % 16 - (0 if keyed else 4)  # the next that is a whole block
    sockets[1].sendall(struct.pack(">I", size))
    with pytest.raises(paramiko.SSHException, match=f"impossible packet length {size}"):
        reader.read_message()
    assert len(reader._buffer) == packets.READ_BUFFER


def test_a_key_exchange_of_too_many_packets_ends(sockets: tuple[socket.socket, socket.socket]) -> None:
    ignored = struct.pack(">IBB", 12, 10, 2) + bytes(10)
    sockets[1].sendall(ignored * (packets.MAX_PLAIN_PACKETS + 1))
    reader = packets.Packets(sockets[0])
    for _ in range(packets.MAX_PLAIN_PACKETS):
        reader.read_message()
    with pytest.raises(paramiko.SSHException, match="too many packets"):
        reader.read_message()


def test_who_sends_more_than_is_read_waits_in_the_kernel(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    """The read buffer is all that a connection costs, however much the peer sends."""
    reader = packets.Packets(sockets[0])
    sockets[1].setblocking(False)
    ignored = struct.pack(">IBB", 32764, 4, 2) + bytes(32762)
    sent = sockets[1].send(ignored * 100)
    for _ in range(min(sent // len(ignored), packets.MAX_PLAIN_PACKETS)):
        reader.read_message()
        assert len(reader._buffer) == packets.READ_BUFFER


def test_an_idle_connection_gives_its_buffer_back(
    sides: tuple[Transport, Transport], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, server = sides
    assert transport.KEEPALIVE_INTERVAL / 3 == packets.IDLE  # so often a reader wakes while it is silent
    monkeypatch.setattr(packets, "IDLE", 1)
    memory, filled = server.packets._memory, threading.Event()
    note = memory.note

    def noting(end: int) -> None:
        note(end)
        if memory.used:
            filled.set()

    monkeypatch.setattr(memory, "note", noting)
    for _ in range(3):
        server.watch()
        client.packets.send_payload(bytes([2]) + struct.pack(">I", 30_000) + bytes(30_000))
        assert filled.wait(60)
        wait_for(lambda: not memory.used)
        filled.clear()
    assert server.is_active()


# -- keys ----------------------------------------------------------------------------------------------


def test_a_peer_that_makes_no_new_keys_is_cut(
    sides: tuple[Transport, Transport], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, server = sides
    server.packets.rekey_packets = 20
    monkeypatch.setattr(server, "_send_kex_init", lambda: None)
    for _ in range(60):
        client.send_soon(bytes([2]) + bytes(4))
    assert "does not exchange keys" in ended_with(server)


def test_senders_do_not_wait_for_new_keys_for_ever(
    sides: tuple[Transport, Transport], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{type(sides[0].packets).send_payload.__module__}.REKEY_TIMEOUT", 0.1)
    sides[0].packets._open.clear()  # as between KEXINIT and NEWKEYS
    with pytest.raises(paramiko.SSHException, match="takes too long"):
        sides[0].packets.send_payload(bytes([MSG_GLOBAL_REQUEST]) + bytes(10))
    sides[0].packets._open.set()


@pytest.mark.parametrize("name", ["bytes", "packets"])
def test_new_keys_are_due_after_the_documented_traffic(sides: tuple[Transport, Transport], name: str) -> None:
    client, server = sides
    limit = {"bytes": 1 << 36, "packets": 1 << 31}[name]
    assert getattr(client.packets, f"rekey_{name}") == limit
    key = client.packets._key_out
    assert key is not None
    setattr(key, f"used_{name}", limit)
    client.send_soon(bytes([2]) + bytes(4))
    deadline = time.monotonic() + 60
    while client.packets._key_out is key:
        assert time.monotonic() < deadline, "no new keys"
        client.send_soon(bytes([2]) + bytes(4))
        time.sleep(0.01)
    assert server.is_active()


# -- requests and channels -----------------------------------------------------------------------------


def test_a_channel_that_nobody_answers_is_given_up(sides: tuple[Transport, Transport]) -> None:
    with pytest.raises(UnavailableError):
        fast_ssh.open_direct(sides[0], "dc1", timeout=0.2)


def test_requests_without_answer_are_bounded(
    sides: tuple[Transport, Transport], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "MAX_REQUESTS", 3)
    client, server = sides
    server._handler_table[MSG_GLOBAL_REQUEST] = lambda _message: None

    def ask() -> None:
        with pytest.raises(UnavailableError):
            client.global_request("keepalive@openssh.com")

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60
    while len(client._requests) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(UnavailableError, match="too many requests"):
        client.global_request("keepalive@openssh.com")
    client.close()
    for thread in threads:
        thread.join(60)


def test_a_long_reason_is_cut(sides: tuple[Transport, Transport]) -> None:
    sides[1].on_direct_tcpip = lambda wish: wish.refuse(1, "x" * 5000)
    with pytest.raises(RefusedError) as caught:
        fast_ssh.open_direct(sides[0], "dc1")
    assert str(caught.value).count("x") == 200


def test_what_is_ours_are_the_documented_times(sides: tuple[Transport, Transport]) -> None:
    client = sides[0]
    assert client.channel_timeout == transport.CHANNEL_TIMEOUT
    assert client.auth_timeout == client.banner_timeout == transport.HANDSHAKE_TIMEOUT
    client.watch()
    assert client.packets._interval == transport.KEEPALIVE_INTERVAL
    assert client.packets._deadline == transport.KEEPALIVE_DEADLINE


def test_a_connection_has_a_bounded_number_of_channels(
    sides: tuple[Transport, Transport], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "MAX_CHANNELS", 2)
    sides[1].on_direct_tcpip = lambda wish: wish.refuse(1, "no")
    held = [sides[0].new_stream(transport.WINDOW, transport.PACKET) for _ in range(2)]
    with pytest.raises(UnavailableError, match="too many"):
        fast_ssh.open_direct(sides[0], "dc1")
    assert len(held) == 2


# -- what waits to be sent -----------------------------------------------------------------------------


def test_small_packets_fill_the_queue_by_what_they_cost(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    link = packets.Packets(sockets[0])
    link.max_queued = 10 * outgoing.PACKET_COST
    for _ in range(9):
        link.queue(b"\x52")
    with pytest.raises(paramiko.SSHException, match="does not read"):
        link.queue(b"\x52")
    link.close()


def test_what_is_queued_is_sent_in_batches(sockets: tuple[socket.socket, socket.socket]) -> None:
    link = packets.Packets(sockets[0])
    for _ in range(100):
        link.queue(b"\x52" + bytes(20_000))
    with link._lock:
        assert outgoing.BATCH <= len(link._next_batch()) < outgoing.BATCH + 21_000
    link.close()


def test_a_peer_that_takes_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "STALL", 1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    with near, far:
        transport._set_blocking(near)
        link = packets.Packets(near)

        def send() -> None:
            for _ in range(10_000):
                link.send_payload(b"\x52" + bytes(30_000))

        with Metronome() as beat:
            started = time.monotonic()
            with pytest.raises(EOFError):
                send()
            assert time.monotonic() - started - beat.lost() < 10
        assert link.closed


@pytest.mark.parametrize("outgoing_first", [True, False])
def test_what_is_sent_earns_key_exchanges_whichever_key_changes_first(
    sockets: tuple[socket.socket, socket.socket], outgoing_first: bool
) -> None:
    """Which of the two NEWKEYS comes first is chance; who only sends must not be taken for a storm by it."""
    side = packets.Packets(sockets[0])
    side._use_key(Key(AESGCM(bytes(16)), bytes(12)))
    for _ in range(5 * packets.MAX_EXCHANGES):
        old = Key(AESGCM(bytes(16)), bytes(12))
        assert side._key_out is not None
        side._key_out.count(packets.EXCHANGE_TRAFFIC)
        if outgoing_first:
            side._use_key(Key(AESGCM(bytes(16)), bytes(12)))
        side._count_exchange(old)
        if not outgoing_first:
            side._use_key(Key(AESGCM(bytes(16)), bytes(12)))


def test_who_waits_for_a_low_queue_is_told_before_it_is_empty(
    sockets: tuple[socket.socket, socket.socket],
) -> None:
    """A connection is not to run dry while those who may send again hear of it."""
    ours, peers = packets.Packets(sockets[0]), sockets[1]
    left: list[tuple[int, int]] = []
    for _ in range(100):
        ours.queue(bytes((MSG_CHANNEL_DATA,)) + bytes(30_000))
    queued = ours.queued
    for _ in range(2):
        ours.when_low(queued // 2, lambda waited: left.append((waited, ours.queued)))
    assert ours.awaited
    assert not left
    ours.flush_soon()
    peers.settimeout(60)
    got = 0
    while got < 100 * 30_000:
        got += len(peers.recv(1 << 16))
    assert [waited for waited, _ in left] == [2, 2]
    assert all(0 < size <= queued // 2 for _, size in left)
    assert not ours.awaited
