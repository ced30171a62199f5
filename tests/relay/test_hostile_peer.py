"""A peer that has logged in and means harm: it is cut off, the log says why, and nobody else notices."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import paramiko
import pytest
from paramiko.common import (
    MSG_CHANNEL_CLOSE,
    MSG_CHANNEL_DATA,
    MSG_CHANNEL_EOF,
    MSG_CHANNEL_WINDOW_ADJUST,
)
from patience import Metronome
from stalling import Target

from pam_common import fast_ssh
from pam_common.errors import PamError, UnavailableError
from pam_common.fast_ssh import Transport, packets
from pam_common.fast_ssh.channel import MIN_PACKET, PACKET, WINDOW
from pam_common.keys import VerifyKeys
from pam_relay.config import Limits

#: A round trip of somebody else's session, meanwhile; seconds on a machine that does other things as well,
#: beyond those that it kept from us.
PATIENCE = 10.0


def raw(kind: int, number: int, body: bytes = b"") -> bytes:
    return struct.pack(">BI", kind, number) + body


def data(number: int, size: int) -> bytes:
    return raw(MSG_CHANNEL_DATA, number, struct.pack(">I", size) + bytes(size))


class Bystander:
    """Somebody else's session beside the attack, on the same agent: its round trips go on."""

    def __init__(self, stream: Any) -> None:
        self.trips = 0
        self.worst = 0.0
        self.error: BaseException | None = None
        self._stream = stream
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with Metronome() as beat:
                while not self._stop.wait(0.002):
                    began, lost = time.monotonic(), beat.lost()
                    self._stream.sendall(b"x" * 64)
                    got = 0
                    while got < 64:
                        got += len(self._stream.recv(64))
                    self.worst = max(self.worst, time.monotonic() - began - (beat.lost() - lost))
                    self.trips += 1
        except BaseException as error:  # noqa: BLE001  told by the fixture
            self.error = error

    def check(self) -> None:
        before = self.trips
        end = time.monotonic() + 60
        while self.trips < before + 5 and time.monotonic() < end and not self.error:
            time.sleep(0.005)
        self._stop.set()
        self._thread.join(60)
        assert self.error is None
        assert self.trips >= before + 5
        assert self.worst < PATIENCE


@pytest.fixture(autouse=True)
def log_of_an_operator(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "pam")


@pytest.fixture
def bystander(relay: Any) -> Iterator[Bystander]:
    """A session of another agent's and another client's link."""
    relay.agent("dc2-a", gateway="dc2")
    found = Bystander(fast_ssh.open_direct(relay.client(gateway="dc2"), "dc2"))
    yield found
    found.check()


@pytest.fixture
def why_cut(caplog: pytest.LogCaptureFixture, wait_for: Callable[..., None]) -> Callable[[], str]:
    """Wait for the log line of a link that was cut; its reason."""

    def look() -> str:
        found: list[str] = []

        def seen() -> bool:
            found[:] = [
                str(record.pam_fields["reason"])  # type: ignore[attr-defined]
                for record in caplog.records
                if record.getMessage() == "link cut"
            ]
            return bool(found)

        wait_for(seen)
        return found[0]

    return look


def send(transport: Transport, *payloads: bytes) -> None:
    """As a program would that does not care what is allowed."""
    with contextlib.suppress(EOFError, paramiko.SSHException):
        for payload in payloads:
            transport.packets.send_payload(payload)


ATTACKS: dict[str, tuple[Callable[[int], list[bytes]], str]] = {
    "window": (lambda n: [data(n, 32_000)] * (WINDOW // 32_000 + 2), "more than its window"),
    "large data": (lambda n: [data(n, PACKET + 1)], "larger packets"),
    "unknown channel": (lambda n: [data(n + 1000, 10)], "never was"),
    "close of an unknown channel": (lambda n: [raw(MSG_CHANNEL_CLOSE, n + 1000)], "never was"),
    "data after EOF": (lambda n: [raw(MSG_CHANNEL_EOF, n), data(n, 1)], "after its EOF"),
    "data after CLOSE": (lambda n: [raw(MSG_CHANNEL_CLOSE, n), raw(MSG_CHANNEL_CLOSE, n)] * 2, ""),
    "opened twice": (lambda n: [raw(91, n, struct.pack(">III", 7, 7, 7))], "opened again"),
    "refused when open": (lambda n: [raw(92, n, struct.pack(">III", 1, 0, 0))], "was refused"),
    "lengths that lie": (lambda n: [raw(MSG_CHANNEL_DATA, n, b"\xff\xff\xff\xff")], "malformed"),
    "stderr": (lambda n: [raw(95, n, struct.pack(">II", 1, 1) + b"x")], "no use for"),
    "endless room": (
        lambda n: [raw(MSG_CHANNEL_WINDOW_ADJUST, n, b"\xff\xff\xff\xff")] * 2,
        "4 GiB",
    ),
    "answers to nothing": (lambda _n: [b"\x51"] * 3, "nobody asked"),
    "a shell's success": (lambda n: [raw(99, n)], "no use for"),
}


@pytest.mark.parametrize("side", ["client", "agent"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_on_channels_is_cut_off_and_logged(
    relay, join, bystander, why_cut, wait_for, attack: str, side: str
) -> None:
    near, far = join()
    hostile, stream = (join.client, near) if side == "client" else (join.agent.transport, far)
    make, words = ATTACKS[attack]
    send(hostile, *make(stream.remote))
    if not words:  # a close that crossed ours is no attack: nothing comes of it
        send(hostile, data(stream.remote, 10))
        near_again, far_again = join()
        near_again.sendall(b"still here")
        assert far_again.recv(100) == b"still here"
        return
    assert words in why_cut()
    wait_for(lambda: not hostile.is_active())
    wait_for(lambda: relay.relay.channels == 1)


def test_who_takes_next_to_nothing_in_a_packet_is_cut_off(relay, join, bystander, why_cut) -> None:
    """An agent would have to make a packet of each byte. It never hears of it."""
    join()
    with pytest.raises(UnavailableError):
        join.client.open_stream("direct-tcpip", ("dc1", 1), ("127.0.0.1", 0), 60, packet=MIN_PACKET - 1)
    assert "packets of next to no size" in why_cut()
    assert join.agent.transport.is_active()


def test_a_packet_beyond_all_limits_is_cut_off_before_it_is_read(relay, join, bystander, why_cut) -> None:
    join()
    with join.client.packets._lock:
        join.client.packets._socket.sendall(struct.pack(">I", packets.MAX_PACKET + 4) + bytes(64))
    assert "impossible packet length" in why_cut()


def test_a_storm_of_key_exchanges_is_cut_off(relay, join, bystander, why_cut, wait_for) -> None:
    join()
    client = join.client
    keys = set()

    def storm() -> None:
        with contextlib.suppress(EOFError, paramiko.SSHException):
            while client.is_active():
                keys.add(id(client.packets._key_out))
                client.packets._need_rekey = True
                client.packets.send_payload(bytes([2]) + bytes(4))
                time.sleep(0.01)

    # Its own side must not mind.
    client.packets._count_exchange = lambda _old: None
    # The reader looks whether keys are due after a packet that it was sent.
    thread = threading.Thread(target=storm, daemon=True)
    thread.start()
    side = next(
        link.transport
        for link in relay.relay._links.values()
        if link.transport.sock.getpeername() == client.sock.getsockname()
    )
    while client.is_active() and thread.is_alive():
        with contextlib.suppress(EOFError, paramiko.SSHException):
            side.send_soon(struct.pack(">BI", 80, 20) + b"keepalive@openssh.com"[:20] + b"\0")
        time.sleep(0.01)
    assert "exchanges keys all the time" in why_cut()
    thread.join(60)
    assert not thread.is_alive()


def test_traffic_earns_key_exchanges(relay, join) -> None:
    """A peer with a low limit of its own is no storm."""
    near, far = join()
    join.client.packets.rekey_bytes = 2 * packets.EXCHANGE_TRAFFIC
    first = join.client.packets._key_out
    reader = threading.Thread(
        target=lambda: [far.recv(1 << 20) for _ in iter(lambda: far.eof_received, True)]
    )
    reader.start()
    for _ in range(40):
        near.sendall(bytes(packets.EXCHANGE_TRAFFIC))
    near.shutdown(socket.SHUT_WR)
    reader.join(120)
    assert not reader.is_alive()
    assert join.client.is_active()
    assert join.client.packets._key_out is not first


def test_a_flood_of_opens_gets_no_more_than_its_share(world, wait_for, caplog) -> None:
    world.start(Limits(channels_per_session=10))
    world.agent()
    beside = Bystander(fast_ssh.open_direct(world.client(), "dc1"))
    hostile = world.client()
    opening = struct.pack(">BI12sIII", 90, 12, b"direct-tcpip", 0, WINDOW, 32768)
    where = struct.pack(">I3sI", 3, b"dc1", 1) + struct.pack(">I9sI", 9, b"127.0.0.1", 0)
    # All with the same number of its own, which is its own affair.
    send(hostile, *[opening + where] * 500)
    wait_for(lambda: sum(record.getMessage() == "channel refused" for record in caplog.records) == 490)
    wait_for(lambda: world.relay.channels == 11)
    beside.check()
    hostile.close()
    wait_for(lambda: world.relay.channels <= 1)


def test_a_peer_that_no_longer_answers_is_cut_off(relay, join, bystander, why_cut) -> None:
    join()
    for link in list(relay.relay._links.values()):
        if link.transport.sock.getpeername() == join.client.sock.getsockname():
            link.transport.watch(1.0, 1.0)
    join.client._handler_table[80] = lambda _message: None
    join.client.watch(0, 0)
    assert "no longer answers" in why_cut()


def test_a_key_exchange_that_never_ends_is_cut_off(
    relay, join, bystander, why_cut, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could be kept alive for ever, with packets that a key exchange allows."""
    monkeypatch.setattr("pam_common.fast_ssh.outgoing.REKEY_TIMEOUT", 1.0)
    join()
    client = join.client
    client._expected_packet = ()
    client._parse_kex_init = lambda _message: None
    client._handler_table[20] = lambda _message: None
    kexinit = bytes([20]) + client._latest_kex_init[1:]
    client.packets.queue(kexinit)
    client.packets._open.set()
    client.packets._exchanging = 0.0
    client.packets.flush_soon()

    def keep_alive() -> None:
        while client.is_active():
            send(client, bytes([2]) + bytes(4))
            time.sleep(0.1)

    threading.Thread(target=keep_alive, daemon=True).start()
    assert "takes too long" in why_cut()


# -- stalls in the handshake -----------------------------------------------------------------------------


def test_a_stall_at_any_point_of_the_login_is_cut_off(world, wait_for, caplog, monkeypatch) -> None:
    """Before the identification, within it, within and between the packets of key exchange and login."""
    world.start(Limits(login_timeout=10, unauthenticated_per_address=100))
    world.agent()
    beside = Bystander(fast_ssh.open_direct(world.client(), "dc1"))
    whole = Target(world.address[1])
    connect(world, whole.port).close()
    stalls = [Target(world.address[1], most_up=whole.up * step // 24) for step in range(24)]
    for stall in stalls:
        threading.Thread(target=attempt, args=(world, stall.port), daemon=True).start()

    def late() -> int:
        closed = [record for record in list(caplog.records) if record.getMessage() == "link closed"]
        return sum(record.pam_fields["reason"] == "no login in time" for record in closed)

    wait_for(lambda: late() >= len(stalls))
    wait_for(lambda: world.relay.status()["unauthenticated"] == 0)
    beside.check()
    for stall in (whole, *stalls):
        stall.close()


def connect(world: Any, port: int) -> Transport:
    key = world.login("connect:dc1", "s-" + "a" * 26)
    host_ca = VerifyKeys.of(world.host_ca.public)
    sock = socket.create_connection(("127.0.0.1", port))
    return fast_ssh.connect(sock, name="stalled", host_ca=host_ca, hostname="r1", login=key)


def attempt(world: Any, port: int) -> None:
    with contextlib.suppress(PamError, OSError):
        connect(world, port)
