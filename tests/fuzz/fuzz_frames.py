"""Frames of the secure channel: a hostile relay's bytes, and a hostile peer's well encrypted ones.

Input: a mode, then for ``FORGED`` the ciphertext as it comes from the stream, else the plaintexts of frames
(each behind two bytes of length), which are sealed as the peer would.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from material import Input, pieces, sized

from pam_common.errors import ProtocolError
from pam_common.frames import MAX_CONTROL, REKEY_INTERVAL, FrameReader, FrameType, FrameWriter, MessageReader
from pam_common.noise import MAX_MESSAGE, TAGLEN, CipherState

KEY = bytes(range(32))
FORGED, SEALED, REKEYED = range(3)
DATA = (b"select 1;", b"x" * 5000, b"the end")

Read = tuple[bytes, list[tuple[int, bytes]], str]


def TestOneInput(data: bytes) -> None:
    source = Input(data)
    mode = source.byte() % 3
    if mode == FORGED:
        _forged(source.rest())
    else:
        _sealed(source, REKEY_INTERVAL - 2 if mode == REKEYED else 0)


def seeds() -> Iterator[bytes]:
    yield bytes([FORGED]) + _genuine()
    frames = sized(b"data\1", b"\2", b"why\3", b"12345678\4", b"12345678\5", b"12345678\6", b"x\1")
    yield bytes([SEALED]) + frames
    yield bytes([REKEYED]) + frames
    yield bytes([SEALED]) + sized(b"\1", b"x\7", b"", bytes(1025) + b"\3")


def _genuine() -> bytes:
    writer = FrameWriter(CipherState(KEY))
    out = b"".join(bytes(writer.data(memoryview(data))) for data in DATA)
    return out + bytes(writer.control(FrameType.EOF, b""))


def _forged(stream: bytes) -> None:
    """Whatever was done to the ciphertext, what is delivered is the beginning of what was sent."""
    data, controls, error = whole = _read([stream], 0)
    assert _read(pieces(stream), 0) == whole
    sent = b"".join(DATA)
    assert sent.startswith(data)
    if controls:
        assert (data, controls) == (sent, [(FrameType.EOF, b"")])
    if data != sent[: len(data)] or (len(stream) > len(_genuine()) + 2 + MAX_MESSAGE):
        assert error


def _sealed(source: Input, nonce: int) -> None:
    """Well encrypted frames mean what the document says, and nothing else is accepted."""
    cipher = CipherState(KEY)
    cipher.nonce = nonce
    stream = bytearray()
    plains = []
    while source:
        plain = source.sized()[: MAX_MESSAGE - TAGLEN]
        plains.append(plain)
        message = cipher.encrypt(b"", plain)
        if cipher.nonce % REKEY_INTERVAL == 0:
            cipher.rekey()
        stream += len(message).to_bytes(2, "big") + message
    expected = _meaning(plains)
    for chunks in ([bytes(stream)], pieces(bytes(stream))):
        data, controls, error = _read(chunks, nonce)
        assert (data, controls, bool(error)) == expected


def _meaning(plains: list[bytes]) -> tuple[bytes, list[tuple[int, bytes]], bool]:
    """What docs/secure-channel.md says of these frames: data, control frames, whether one is refused."""
    data, controls = b"", []
    for plain in plains:
        body, kind = plain[:-1], plain[-1:]
        if kind == b"\1" and body:
            data += body
        elif kind and kind[0] in range(2, 7) and len(body) <= MAX_CONTROL:
            controls.append((kind[0], body))
        else:
            return data, controls, True
    return data, controls, False


def _read(chunks: Iterable[bytes], nonce: int) -> Read:
    """Read as a channel does: data, control frames, and what was wrong."""
    cipher = CipherState(KEY)
    cipher.nonce = nonce
    messages = MessageReader()
    reader = FrameReader(cipher, messages)
    data, controls = b"", []
    for chunk in chunks:
        reader.feed(chunk)
        while True:
            try:
                frame = reader.fill()
            except ProtocolError as error:
                return data + reader.take(1 << 20), controls, str(error)
            taken = reader.take(1 << 20)
            data += taken
            if frame is not None:
                controls.append((int(frame.type), frame.body))
            elif not taken:
                break
        assert len(messages._partial) < 2 + MAX_MESSAGE
    assert reader.received == len(data)
    return data, controls, ""
