"""Packets that are opened, sealed and passed on where they lie: what is in that memory next harms nobody."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Iterator

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st
from paramiko import SSHException
from paramiko.common import MSG_IGNORE

from pam_common.fast_ssh.cipher import TAG, Key
from pam_common.fast_ssh.outgoing import PACKET_HEAD, PACKET_TAIL
from pam_common.fast_ssh.packets import Packets
from pam_common.stream import ROOM

SECRET, IV = b"k" * 16, b"i" * 12
LARGE = 100_000


class Joined:
    """Two ends with one key from the first to the second."""

    def __init__(self) -> None:
        near, far = socket.socketpair()
        self.near, self.far = Packets(near), Packets(far)
        self.near._key_out = Key(AESGCM(SECRET), IV)
        self.far._key_in = Key(AESGCM(SECRET), IV)
        self.sockets = (near, far)

    def received(self) -> bytes:
        return bytes(self.far._next_payload())

    def close(self) -> None:
        self.near.close()
        for sock in self.sockets:
            sock.close()


@pytest.fixture
def joined() -> Iterator[Joined]:
    made = Joined()
    yield made
    made.close()


def opened(payload: bytes, padding: int = 0) -> memoryview:
    """A packet as ``packet_of`` gives it, in memory of its own; with more padding than there must be."""
    padding = (padding or 4) + -(1 + len(payload) + (padding or 4)) % 16
    size = 1 + len(payload) + padding
    packet = struct.pack(">IB", size, padding) + payload + os.urandom(padding) + bytes(TAG)
    return memoryview(bytearray(packet))


def test_what_is_passed_on_arrives_as_it_was(joined: Joined) -> None:
    for payload in (b"^" + os.urandom(LARGE), b"^", b"^" + os.urandom(11)):
        assert joined.near.pass_on(opened(payload))
        assert joined.received() == payload


@pytest.mark.parametrize("padding", [16, 100, 239])
def test_more_padding_than_ours_is_passed_on(joined: Joined, padding: int) -> None:
    assert joined.near.pass_on(opened(b"^data", padding))
    assert joined.received() == b"^data"


def test_what_the_socket_does_not_take_is_sent_later_though_its_memory_is_used_again(joined: Joined) -> None:
    memory = opened(b"^" + bytes(LARGE))
    sent = []
    while True:
        payload = b"^" + os.urandom(LARGE)
        memory[:] = opened(payload)
        if not joined.near.pass_on(memory):
            break
        sent.append(payload)
        memory[:] = bytes(len(memory))
    assert len(sent) > 1
    # What comes after it waits for its turn.
    joined.near.send_soon(b"\2after")
    assert [joined.received() for _ in sent] == sent
    assert joined.received() == b"\2after"


def locked(packets: Packets) -> None:
    assert packets._lock.acquire()


@pytest.mark.parametrize(
    "busy",
    [
        pytest.param(lambda packets: packets.queue(b"^first"), id="others wait"),
        pytest.param(locked, id="another thread sends"),
        pytest.param(lambda packets: setattr(packets, "_unsent", memoryview(b"rest")), id="half is sent"),
        pytest.param(lambda packets: packets._begin_exchange(), id="keys are exchanged"),
        pytest.param(lambda packets: setattr(packets, "_key_out", None), id="no keys yet"),
    ],
)
def test_nobody_is_passed(joined: Joined, busy: Callable[[Packets], None]) -> None:
    busy(joined.near)
    packet = opened(b"^second")
    before = bytes(packet)
    assert not joined.near.pass_on(packet)
    assert packet == before  # to be queued as it is


def test_a_connection_that_is_gone_is_told(joined: Joined) -> None:
    joined.near.close()
    with pytest.raises(EOFError):
        joined.near.pass_on(opened(b"^data"))
    assert joined.near._lock.acquire(blocking=False)


def test_only_the_packet_at_hand_is_given_out(joined: Joined) -> None:
    joined.near.send_payload(b"^one")
    payload = joined.far._next_payload()
    packet = joined.far.packet_of(payload[1:])
    assert packet is not None
    assert packet[PACKET_HEAD : PACKET_HEAD + 4] == b"^one"
    assert joined.far.packet_of(memoryview(b"one")) is None


def test_a_packet_that_was_altered_is_not_given_out(joined: Joined) -> None:
    sealed = bytearray(joined.near._seal(b"^one"))
    sealed[20] ^= 1
    joined.sockets[0].sendall(sealed)
    with pytest.raises(SSHException, match="forged or damaged"):
        joined.far._next_payload()


@given(payload=st.binary(min_size=1, max_size=300), room=st.integers(0, 40))
def test_sealing_in_place_touches_only_its_room(payload: bytes, room: int) -> None:
    joined = Joined()
    try:
        start = PACKET_HEAD + room
        memory = memoryview(bytearray(b"#" * (start + len(payload) + PACKET_TAIL + room)))
        memory[start : start + len(payload)] = payload
        joined.near.send_in_place(memory, start, start + len(payload))
        assert joined.received() == payload
        assert memory[:room] == b"#" * room
        assert memory[start + len(payload) + PACKET_TAIL :] == b"#" * room
    finally:
        joined.close()


def test_in_place_or_not_the_packets_have_one_form(joined: Joined) -> None:
    for size in range(1, 40):
        joined.near.send_payload(bytes([MSG_IGNORE]) + bytes(size))
        memory = memoryview(bytearray(ROOM) + bytes([MSG_IGNORE]) + bytes(size + ROOM))
        joined.near.send_in_place(memory, ROOM, ROOM + 1 + size)
        lengths = []
        for _ in range(2):
            assert joined.received() == bytes([MSG_IGNORE]) + bytes(size)
            lengths.append(len(joined.far._packet))
        assert lengths[0] == lengths[1]
