"""AES-CTR packets: what one end seals the other opens, and nothing else."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterator

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from paramiko import Message, SSHException

from pam_common.fast_ssh.legacy import LegacyPackets
from pam_common.fast_ssh.packets import MAX_PACKET

MACS = [(hashlib.sha1, 20), (hashlib.sha256, 32), (hashlib.sha512, 64)]


def engine(*, seal: bool) -> object:
    cipher = Cipher(algorithms.AES(b"k" * 16), modes.CTR(b"i" * 16))
    return cipher.encryptor() if seal else cipher.decryptor()


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair()
    with near, far:
        near.settimeout(60)
        far.settimeout(60)
        yield near, far


def pair(sockets, mac=MACS[1], *, etm: bool = False) -> tuple[LegacyPackets, LegacyPackets]:
    keys = {"block_size": 16, "mac_engine": mac[0], "mac_size": mac[1], "mac_key": b"m" * mac[1], "etm": etm}
    near, far = LegacyPackets(sockets[0]), LegacyPackets(sockets[1])
    near.set_outbound_cipher(engine(seal=True), aead=False, iv_out=None, sdctr=True, **keys)
    far.set_inbound_cipher(engine(seal=False), aead=False, iv_in=None, **keys)
    return near, far


def message(content: bytes) -> Message:
    made = Message()
    made.add_byte(b"\x5e")
    made.add_bytes(content)
    return made


@pytest.mark.parametrize("etm", [False, True])
@pytest.mark.parametrize("mac", MACS, ids=["sha1", "sha256", "sha512"])
def test_what_is_sealed_is_opened(sockets, mac, etm) -> None:
    near, far = pair(sockets, mac, etm=etm)
    for content in (b"", b"x", b"y" * 15, b"z" * 16, bytes(30_000)):
        near.send_message(message(content))
        kind, read = far.read_message()
        assert (kind, read.asbytes()) == (0x5E, content)


@pytest.mark.parametrize("etm", [False, True])
@pytest.mark.parametrize("at", [0, 4, 17, -1])
def test_a_changed_packet_ends_the_connection(sockets, etm, at) -> None:
    near, _ = pair(sockets, etm=etm)
    near.send_message(message(b"content of a packet"))
    packet = bytearray(sockets[1].recv(65536))
    packet[at] ^= 0x10
    other = socket.socketpair()
    with other[0], other[1]:
        other[1].settimeout(60)
        _, far = pair(other, etm=etm)
        other[0].sendall(packet + bytes(MAX_PACKET))
        with pytest.raises(SSHException):
            far.read_message()


@pytest.mark.parametrize("etm", [False, True])
def test_a_packet_is_not_taken_twice(sockets, etm) -> None:
    near, far = pair(sockets, etm=etm)
    near.send_message(message(b"once"))
    packet = sockets[1].recv(65536)
    sockets[0].sendall(packet + packet + bytes(MAX_PACKET))
    far.read_message()
    with pytest.raises(SSHException):
        far.read_message()
