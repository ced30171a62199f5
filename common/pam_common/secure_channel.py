"""SecureChannel: a Stream from client to agent that the relay in between can neither read nor alter.

First the ``handshake``, then ``frames`` in both directions until each side has sent EOF. This module does
their I/O and knows which thread may wait for what. ``docs/secure-channel.md`` gives every byte.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

from pam_common.errors import (
    PamError,
    ProtocolError,
    RefusedError,
    TruncatedError,
    UnavailableError,
)
from pam_common.frames import (
    BATCH_DATA,
    BATCH_FRAMES,
    MAX_CONTROL,
    MAX_DATA,
    OVERHEAD,
    PREFIX,
    Frame,
    FrameReader,
    FrameType,
    FrameWriter,
    MessageReader,
)
from pam_common.handshake import initiate, respond
from pam_common.noise import MAX_MESSAGE, HandshakeState, generate_x25519, x25519_public
from pam_common.stream import ROOM, Data, InPlaceStream, ReservingStream, Stream

__all__ = ["SecureChannel", "deadline", "generate_x25519", "x25519_public"]

#: What one read asks of the stream: a batch of full frames.
READ_SIZE = BATCH_FRAMES * (PREFIX + MAX_MESSAGE)
#: Seconds for an ERROR to leave. A peer that does not read would not see it either.
ERROR_SECONDS = 2.0

_COUNT = struct.Struct(">Q")


@contextlib.contextmanager
def deadline(stream: Stream, seconds: float, what: str = "the handshake") -> Iterator[None]:
    """Abort ``stream`` when the block takes longer; that comes out as UnavailableError naming ``what``.

    Costs one thread for as long as the block runs.
    """
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        stream.abort()

    timer = threading.Timer(seconds, expire)
    timer.name = "deadline"
    timer.daemon = True
    timer.start()
    try:
        yield
    except (OSError, PamError) as error:
        if expired.is_set():
            raise UnavailableError(f"{what} took longer than {seconds:g} s") from error
        raise
    finally:
        timer.cancel()
        timer.join()  # so that it either ended the stream by now or never will
    if expired.is_set():
        # Done in the same instant: the stream is gone all the same.
        raise UnavailableError(f"{what} took longer than {seconds:g} s")


class _Turn:
    """A lock that is taken in turn.

    A plain lock is not fair: a writer that is always busy would take it again before an ERROR gets it. Who
    waits holds the first lock, and the writer cannot pass.
    """

    def __init__(self) -> None:
        self.waiting = threading.Lock()
        self.lock = threading.Lock()

    def __enter__(self) -> None:
        with self.waiting:
            self.lock.acquire()

    def __exit__(self, *_error: object) -> None:
        self.lock.release()

    def take(self) -> bool:
        """The same without waiting: whether it is ours, until :meth:`give`."""
        if not self.waiting.acquire(blocking=False):
            return False
        try:
            return self.lock.acquire(blocking=False)
        finally:
            self.waiting.release()

    def give(self) -> None:
        self.lock.release()


class SecureChannel:
    """An authenticated, encrypted :class:`~pam_common.stream.Stream`, and the owner of the one below it.

    One thread may read while another writes; ``ping``, ``send_error`` and ``abort`` may come from any.
    ``recv`` raises TruncatedError when the stream below ends without an EOF frame, ProtocolError for
    anything the peer did not send in this order, RefusedError with the peer's words after its ERROR. All
    three are final: the channel aborts and every later call fails alike. ``close`` without
    ``shutdown(SHUT_WR)`` before it looks like a cut to the peer, and is meant to.
    """

    def __init__(
        self, stream: Stream, handshake: HandshakeState, messages: MessageReader, *, peer_name: str
    ) -> None:
        """Take over ``stream`` after a complete handshake. Use ``connect`` or ``accept``."""
        sending, receiving = handshake.split()
        self._stream = stream
        self._peer_name = peer_name
        self._writer = FrameWriter(sending)
        self._in_place = stream.sendall_in_place if isinstance(stream, InPlaceStream) else None
        self._reserving = stream if isinstance(stream, ReservingStream) else None
        self._reader = FrameReader(receiving, messages)
        self._turn = _Turn()  # to send
        self._send_ended = False
        self._received_end = False
        self._interrupted = False  # by who takes what is delivered
        self._failure: PamError | None = None
        self._pings = 0
        self._pongs = 0
        self._ping_time = 0.0
        self._answer_lock = threading.Lock()
        self._answer: bytes | None = None
        self._answering = False
        #: The peer's static X25519 public key.
        self.peer = handshake.remote_static
        #: Bytes of data that the peer said it received.
        self.acknowledged = 0
        #: Seconds the last answered ping took, None before the first answer.
        self.round_trip: float | None = None

    # --- handshake -----------------------------------------------------------------------------------

    @classmethod
    def connect(
        cls,
        stream: Stream,
        *,
        gateway: str,
        static: bytes,
        check_agent: Callable[[bytes, bytes], None],
        grant: bytes,
    ) -> SecureChannel:
        """Open a channel to an agent of ``gateway`` as the holder of the X25519 key ``static``.

        ``check_agent(key, statement)`` raises AuthenticationError for an agent that must not be spoken to;
        it is called before anything of the client's is sent. Blocks; bound it with ``deadline``. After a
        failure the stream is the caller's to close.
        """
        handshake, messages = initiate(stream, gateway, static, check_agent, grant)
        return cls(stream, handshake, messages, peer_name="agent")

    @classmethod
    def accept(
        cls, stream: Stream, *, gateway: str, static: bytes, statement: bytes
    ) -> tuple[SecureChannel, bytes]:
        """Answer a client; return the channel and the grant it presented.

        The caller verifies the grant, and that it was made for ``channel.peer``, before it does anything
        else; if not, ``send_error`` says why. Blocks; bound it with ``deadline``.
        """
        handshake, messages, grant = respond(stream, gateway, static, statement)
        return cls(stream, handshake, messages, peer_name="client"), grant

    # --- Stream: receiving ---------------------------------------------------------------------------

    def recv(self, size: int, /) -> bytes:
        """Return 1 to ``size`` bytes, or ``b""`` after the peer's EOF frame. InterruptedError, which is not
        final, comes from ``deliver_to`` only."""
        if size < 1:
            raise ValueError("recv of less than one byte")
        while True:
            data = self._reader.take(size)
            if data:
                return data
            if self._received_end:
                return b""
            if self._failure is not None:
                raise self._failure.with_traceback(None)
            self._advance()

    def _advance(self) -> None:
        """Get more data, or learn why there is none. Failures wait until the data before them is taken."""
        try:
            if not self._advance_fed():
                self._read_more()
        except PamError as error:
            self._fail(error)

    def _advance_fed(self) -> bool:
        """Act on what was fed, up to more data or a control frame; False when nothing of it is left."""
        frame = self._reader.fill()
        if frame is not None:
            self._act_on(frame)
            return True
        return self._reader.has_data

    def _read_more(self) -> None:
        try:
            chunk = self._stream.recv(READ_SIZE)
        except InterruptedError:
            if self._interrupted:
                self._interrupted = False
                raise InterruptedError from None
            return  # a step has read something already
        except OSError as error:
            raise self._truncated(error.strerror or str(error) or type(error).__name__) from error
        if not chunk:
            raise self._truncated("no end was announced")
        self._reader.feed(chunk)

    def deliver_to(self, take: Callable[[memoryview], int], /) -> None:
        """See :class:`~pam_common.stream.DeliveringStream`. Where the stream below has no thread that reads
        it, nothing changes."""
        step_with = getattr(self._stream, "step_with", None)
        if step_with is None:
            return

        def step(chunk: memoryview) -> bool:
            return self._deliver(chunk, take)

        step_with(step)

    def _deliver(self, chunk: memoryview, take: Callable[[memoryview], int]) -> bool:
        """Give what is in ``chunk`` to ``take``; whether nothing of it is left to ``recv``."""
        reader = self._reader
        reader.feed(chunk)
        try:
            while True:
                frame = reader.fill()
                going_on = not reader.has_data or self._hand_over(take)
                if frame is not None:  # behind the data, whatever became of that
                    self._act_on(frame)
                if not going_on or self._received_end:
                    reader.keep()
                    return False
                if frame is None and reader.drained:
                    return True
        except PamError as error:
            self._fail(error)
            return False

    def _hand_over(self, take: Callable[[memoryview], int]) -> bool:
        """Give ``take`` the data there is; whether it wants no more done by ``recv``."""
        reader, data = self._reader, self._reader.waiting
        try:
            taken = take(data)
        except InterruptedError:
            self._interrupted = True
            reader.skip(len(data))
            return False
        reader.skip(taken)
        return taken == len(data)

    def _truncated(self, why: str) -> TruncatedError:
        return TruncatedError(f"the stream from the {self._peer_name} was cut: {why}")

    def _fail(self, error: PamError) -> None:
        self._failure = error
        # Nothing sensible can follow; this wakes a writer that waits for such a peer.
        self._stream.abort()

    def _act_on(self, frame: Frame) -> None:
        match frame.type:
            case FrameType.EOF:
                if _count(frame) != self._reader.received:
                    raise ProtocolError("an end that counts other bytes than were received")
                self._received_end = True
            case FrameType.ERROR:
                raise RefusedError(_readable(frame.body) or f"the {self._peer_name} gave no reason")
            case FrameType.PING:
                _count(frame)
                self._answer_ping(frame.body)
            case FrameType.PONG:
                self._note_pong(_count(frame))
            case FrameType.ACK:
                self._note_ack(_count(frame))
            case _:
                raise AssertionError("data is no control frame")

    def _note_pong(self, number: int) -> None:
        if not self._pongs < number <= self._pings:
            raise ProtocolError("an answer to a ping that was not sent")
        self._pongs = number
        if number == self._pings:
            self.round_trip = time.monotonic() - self._ping_time

    def _note_ack(self, count: int) -> None:
        if not self.acknowledged <= count <= self._writer.sent:
            raise ProtocolError("an acknowledgement of bytes that were not sent")
        self.acknowledged = count

    # --- Stream: sending -----------------------------------------------------------------------------

    def sendall(self, data: Data, /) -> None:
        """Send ``data``; blocks while the peer is slow."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), BATCH_DATA):
            # A turn per batch: a ping or an error need not wait for all of a large write.
            with self._turn:
                self._transmit(self._writer.data, view[start : start + BATCH_DATA])

    def lend(self, fd: int, ready: Callable[[], bool], /) -> bool:
        """See :class:`~pam_common.stream.LendingStream`."""
        return self._reserving is not None and self._reserving.lend(fd, ready)

    def send_soon(self, data: memoryview, /) -> bool:
        """See :class:`~pam_common.stream.LendingStream`."""
        stream = self._reserving
        if stream is None or not self._turn.take():
            return False
        try:
            # In this order: what is sealed must go out.
            ended = self._failure is not None or self._send_ended
            if ended or len(data) > MAX_DATA or not stream.reserve_soon(len(data) + OVERHEAD):
                return False
            stream.send_reserved(self._writer.data(data))
            return True
        finally:
            self._turn.give()

    def shutdown(self, how: int, /) -> None:
        """``SHUT_WR``: tell the peer that this was all. Receiving goes on."""
        if how != socket.SHUT_WR:
            raise ValueError("only the sending side can be shut down")
        with self._turn:
            if not self._send_ended:
                self._transmit(self._writer.control, FrameType.EOF, _COUNT.pack(self._writer.sent))
                self._send_ended = True

    def close(self) -> None:
        """Close the stream below."""
        if self._answering:
            # The peer pinged and does not read the answer; a thread of ours still waits for it.
            self._stream.abort()
        self._stream.close()

    def abort(self) -> None:
        """End both directions now, from any thread."""
        self._stream.abort()

    def _transmit(self, seal: Callable[..., memoryview], *args: object) -> None:
        """Seal and send. Within the turn."""
        if self._failure is not None:
            raise self._failure.with_traceback(None)
        if self._send_ended:
            raise BrokenPipeError(errno.EPIPE, "sending has ended")
        try:
            message = seal(*args)
            if self._in_place is not None:
                self._in_place(self._writer.memory, ROOM, ROOM + len(message))
            else:
                self._stream.sendall(message)
        except BaseException:
            # Part of it may be out, so nothing that follows could be decrypted. Receiving goes on: the
            # peer may have said why before it closed.
            self._send_ended = True
            raise

    # --- beside the data -----------------------------------------------------------------------------

    def send_error(self, message: str) -> None:
        """Tell the peer why this is the end, and end sending; its ``recv`` raises RefusedError(message).

        For any thread. Never raises and takes at most ERROR_SECONDS: a peer that does not read by then is
        cut off without a word.
        """
        body = message.encode(errors="replace")[:MAX_CONTROL].decode(errors="ignore").encode()
        with (
            contextlib.suppress(OSError, PamError),
            deadline(self._stream, ERROR_SECONDS, "an error message"),
            self._turn,
        ):
            self._transmit(self._writer.control, FrameType.ERROR, body)
            self._send_ended = True

    def ping(self) -> None:
        """Ask the peer for a sign of life; ``round_trip`` says how long the answer took.

        The answer is seen by the thread in ``recv``. A peer that ended sending gives none.
        """
        with self._turn:
            self._pings += 1
            self._ping_time = time.monotonic()
            self._transmit(self._writer.control, FrameType.PING, _COUNT.pack(self._pings))

    def acknowledge(self) -> None:
        """Tell the peer how many bytes of data have arrived here; its ``acknowledged`` follows."""
        with self._turn:
            self._transmit(self._writer.control, FrameType.ACK, _COUNT.pack(self._reader.received))

    def _answer_ping(self, body: bytes) -> None:
        """Have the ping answered, never by waiting here.

        Were the reader to send, two peers that ping each other while both directions are full would wait
        for each other for ever. One thread per channel, for as long as it takes; of several pings that
        arrive meanwhile, the last is answered.
        """
        with self._answer_lock:
            self._answer = body
            if self._answering:
                return
            self._answering = True
        threading.Thread(target=self._send_answers, name="channel-pong", daemon=True).start()

    def _send_answers(self) -> None:
        while (body := self._next_answer()) is not None:
            # What is wrong, the reader and the writer will find as well; it is theirs to tell.
            with contextlib.suppress(OSError, PamError), self._turn:
                self._transmit(self._writer.control, FrameType.PONG, body)

    def _next_answer(self) -> bytes | None:
        with self._answer_lock:
            body, self._answer = self._answer, None
            self._answering = body is not None
            return body


def _count(frame: Frame) -> int:
    """Return the number that is the whole body of ``frame``."""
    if len(frame.body) != _COUNT.size:
        raise ProtocolError(f"a frame {frame.type.name} of {len(frame.body)} bytes")
    count: int = _COUNT.unpack(frame.body)[0]
    return count


def _readable(text: bytes) -> str:
    """Return a peer's words on one line, without what could steer a terminal or reorder the text."""
    decoded = text.decode(errors="replace")
    return " ".join("".join(char if char.isprintable() else " " for char in decoded).split())
