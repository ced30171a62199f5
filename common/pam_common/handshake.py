"""The handshake of a SecureChannel: three Noise messages over a Stream, each behind its length.

    client                                    agent
       │  1   e, e1                             │
       ├───────────────────────────────────────▶│
       │  2   e, ee, ekem1, s, es   statement   │
       │◀───────────────────────────────────────┤   the client checks key and statement
       │  3   s, se                 grant       │   before it says who it is
       ├───────────────────────────────────────▶│   the agent checks the grant before it dials

There is one version and one cipher suite: nothing is negotiated, so nothing can be downgraded. The
gateway's name is part of the prologue: a handshake meant for another gateway fails at message 2.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from pam_common.errors import AuthenticationError, ProtocolError, TruncatedError, UnavailableError
from pam_common.frames import PREFIX, MessageReader
from pam_common.keys import is_label
from pam_common.noise import DHLEN, KEM_CIPHERLEN, KEM_KEYLEN, TAGLEN, XXHFS, HandshakeState
from pam_common.stream import Stream

#: Followed by the gateway's name. Any other protocol after the handshake gets another first line.
PROLOGUE = b"pam-secure-channel-v1\0"
#: The largest statement or grant, and with it the largest handshake message. Ours have about 600 bytes.
MAX_PAYLOAD = 16 * 1024

MESSAGE1_SIZE = DHLEN + KEM_KEYLEN
MESSAGE2_OVERHEAD = DHLEN + (KEM_CIPHERLEN + TAGLEN) + (DHLEN + TAGLEN) + TAGLEN
MESSAGE3_OVERHEAD = (DHLEN + TAGLEN) + TAGLEN
#: What one read asks for: the three messages as they usually are.
_READ_SIZE = 4096


def initiate(
    stream: Stream, gateway: str, static: bytes, check_agent: Callable[[bytes, bytes], None], grant: bytes
) -> tuple[HandshakeState, MessageReader]:
    """Do the client's part; return the complete handshake and what arrived behind it.

    ``check_agent(key, statement)`` raises AuthenticationError for a peer that must not learn the grant.
    """
    handshake = HandshakeState(XXHFS, initiator=True, prologue=prologue(gateway), static=static)
    messages = MessageReader()
    peer = f"agent of gateway {gateway}"
    with _blame(peer):
        _send(stream, handshake.write_message())
        message2 = _receive(stream, messages, MESSAGE2_OVERHEAD, MESSAGE2_OVERHEAD + MAX_PAYLOAD)
        statement = handshake.read_message(message2)
    check_agent(handshake.remote_static, statement)
    with _blame(peer):
        _send(stream, handshake.write_message(grant))
    return handshake, messages


def respond(
    stream: Stream, gateway: str, static: bytes, statement: bytes
) -> tuple[HandshakeState, MessageReader, bytes]:
    """Do the agent's part; return the complete handshake, what arrived behind it, and the grant."""
    handshake = HandshakeState(XXHFS, initiator=False, prologue=prologue(gateway), static=static)
    messages = MessageReader()
    with _blame("client"):
        handshake.read_message(_receive(stream, messages, MESSAGE1_SIZE, MESSAGE1_SIZE))
        _send(stream, handshake.write_message(statement))
        message3 = _receive(stream, messages, MESSAGE3_OVERHEAD, MESSAGE3_OVERHEAD + MAX_PAYLOAD)
        grant = handshake.read_message(message3)
    return handshake, messages, grant


def prologue(gateway: str) -> bytes:
    """Return the bytes both sides must agree on before anything else."""
    if not is_label(gateway):
        raise ValueError("not the name of a gateway")
    return PROLOGUE + gateway.encode("ascii")


def _send(stream: Stream, message: bytes) -> None:
    stream.sendall(len(message).to_bytes(PREFIX, "big") + message)


def _receive(stream: Stream, messages: MessageReader, smallest: int, largest: int) -> bytes:
    """Return the next handshake message. What arrived behind it stays in ``messages``."""
    while (message := messages.next()) is None:
        chunk = stream.recv(_READ_SIZE)
        if not chunk:
            raise TruncatedError("the stream ended")
        messages.feed(chunk)
    if not smallest <= len(message) <= largest:
        raise ProtocolError(f"a message of {len(message)} bytes")
    return bytes(message)


@contextlib.contextmanager
def _blame(peer: str) -> Iterator[None]:
    """Say whose handshake failed and what that can mean."""
    try:
        yield
    except AuthenticationError as error:
        raise AuthenticationError(
            f"the handshake with the {peer} failed: {error}",
            hint="It was altered on the way, meant for another gateway, or of another version.",
        ) from error
    except TruncatedError as error:
        raise TruncatedError(
            f"the {peer} closed the stream during the handshake",
            hint="Its log says why, if it came that far; else the relay lost it. Try again.",
        ) from error
    except ProtocolError as error:
        raise ProtocolError(
            f"the {peer} does not speak this protocol: {error}", hint="Compare the versions of both sides."
        ) from error
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise UnavailableError(f"the stream to the {peer} broke during the handshake: {reason}") from error
