"""The secure channel's handshake, each side against a peer that sends anything, or alters what is right.

Input: a mode; RESPOND and INITIATE: the peer's bytes. The others run a true handshake: GRANT and STATEMENT
carry the rest of the input as payload, with a change (a place and a byte) to the message that carries it,
and KEM makes the rest the first message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from material import Input, ScriptedStream, pieces

from pam_common.errors import AuthenticationError, ProtocolError
from pam_common.frames import MessageReader
from pam_common.handshake import (
    MAX_PAYLOAD,
    MESSAGE1_SIZE,
    MESSAGE2_OVERHEAD,
    MESSAGE3_OVERHEAD,
    initiate,
    prologue,
    respond,
)
from pam_common.noise import XXHFS, HandshakeState, x25519_public

CLIENT, AGENT = b"c" * 32, b"a" * 32
EPHEMERAL = b"e" * 32
RESPOND, INITIATE, KEM, GRANT, STATEMENT = range(5)


def TestOneInput(data: bytes) -> None:
    source = Input(data)
    mode = source.byte() % 5
    if mode == RESPOND:
        _refused(lambda: respond(ScriptedStream(pieces(source.rest())), "dc1", AGENT, b"statement"))
    elif mode == INITIATE:
        stream = ScriptedStream(pieces(source.rest()))
        _refused(lambda: initiate(stream, "dc1", CLIENT, _never, b"grant"))
    elif mode == KEM:
        message1 = source.rest().ljust(MESSAGE1_SIZE, b"\0")[:MESSAGE1_SIZE]
        stream = ScriptedStream([_framed(message1)])
        _refused(lambda: respond(stream, "dc1", AGENT, b"statement"))
    elif mode == GRANT:
        _grant(source.short(), source.byte(), source.rest())
    else:
        _statement(source.short(), source.byte(), source.rest())


def seeds() -> Iterator[bytes]:
    message1 = _initiator().write_message()
    yield bytes([RESPOND]) + _framed(message1)
    yield bytes([RESPOND]) + _framed(message1) + _framed(bytes(MESSAGE3_OVERHEAD))
    yield bytes([INITIATE]) + _framed(bytes(MESSAGE2_OVERHEAD))
    yield bytes([KEM]) + message1
    for mode in (GRANT, STATEMENT):
        yield bytes([mode, 0, 0, 0]) + b"payload"
        yield bytes([mode, 0, 9, 1]) + b"payload"


def _grant(place: int, change: int, grant: bytes) -> None:
    """Message 3 gives the grant as it was sent, or the handshake fails."""
    initiator = _initiator()

    def answer(message2: bytes) -> bytes:
        initiator.read_message(message2[2:])
        return _framed(_changed(initiator.write_message(grant), place, change)) + b"behind"

    def run() -> None:
        stream = ScriptedStream([_framed(initiator.write_message())], answer)
        handshake, messages, received = respond(stream, "dc1", AGENT, b"statement")
        assert not change
        assert received == grant
        assert handshake.remote_static == x25519_public(CLIENT)
        _behind(messages)

    _refused(run, allowed=not change and len(grant) <= MAX_PAYLOAD)


def _statement(place: int, change: int, statement: bytes) -> None:
    """Message 2 gives the statement as it was sent, or the client does not say who it is."""
    responder = HandshakeState(XXHFS, initiator=False, prologue=prologue("dc1"), static=AGENT)
    received: list[tuple[bytes, bytes]] = []

    def answer(message: bytes) -> bytes:
        if received:
            responder.read_message(message[2:])
            return b""
        responder.read_message(message[2:])
        return _framed(_changed(responder.write_message(statement), place, change))

    def run() -> None:
        stream = ScriptedStream([], answer)
        initiate(stream, "dc1", CLIENT, lambda key, payload: received.append((key, payload)), b"grant")
        assert not change
        assert received == [(x25519_public(AGENT), statement)]

    _refused(run, allowed=not change and len(statement) <= MAX_PAYLOAD)
    assert not (change and received)


def _refused(run: Callable[[], object], *, allowed: bool = False) -> None:
    """Run; it must fail in the documented way unless it is ``allowed`` to succeed, and then it must."""
    try:
        run()
    except (ProtocolError, AuthenticationError):
        assert not allowed
    else:
        assert allowed


def _behind(messages: MessageReader) -> None:
    """What came behind the handshake is kept for the frames: an incomplete message here."""
    assert messages.next() is None
    assert bytes(messages._partial) == b"behind"


def _initiator() -> HandshakeState:
    return HandshakeState(XXHFS, initiator=True, prologue=prologue("dc1"), static=CLIENT, ephemeral=EPHEMERAL)


def _never(key: bytes, statement: bytes) -> None:
    raise AssertionError("a peer without the protocol's keys got through the handshake")


def _changed(message: bytes, place: int, change: int) -> bytes:
    at = place % len(message)
    return message[:at] + bytes([message[at] ^ change]) + message[at + 1 :]


def _framed(message: bytes) -> bytes:
    message = message[:65535]
    return len(message).to_bytes(2, "big") + message
