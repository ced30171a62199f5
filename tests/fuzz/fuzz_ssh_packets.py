"""SSH packets as relay, agent and client read them, before and after the keys are exchanged.

Input: a mode. PLAIN: the stream of a peer, its identification line first. FORGED: what follows the key
exchange, by somebody without the key. SEALED: the contents of packets (each behind two bytes of length, and
beginning with the length of its padding), encrypted as they should be.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from material import Input, ScriptedStream, pieces, sized
from paramiko import SSHException

from pam_common.fast_ssh.packets import MAX_PACKET, READ_BUFFER, Packets

PLAIN, FORGED, SEALED = range(3)
ENGINE, IV = AESGCM(b"k" * 32), b"i" * 12
GENUINE = [bytes([15]) + b"\x05ssh-user" + bytes(23), bytes([4]) + b"\x5edata" + bytes(10)]

Read = tuple[str, list[tuple[int, bytes]], str]


def TestOneInput(data: bytes) -> None:
    source = Input(data)
    mode = source.byte() % 3
    if mode == SEALED:
        bodies = []
        while source:
            bodies.append(_padded(source.sized()))
        stream = _sealed(bodies)
    else:
        stream = source.rest()
    read = _read([stream], plain=mode == PLAIN)
    assert _read(pieces(stream), plain=mode == PLAIN) == read
    if mode == FORGED:
        assert read[1] == _meaning(GENUINE)[: len(read[1])]
    elif mode == SEALED:
        assert read[1] == _meaning(bodies)


def seeds() -> Iterator[bytes]:
    packets = b"".join(struct.pack(">IB", 12, 6) + b"\x14abcd" + bytes(6) for _ in range(3))
    yield bytes([PLAIN]) + b"SSH-2.0-OpenSSH_9.2\r\n" + packets
    yield bytes([PLAIN]) + b"x" * 300
    yield bytes([FORGED]) + _sealed(GENUINE)
    yield bytes([SEALED]) + sized(*GENUINE)
    yield bytes([SEALED]) + sized(b"\x03short padding", b"\xffpadding beyond the end")


class Socket(ScriptedStream):
    """What ``Packets`` needs of a socket."""

    def send(self, data: memoryview, flags: int = 0) -> int:
        self.sendall(data)
        return len(data)


def _read(chunks: Iterable[bytes], *, plain: bool) -> Read:
    """The line, the packets, and what ended it."""
    packets = Packets(Socket(iter(chunks)))
    line, messages = "", []
    try:
        if plain:
            line = packets.readline(timeout=60)
            assert len(line) <= 255
        else:
            packets.set_inbound_cipher(ENGINE, aead=True, iv_in=IV)
        while True:
            kind, message = packets.read_message()
            messages.append((kind, message.asbytes()))
    except (SSHException, EOFError) as error:
        assert len(packets._buffer) == READ_BUFFER
        return line, messages, f"{type(error).__name__} {error}"


def _padded(body: bytes) -> bytes:
    """As many bytes more as the block size and the padding's length ask for."""
    body = body[: MAX_PACKET - 300] or b"\4"
    body += bytes(min(body[0], 255))
    return body + bytes(-len(body) % 16)


def _meaning(bodies: list[bytes]) -> list[tuple[int, bytes]]:
    """RFC 4253, section 6: the padding's length, the payload, the padding; at least 4 bytes of it."""
    meant = []
    for body in bodies:
        if not 4 <= body[0] <= len(body) - 2:
            break
        payload = body[1 : len(body) - body[0]]
        meant.append((payload[0], payload[1:]))
    return meant


def _sealed(bodies: list[bytes]) -> bytes:
    counter = int.from_bytes(IV[4:], "big")
    out = b""
    for number, body in enumerate(bodies):
        length = struct.pack(">I", len(body))
        out += length + ENGINE.encrypt(IV[:4] + struct.pack(">Q", counter + number), body, length)
    return out
