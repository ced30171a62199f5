"""The whole channel over real sockets: handshake checks, hostile middle, half-close, concurrency, abort."""

from __future__ import annotations

import hashlib
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import pytest

from pam_common import secure_channel
from pam_common.errors import (
    AuthenticationError,
    PamError,
    ProtocolError,
    RefusedError,
    TruncatedError,
    UnavailableError,
)
from pam_common.frames import BATCH_DATA, MAX_CONTROL, FrameType
from pam_common.handshake import MAX_PAYLOAD, MESSAGE1_SIZE, PROLOGUE
from pam_common.noise import XXHFS, HandshakeState
from pam_common.secure_channel import SecureChannel, deadline, generate_x25519, x25519_public
from pam_common.stream import SocketStream, Stream

CLIENT, AGENT = generate_x25519(), generate_x25519()
STATEMENT, GRANT = b"agent statement", b"grant"
#: How long a test waits for what must happen; only a failure takes that long.
PATIENCE = 60.0

Check: TypeAlias = Callable[[bytes, bytes], None]


def trust_all(_key: bytes, _statement: bytes) -> None:
    pass


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as executor:
        yield executor


@pytest.fixture
def sockets() -> Iterator[Callable[[], tuple[socket.socket, socket.socket]]]:
    made: list[socket.socket] = []

    def pair() -> tuple[socket.socket, socket.socket]:
        made.extend(socket.socketpair())
        return made[-2], made[-1]

    yield pair
    for sock in made:
        # Wakes whatever a failed test left blocked.
        SocketStream(sock).abort()
        sock.close()


def connect(
    stream: Stream, *, gateway: str = "dc1", check: Check = trust_all, grant: bytes = GRANT
) -> SecureChannel:
    return SecureChannel.connect(stream, gateway=gateway, static=CLIENT, check_agent=check, grant=grant)


def accept(
    stream: Stream, *, gateway: str = "dc1", statement: bytes = STATEMENT
) -> tuple[SecureChannel, bytes]:
    return SecureChannel.accept(stream, gateway=gateway, static=AGENT, statement=statement)


@dataclass
class Pair:
    """A client's and an agent's channel, and the sockets below them."""

    client: SecureChannel
    agent: SecureChannel
    sockets: tuple[socket.socket, socket.socket]


@pytest.fixture
def pair(pool: ThreadPoolExecutor, sockets: Callable[[], tuple[socket.socket, socket.socket]]) -> Pair:
    low, high = sockets()
    answer = pool.submit(accept, SocketStream(high))
    client = connect(SocketStream(low))
    agent, grant = answer.result(PATIENCE)
    assert grant == GRANT
    return Pair(client, agent, (low, high))


def read_all(channel: SecureChannel, size: int = 1 << 18) -> bytes:
    return b"".join(iter(lambda: channel.recv(size), b""))


# --- handshake ---------------------------------------------------------------------------------------


def test_both_sides_learn_the_others_key(pair: Pair) -> None:
    _stream: Stream = pair.client  # the shape is checked by mypy
    assert pair.client.peer == x25519_public(AGENT)
    assert pair.agent.peer == x25519_public(CLIENT)


def test_client_sees_key_and_statement(pool: ThreadPoolExecutor, sockets: Any) -> None:
    low, high = sockets()
    pool.submit(accept, SocketStream(high))
    seen: list[tuple[bytes, bytes]] = []
    connect(SocketStream(low), check=lambda key, statement: seen.append((key, statement)))
    assert seen == [(x25519_public(AGENT), STATEMENT)]


def test_an_agent_that_is_refused_learns_nothing(pool: ThreadPoolExecutor, sockets: Any) -> None:
    low, high = sockets()

    def refuse(_key: bytes, _statement: bytes) -> None:
        raise AuthenticationError("not an agent of ours")

    def record() -> int:
        total = 0
        handshake = HandshakeState(XXHFS, initiator=False, prologue=PROLOGUE + b"dc1", static=AGENT)
        message = high.recv(2 + MESSAGE1_SIZE, socket.MSG_WAITALL)
        handshake.read_message(message[2:])
        answer = handshake.write_message(STATEMENT)
        high.sendall(struct.pack(">H", len(answer)) + answer)
        while data := high.recv(65536):
            total += len(data)
        return total

    after_message1 = pool.submit(record)
    with pytest.raises(AuthenticationError, match="not an agent of ours"):
        connect(SocketStream(low), check=refuse)
    low.close()
    assert after_message1.result(PATIENCE) == 0


def test_a_handshake_for_another_gateway_fails(pool: ThreadPoolExecutor, sockets: Any) -> None:
    low, high = sockets()
    answer = pool.submit(accept, SocketStream(high), gateway="dc2")
    checked: list[bytes] = []
    with pytest.raises(AuthenticationError, match="agent of gateway dc1 failed") as caught:
        connect(SocketStream(low), check=lambda key, _statement: checked.append(key))
    assert "another gateway" in caught.value.hint
    assert checked == []
    low.close()
    with pytest.raises(TruncatedError, match="client closed the stream"):
        answer.result(PATIENCE)


@pytest.mark.parametrize("name", ["", "DC1", "dc1\n", "a/b"])
def test_only_gateways_have_channels(sockets: Any, name: str) -> None:
    low, _high = sockets()
    with pytest.raises(ValueError, match="gateway"):
        connect(SocketStream(low), gateway=name)


@dataclass
class Middle:
    """A relay turned hostile: ``alter(n, message)`` says what goes on in place of the n-th message."""

    alter: dict[str, Callable[[int, bytes], bytes]] = field(default_factory=dict)

    def run(self, source: socket.socket, target: socket.socket, direction: str) -> None:
        number = 0
        alter = self.alter.get(direction, lambda _number, message: message)
        try:
            while prefix := source.recv(2, socket.MSG_WAITALL):
                message = prefix + source.recv(int.from_bytes(prefix, "big"), socket.MSG_WAITALL)
                number += 1
                target.sendall(alter(number, message))
        except OSError:
            pass
        SocketStream(target).shutdown(socket.SHUT_WR)

    def channels(self, pool: ThreadPoolExecutor, sockets: Any) -> tuple[Future[Any], Future[Any]]:
        """Start a client and an agent with this between them."""
        (client, low), (high, agent) = sockets(), sockets()
        pool.submit(self.run, low, high, "up")
        pool.submit(self.run, high, low, "down")
        return pool.submit(self.close_on_failure, connect, client), pool.submit(
            self.close_on_failure, accept, agent
        )

    @staticmethod
    def close_on_failure(opening: Callable[[Stream], Any], sock: socket.socket) -> Any:
        stream = SocketStream(sock)
        try:
            return opening(stream)
        except PamError:
            stream.abort()
            raise


def flip(message: bytes, at: int) -> bytes:
    return message[:at] + bytes([message[at] ^ 0x10]) + message[at + 1 :]


@pytest.mark.parametrize(
    ("direction", "number", "at"),
    [
        ("up", 1, 2),
        ("up", 1, 40),
        ("up", 1, -1),
        ("down", 1, 2),
        ("down", 1, 40),
        ("down", 1, 1150),
        ("down", 1, -1),
        ("up", 2, 2),
        ("up", 2, -1),
    ],
)
def test_an_altered_handshake_fails(
    pool: ThreadPoolExecutor, sockets: Any, direction: str, number: int, at: int
) -> None:
    middle = Middle({direction: lambda n, message: flip(message, at) if n == number else message})
    client, agent = middle.channels(pool, sockets)
    if (direction, number) == ("up", 2):
        # The client was done by then. It learns that the agent is gone, and nothing it sent was used.
        with pytest.raises(AuthenticationError, match="handshake with the client failed"):
            agent.result(PATIENCE)
        with pytest.raises(TruncatedError):
            client.result(PATIENCE).recv(1)
    else:
        with pytest.raises((AuthenticationError, ProtocolError), match="agent of gateway dc1"):
            client.result(PATIENCE)
        with pytest.raises((AuthenticationError, ProtocolError), match="client"):
            agent.result(PATIENCE)


@pytest.mark.parametrize(
    ("peer_says", "error"),
    [
        (b"", TruncatedError),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", TruncatedError),
        (b"SSH-2.0-OpenSSH_9.2\r\n", TruncatedError),
        (b"\x00\x00", ProtocolError),
        (b"\x00\x04abcd", ProtocolError),
        (b"\xff\xff" + bytes(65535), ProtocolError),
        (struct.pack(">H", 1500) + bytes(1500), AuthenticationError),
    ],
)
def test_who_is_no_agent_is_said_to_be_none(sockets: Any, peer_says: bytes, error: type[PamError]) -> None:
    low, high = sockets()
    high.sendall(peer_says)
    high.shutdown(socket.SHUT_WR)
    with pytest.raises(error, match="agent of gateway dc1") as caught:
        connect(SocketStream(low))
    assert caught.value.hint


@pytest.mark.parametrize(
    "client_says", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\x00\x00", struct.pack(">H", 1217) + bytes(1217)]
)
def test_who_is_no_client_is_said_to_be_none(sockets: Any, client_says: bytes) -> None:
    low, high = sockets()
    low.sendall(client_says)
    low.shutdown(socket.SHUT_WR)
    with pytest.raises(ProtocolError, match="client"):
        accept(SocketStream(high))


def test_oversize_grant_is_refused(pool: ThreadPoolExecutor, sockets: Any) -> None:
    low, high = sockets()
    answer = pool.submit(accept, SocketStream(high))
    connect(SocketStream(low), grant=bytes(MAX_PAYLOAD + 1))
    with pytest.raises(ProtocolError, match="a message of"):
        answer.result(PATIENCE)


def test_a_broken_stream_blames_the_peer(sockets: Any) -> None:
    low, high = sockets()
    high.close()
    with pytest.raises(UnavailableError, match="agent of gateway dc1 broke"):
        connect(SocketStream(low))


def test_silent_peer_meets_the_deadline(sockets: Any) -> None:
    low, _high = sockets()
    stream = SocketStream(low)
    with (
        pytest.raises(UnavailableError, match=r"the handshake took longer than 0\.05 s"),
        deadline(stream, 0.05),
    ):
        connect(stream)


def test_deadline_that_is_met_changes_nothing(sockets: Any) -> None:
    low, high = sockets()
    before = set(threading.enumerate())
    with deadline(SocketStream(low), PATIENCE):
        low.sendall(b"x")
    assert high.recv(1) == b"x"
    assert not any(thread.name == "deadline" for thread in set(threading.enumerate()) - before)
    with pytest.raises(RefusedError), deadline(SocketStream(low), PATIENCE):
        raise RefusedError("another reason")


def test_deadline_missed_by_a_block_that_ends_well(sockets: Any) -> None:
    low, high = sockets()
    with (
        pytest.raises(UnavailableError, match="the login took"),
        deadline(SocketStream(low), 0.01, "the login"),
    ):
        assert high.recv(1) == b""  # until the deadline aborts the other end


# --- data --------------------------------------------------------------------------------------------


def test_bytes_go_both_ways(pair: Pair) -> None:
    pair.client.sendall(b"question")
    assert pair.agent.recv(3) == b"que"
    assert pair.agent.recv(100) == b"stion"
    pair.agent.sendall(memoryview(bytearray(b"answer")))
    assert pair.client.recv(100) == b"answer"
    pair.client.sendall(b"")
    pair.client.sendall(memoryview(struct.pack("<2I", 1, 2)).cast("I"))
    assert pair.agent.recv(100) == struct.pack("<2I", 1, 2)


def test_nothing_crosses_in_the_clear(pool: ThreadPoolExecutor, sockets: Any) -> None:
    seen: list[bytes] = []

    def note(_number: int, message: bytes) -> bytes:
        seen.append(message)
        return message

    client, agent = Middle({"up": note, "down": note}).channels(pool, sockets)
    ours, (theirs, _grant) = client.result(PATIENCE), agent.result(PATIENCE)
    ours.sendall(b"password")
    theirs.send_error("denied")
    assert theirs.recv(100) == b"password"
    with pytest.raises(RefusedError):
        ours.recv(1)
    wire = b"".join(seen)
    for secret in (b"password", b"denied", STATEMENT, GRANT, x25519_public(CLIENT), x25519_public(AGENT)):
        assert secret not in wire


def test_half_close_ends_one_direction(pair: Pair) -> None:
    pair.client.sendall(b"all I have")
    pair.client.shutdown(socket.SHUT_WR)
    pair.client.shutdown(socket.SHUT_WR)  # again, to no effect
    assert read_all(pair.agent) == b"all I have"
    assert pair.agent.recv(1) == b""
    pair.agent.sendall(b"answer")
    pair.agent.shutdown(socket.SHUT_WR)
    assert read_all(pair.client) == b"answer"
    with pytest.raises(BrokenPipeError):
        pair.client.sendall(b"more")
    with pytest.raises(ValueError, match="sending side"):
        pair.client.shutdown(socket.SHUT_RDWR)


def test_recv_of_nothing_is_a_mistake(pair: Pair) -> None:
    with pytest.raises(ValueError, match="less than one"):
        pair.client.recv(0)


@pytest.mark.parametrize("end", ["close", "reset", "abort"])
def test_a_stream_that_just_ends_is_cut(pair: Pair, end: str) -> None:
    pair.agent.sendall(b"half of")
    if end == "reset":
        # Unread data makes the kernel reset the connection rather than end it.
        pair.client.sendall(b"unread")
    (pair.agent.abort if end == "abort" else pair.agent.close)()
    assert pair.client.recv(100) == b"half of"
    for _ in range(2):
        with pytest.raises(TruncatedError, match="from the agent was cut"):
            pair.client.recv(100)
    with pytest.raises(TruncatedError):
        pair.client.sendall(b"x")


def attacked(
    pool: ThreadPoolExecutor, sockets: Any, alter: Callable[[int, bytes], bytes]
) -> tuple[bytes, PamError]:
    """Send three frames through ``alter`` (numbered from 1), return what arrives and the error."""
    middle = Middle({"up": lambda n, message: alter(n - 2, message) if n > 2 else message})
    client, agent = middle.channels(pool, sockets)
    ours, (theirs, _grant) = client.result(PATIENCE), agent.result(PATIENCE)
    for text in (b"one,", b"two,", b"three"):
        ours.sendall(text)
    ours.shutdown(socket.SHUT_WR)
    ours._stream.shutdown(socket.SHUT_WR)
    pieces: list[bytes] = []
    with pytest.raises(PamError) as caught:
        pieces.extend(iter(lambda: theirs.recv(100), b""))
    with pytest.raises(type(caught.value), match=str(caught.value)):
        theirs.recv(1)
    with pytest.raises(type(caught.value)):
        theirs.sendall(b"x")
    return b"".join(pieces), caught.value


@pytest.mark.parametrize("at", [0, 1, 2, 5, -1])
def test_altered_frame(pool: ThreadPoolExecutor, sockets: Any, at: int) -> None:
    received, error = attacked(pool, sockets, lambda n, message: flip(message, at) if n == 2 else message)
    assert received == b"one,"
    assert isinstance(error, ProtocolError)


def test_dropped_frame(pool: ThreadPoolExecutor, sockets: Any) -> None:
    received, error = attacked(pool, sockets, lambda n, message: b"" if n == 2 else message)
    assert (received, type(error)) == (b"one,", ProtocolError)


def test_dropped_end(pool: ThreadPoolExecutor, sockets: Any) -> None:
    received, error = attacked(pool, sockets, lambda n, message: b"" if n == 4 else message)
    assert (received, type(error)) == (b"one,two,three", TruncatedError)


def test_repeated_frame(pool: ThreadPoolExecutor, sockets: Any) -> None:
    received, error = attacked(pool, sockets, lambda n, message: 2 * message if n == 2 else message)
    assert (received, type(error)) == (b"one,two,", ProtocolError)


def test_reordered_frames(pool: ThreadPoolExecutor, sockets: Any) -> None:
    kept: list[bytes] = []

    def swap(number: int, message: bytes) -> bytes:
        kept.append(message)
        return {2: b"", 3: message + kept[1] if number == 3 else b""}.get(number, message)

    received, error = attacked(pool, sockets, swap)
    assert (received, type(error)) == (b"one,", ProtocolError)


def test_truncated_frame(pool: ThreadPoolExecutor, sockets: Any) -> None:
    received, error = attacked(
        pool, sockets, lambda n, message: message if n < 3 else message[:9] if n == 3 else b""
    )
    assert (received, type(error)) == (b"one,two,", TruncatedError)


def test_a_frame_sent_back_to_its_sender(pool: ThreadPoolExecutor, sockets: Any) -> None:
    (client, low), (high, agent) = sockets(), sockets()
    answer = pool.submit(accept, SocketStream(agent))
    opening = pool.submit(connect, SocketStream(client))
    for source, target in ((low, high), (high, low), (low, high)):
        prefix = source.recv(2, socket.MSG_WAITALL)
        target.sendall(prefix + source.recv(int.from_bytes(prefix, "big"), socket.MSG_WAITALL))
    ours = opening.result(PATIENCE)
    answer.result(PATIENCE)
    ours.sendall(b"mirror")
    low.sendall(low.recv(1000))
    with pytest.raises(ProtocolError):
        ours.recv(100)


# --- control frames ----------------------------------------------------------------------------------


def send_frame(channel: SecureChannel, kind: FrameType, body: bytes) -> None:
    """Send what a peer of ours never would."""
    channel._transmit(channel._writer.control, kind, body)


def test_error_reaches_the_peer_as_its_words(pair: Pair) -> None:
    pair.agent.sendall(b"before")
    pair.agent.send_error("policy dba-all ended at 18:00")
    assert pair.client.recv(100) == b"before"
    for _ in range(2):
        with pytest.raises(RefusedError, match=r"^policy dba-all ended at 18:00$"):
            pair.client.recv(100)
    with pytest.raises(RefusedError):
        pair.client.sendall(b"x")
    with pytest.raises(BrokenPipeError):
        pair.agent.sendall(b"after")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (b"", "the agent gave no reason"),
        (b"\x1b[2J\r\n \x00", "[2J"),
        ("a\u202eb\u2028c\u200bd".encode(), "a b c d"),
        (b"\xff\xfe", "\ufffd\ufffd"),
        ("Zugriff für 漢字".encode(), "Zugriff für 漢字"),
    ],
)
def test_error_text_cannot_steer_a_terminal(pair: Pair, text: bytes, shown: str) -> None:
    send_frame(pair.agent, FrameType.ERROR, text)
    with pytest.raises(RefusedError) as caught:
        pair.client.recv(1)
    assert str(caught.value) == shown


def test_error_text_is_capped(pair: Pair) -> None:
    pair.agent.send_error("ä" * 5000 + "\ud800")
    with pytest.raises(RefusedError) as caught:
        pair.client.recv(1)
    assert str(caught.value) == "ä" * (MAX_CONTROL // 2)


def test_error_after_the_peer_is_gone_is_silent(pair: Pair) -> None:
    pair.client.close()
    pair.agent.send_error("too late")
    pair.agent.send_error("even later")


def test_error_past_a_stuck_writer_gives_up(
    pair: Pair, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secure_channel, "ERROR_SECONDS", 0.1)
    stuck = pool.submit(pair.agent.sendall, bytes(10_000_000))
    wait_until(pair.agent._turn.lock.locked)
    pair.agent.send_error("killed")
    assert isinstance(stuck.exception(PATIENCE), (OSError, PamError))


class Gated(SocketStream):
    """A stream whose ``sendall`` waits for a permit each time, and notes the size of what it then sends."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self.permits = threading.Semaphore(0)
        self.sizes: list[int] = []
        self.sendall = self.gated_sendall  # type: ignore[method-assign]

    def gated_sendall(self, data: memoryview) -> None:
        assert self.permits.acquire(timeout=PATIENCE)
        self.sizes.append(len(data))
        self.socket.sendall(data)


def test_error_overtakes_a_busy_writer(pair: Pair, pool: ThreadPoolExecutor) -> None:
    gate = Gated(pair.sockets[1])
    pair.agent._stream = gate
    reading = pool.submit(read_all, pair.client)
    writing = pool.submit(pair.agent.sendall, bytes(100 * BATCH_DATA))
    wait_until(pair.agent._turn.lock.locked)
    ending = pool.submit(pair.agent.send_error, "killed")
    wait_until(pair.agent._turn.waiting.locked)
    for _ in range(2):
        gate.permits.release()
    ending.result(PATIENCE)
    assert gate.sizes == [4 * 65537, 2 + len("killed") + 17]
    assert isinstance(reading.exception(PATIENCE), RefusedError)
    assert isinstance(writing.exception(PATIENCE), BrokenPipeError)


def test_nothing_is_sent_after_sending_broke(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_data: memoryview) -> None:
        raise ConnectionResetError("part of it may be out")

    with monkeypatch.context() as patch:
        patch.setattr(pair.client._stream, "sendall", fail)
        with pytest.raises(ConnectionResetError):
            pair.client.sendall(b"lost")
    with pytest.raises(BrokenPipeError):
        pair.client.sendall(b"after a gap")
    pair.agent.send_error("why it broke")
    with pytest.raises(RefusedError, match="why it broke"):
        pair.client.recv(100)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (FrameType.EOF, b""),
        (FrameType.EOF, struct.pack(">Q", 7)),
        (FrameType.EOF, bytes(9)),
        (FrameType.PING, b""),
        (FrameType.PING, bytes(9)),
        (FrameType.PONG, struct.pack(">Q", 1)),
        (FrameType.PONG, bytes(8)),
        (FrameType.ACK, struct.pack(">Q", 1)),
        (FrameType.ACK, bytes(7)),
        (FrameType.ERROR, bytes(MAX_CONTROL + 1)),
    ],
)
def test_frames_that_break_the_rules(pair: Pair, kind: FrameType, body: bytes) -> None:
    send_frame(pair.agent, kind, body)
    with pytest.raises(ProtocolError):
        pair.client.recv(1)


def test_ping_is_answered_once(pair: Pair, pool: ThreadPoolExecutor) -> None:
    reading = [pool.submit(read_all, channel) for channel in (pair.client, pair.agent)]
    assert pair.client.round_trip is None
    pair.client.ping()
    wait_until(lambda: pair.client.round_trip is not None)
    assert 0 <= (pair.client.round_trip or -1) < PATIENCE
    pair.agent.ping()
    wait_until(lambda: pair.agent.round_trip is not None)
    wait_until(lambda: not pair.agent._answering)
    send_frame(pair.agent, FrameType.PONG, struct.pack(">Q", 1))  # the same answer again
    assert isinstance(reading[0].exception(PATIENCE), ProtocolError)
    assert isinstance(reading[1].exception(PATIENCE), TruncatedError)


def test_acknowledgement_counts_bytes(pair: Pair) -> None:
    pair.client.sendall(bytes(1000))
    while len(pair.agent.recv(1000)) != 1000:
        pass
    pair.agent.acknowledge()
    pair.agent.sendall(b"x")
    assert pair.client.recv(1) == b"x"
    assert pair.client.acknowledged == 1000
    send_frame(pair.agent, FrameType.ACK, struct.pack(">Q", 999))
    with pytest.raises(ProtocolError, match="acknowledgement"):
        pair.client.recv(1)


def test_ping_does_not_stop_a_reader_whose_writer_is_stuck(pair: Pair, pool: ThreadPoolExecutor) -> None:
    """The peer pings, sends, and does not read: we read on, and answer when it reads again."""
    stuck = pool.submit(pair.agent.sendall, bytes(5_000_000))
    wait_until(pair.agent._turn.lock.locked)
    for number in range(20):
        pair.client.ping()
        pair.client.sendall(b"%02d" % number)
        received = pool.submit(pair.agent.recv, 2)
        assert received.result(PATIENCE) == b"%02d" % number
    assert pair.agent._answering
    wait_until(lambda: [thread.name for thread in threading.enumerate()].count("channel-pong") == 1)
    total = 0
    while total < 5_000_000:
        total += len(pair.client.recv(1 << 18))
    stuck.result(PATIENCE)
    pool.submit(pair.client.recv, 1)
    wait_until(lambda: pair.client.round_trip is not None)


def test_closing_ends_a_stuck_answer(pair: Pair, pool: ThreadPoolExecutor) -> None:
    stuck = pool.submit(pair.agent.sendall, bytes(5_000_000))
    wait_until(pair.agent._turn.lock.locked)
    pair.client.ping()
    pair.client.sendall(b"x")
    assert pair.agent.recv(1) == b"x"
    pair.agent.close()
    assert stuck.exception(PATIENCE) is not None
    wait_until(lambda: not any(thread.name == "channel-pong" for thread in threading.enumerate()))


# --- concurrency -------------------------------------------------------------------------------------


def send_random(channel: SecureChannel, seed: int, total: int) -> bytes:
    """Send ``total`` bytes in pieces of random size; return their digest."""
    chance, digest, sent = random.Random(seed), hashlib.blake2b(), 0
    while sent < total:
        size = min(total - sent, chance.choice([1, 100, 5000, 65518, 65519, 300_000]))
        piece = chance.randbytes(size)
        channel.sendall(piece)
        digest.update(piece)
        sent += size
    channel.shutdown(socket.SHUT_WR)
    return digest.digest()


def receive_slowly(channel: SecureChannel, seed: int) -> bytes:
    chance, digest = random.Random(seed), hashlib.blake2b()
    while data := channel.recv(chance.choice([10, 1000, 70_000, 1 << 20])):
        digest.update(data)
        if chance.random() < 0.05:
            time.sleep(0.0005)
    return digest.digest()


def test_full_load_both_ways_with_slow_readers_and_pings(pair: Pair, pool: ThreadPoolExecutor) -> None:
    total = 4_000_000
    sums = [pool.submit(send_random, c, seed, total) for seed, c in enumerate((pair.client, pair.agent))]
    read = [pool.submit(receive_slowly, c, seed) for seed, c in enumerate((pair.agent, pair.client))]
    while not all(future.done() for future in sums):
        for channel in (pair.client, pair.agent):
            try:
                channel.ping()
                channel.acknowledge()
            except BrokenPipeError:
                pass  # it has sent its end
        time.sleep(0.001)
    assert [future.result(PATIENCE) for future in read] == [future.result(PATIENCE) for future in sums]


class Stepping(SocketStream):
    """Has a thread that brings what it receives: the test's."""

    step: Callable[[memoryview], bool]

    def step_with(self, step: Callable[[memoryview], bool]) -> None:
        self.step = step


def test_what_was_not_delivered_outlives_the_memory_it_came_in(
    pool: ThreadPoolExecutor, sockets: Callable[[], tuple[socket.socket, socket.socket]]
) -> None:
    near, far = sockets()
    stream = Stepping(near)
    accepted = pool.submit(accept, SocketStream(far))
    channel = connect(stream)
    agent, _grant = accepted.result(PATIENCE)
    channel.deliver_to(lambda _data: 0)
    writer = agent._writer
    came = bytearray(writer.data(memoryview(b"first")))
    came += writer.control(FrameType.PING, bytes(8))  # ends what is opened at once
    came += writer.data(memoryview(b"second"))
    assert not stream.step(memoryview(came))
    came[:] = bytes(len(came))
    assert channel.recv(100) == b"first"
    assert channel.recv(100) == b"second"


def test_a_slow_reader_slows_the_writer(pair: Pair, pool: ThreadPoolExecutor) -> None:
    writing = pool.submit(pair.client.sendall, bytes(20_000_000))
    wait_until(pair.client._turn.lock.locked)
    assert pair.agent.recv(10) == bytes(10)
    sent = -1
    while sent != pair.client._writer.sent:
        sent = pair.client._writer.sent
        time.sleep(0.05)
    assert not writing.done()
    # What is under way fits into the sockets' buffers and one batch on each side.
    assert sent < 5_000_000
    pair.client.abort()
    assert writing.exception(PATIENCE) is not None


@pytest.mark.parametrize("blocked_in", ["recv", "sendall"])
def test_abort_wakes_who_is_blocked(pair: Pair, pool: ThreadPoolExecutor, blocked_in: str) -> None:
    if blocked_in == "recv":
        waiting = pool.submit(pair.client.recv, 1)
        wait_until(waiting.running)
    else:
        waiting = pool.submit(pair.client.sendall, bytes(10_000_000))
        wait_until(pair.client._turn.lock.locked)
    pair.client.abort()
    pair.client.abort()
    assert isinstance(waiting.exception(PATIENCE), (OSError, PamError))


def test_data_behind_message_3_is_not_lost(pool: ThreadPoolExecutor, sockets: Any) -> None:
    """Message 3 and the first frames in one segment."""
    (client, low), (high, agent) = sockets(), sockets()
    answer = pool.submit(accept, SocketStream(agent))
    opening = pool.submit(connect, SocketStream(client))
    for source, target in ((low, high), (high, low)):
        prefix = source.recv(2, socket.MSG_WAITALL)
        target.sendall(prefix + source.recv(int.from_bytes(prefix, "big"), socket.MSG_WAITALL))
    ours = opening.result(PATIENCE)
    ours.sendall(b"early")
    ours.shutdown(socket.SHUT_WR)
    ours.close()
    high.sendall(b"".join(iter(lambda: low.recv(65536), b"")))
    theirs, grant = answer.result(PATIENCE)
    assert (grant, read_all(theirs)) == (GRANT, b"early")
