"""Carry one local connection: check its first bytes, dial, pump both ways, end both ends.

    program ──head──▶ check ──▶ dial ──▶ ┬ up:   program → channel
                                         └ down: channel → program

Two threads per connection; each direction ends with its own half-close. Both mostly sleep: the thread that
reads the ssh connection hands to the program what it takes at once, and sends up what is small. While nothing
has come down yet, what went up is kept (a startup packet, bounded), so that a refusal by the agent can still
be told in the program's own protocol.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Protocol

from pam_client.launch import Launch, Refusal
from pam_common.errors import PamError, RefusedError, TruncatedError, UnavailableError
from pam_common.frames import PACKET_DATA
from pam_common.secure_channel import SecureChannel
from pam_common.stream import Data, LendingStream, SocketStream, Stream

#: One read: a few TLS-record-sized messages, and what the channel sends as one full packet.
CHUNK = PACKET_DATA
#: What the thread that reads the ssh connection does itself, for which other connections wait; after so many
#: smaller reads in a row, as to hand the socket to and fro costs more than a few gain.
INLINE = 8 << 10
SMALL_READS = 16
#: More than any protocol's opening request. A program that sends more before it hears anything gets no
#: refusal in its own form, only a closed connection.
MAX_SEEN = 16 << 10
#: How long a program may take to say its first bytes, and to hear a refusal. Programs do both at once;
#: a scanner that only connects must not keep a thread.
HEAD_TIMEOUT = 30.0
REFUSAL_TIMEOUT = 5.0

Dial = Callable[[], Stream]


def announcing(dial: Dial, line: bytes) -> Dial:
    """``dial``, where ``line`` goes up first on every channel."""

    def announced() -> Stream:
        channel = dial()
        # A channel that takes no more may have an agent's refusal to tell, which comes down.
        with contextlib.suppress(OSError, PamError):
            channel.sendall(line)
        return channel

    return announced if line else dial


class Observer(Protocol):
    """Hears from the local connections of one connect; called from their threads, must not block."""

    def report(self, message: str, hint: str) -> None:
        """One connection could not be carried, or was lost."""

    def far_end(self) -> None:
        """The far side ended a connection, not the program: the session may be over."""


class Carrier:
    """One local connection. ``run`` in a thread of its own; ``finish`` and ``abort`` from any thread."""

    def __init__(
        self, number: int, local: socket.socket, *, dial: Dial, launch: Launch, observer: Observer
    ) -> None:
        self.number = number
        self._socket = local
        self._local = SocketStream(local)
        self._dial = dial
        self._launch = launch
        self._observer = observer
        self._channel: Stream | None = None
        self._aborted = False
        self._up_ended = False
        self._small_reads = SMALL_READS  # in a row
        self._left: bytes | None = None  # what _ready() read and did not send
        self._verdict = threading.Event()  # the downward thread is done; _refusal is final
        # What went up before anything came down; None once it cannot be needed any more.
        self._seen: bytes | None = b""
        self._refusal: Refusal | None = None
        self._lock = threading.Lock()  # guards _seen, _refusal, and _channel against abort

    def run(self) -> None:
        """Carry until both directions have ended. Never raises for what peers do."""
        try:
            head = self._read_head()
            if head is not None:
                self._carry(head)
        except OSError:
            pass  # the program has gone; there is nobody to tell
        finally:
            self._socket.close()

    def finish(self) -> None:
        """Take no more from the program: the channel gets a clean end, and what is under way comes down."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)

    def abort(self) -> None:
        """End both sides at once."""
        with self._lock:
            self._aborted = True
            channel = self._channel
        if channel is not None:
            channel.abort()
        self._local.abort()

    def _read_head(self) -> bytes | None:
        """The first bytes when they are the protocol's, else None: a web page of this very user may
        connect too, and must not open a session (cross-site requests to loopback)."""
        self._socket.settimeout(HEAD_TIMEOUT)
        head = b""
        while len(head) < self._launch.head:
            # All that is there, so that a whole startup packet goes up as one message.
            data = self._socket.recv(MAX_SEEN)
            if not data:
                return None
            head += data
        self._socket.settimeout(None)
        if not self._launch.accepts(head[: self._launch.head]):
            words = f"a local program sent what is not a {self._launch.program} connection; closed"
            self._observer.report(words, "")
            return None
        return head

    def _carry(self, head: bytes) -> None:
        try:
            channel = self._dial()
        except PamError as error:
            self._refuse(error, head)
            self._up(None)
            return
        with self._lock:
            self._channel = channel
            if self._aborted:
                channel.abort()
        name = f"connection-{self.number}-up"
        up = threading.Thread(target=self._up, args=(channel, head), name=name, daemon=True)
        try:
            up.start()
        except RuntimeError:  # no more threads on this machine
            channel.abort()
            channel.close()
            self._refuse(UnavailableError("no thread is left for another connection"), head)
            self._up(None)
            return
        try:
            self._down(channel)
        finally:
            self._verdict.set()
            # While a refusal is told, the upward thread still reads the program's side of it.
            if self._refusal is not None:
                up.join(REFUSAL_TIMEOUT)
                self._local.abort()
            up.join()
            channel.close()

    def _up(self, channel: Stream | None, data: bytes = b"") -> None:
        """Program → channel, beginning with ``data``; with a refusal pending, program → refusal."""
        try:
            while data or (data := self._from_program()):
                if self._note(data):
                    self._answer(data)
                elif channel is not None:
                    self._send_up(channel.sendall, data)
                data = b""
            self._up_ended = True
            if channel is not None and self._refusal is None:
                self._send_up(channel.shutdown, socket.SHUT_WR)
        except (OSError, PamError):
            if channel is not None and self._refusal is None:
                channel.abort()

    def _from_program(self) -> bytes:
        try:
            if self._small_reads >= SMALL_READS and self._lend():
                self._small_reads = 0
                if self._left is not None:
                    return self._left
            data = self._local.recv(CHUNK)
        except OSError:
            # It was killed, or does not react to a refusal: its own doing, nothing to report.
            self._aborted = True
            raise
        self._small_reads = self._small_reads + 1 if len(data) < INLINE else 0
        return data

    def _lend(self) -> bool:
        """Have small messages sent up by the thread that reads the ssh connection, once no refusal can come;
        whether it has done so, until it left something to us."""
        channel, self._left = self._channel, None
        refused = self._seen is not None or self._refusal is not None  # or could be; in this order
        if refused or not isinstance(channel, LendingStream):
            return False
        return channel.lend(self._socket.fileno(), lambda: self._ready(channel))

    def _ready(self, channel: LendingStream) -> bool:
        """Program → channel in the thread that reads the ssh connection; False when there is more to do."""
        try:
            data = self._socket.recv(INLINE, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        if data and channel.send_soon(memoryview(data)):
            return len(data) < INLINE
        self._left = data
        return False

    def _send_up(self, send: Callable[..., None], *arguments: Data | int) -> None:
        try:
            send(*arguments)
        except (OSError, PamError):
            # What came down before may still be unread, a last error message and a clean end among it:
            # let the downward thread have it. Only a refusal keeps the program's side open.
            self._verdict.wait(REFUSAL_TIMEOUT)
            if self._refusal is None:
                raise

    def _down(self, channel: Stream) -> None:
        """Channel → program, until its clean end or an error.

        Nearly all of it goes by way of ``_hand``; this thread wakes for what the program does not take at
        once, and for the end.
        """
        if isinstance(channel, SecureChannel):
            channel.deliver_to(self._hand)
        while True:
            try:
                data = channel.recv(CHUNK)
            except (OSError, PamError) as error:
                self._fail(error)
                return
            if not data:
                if not self._up_ended:
                    self._observer.far_end()
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_WR)
                return
            self._seen = None
            try:
                self._local.sendall(data)
            except OSError:
                # The program has gone.
                self.abort()
                return

    def _hand(self, data: memoryview) -> int:
        """Channel → program in the thread that reads the ssh connection, which must not wait."""
        self._seen = None
        try:
            return self._socket.send(data, socket.MSG_DONTWAIT)
        except OSError:
            return 0  # full, or gone: the downward thread's to wait for or to find out

    def _fail(self, error: Exception) -> None:
        if self._aborted:
            self._local.abort()
            return
        if isinstance(error, TruncatedError) or not isinstance(error, PamError):
            error = UnavailableError("the connection through the relay was lost", hint="a new one may work.")
        with self._lock:
            seen = self._seen
        if isinstance(error, RefusedError) and seen is not None:
            self._refuse(error, None)
        else:
            self._observer.report(str(error), error.hint)
            self._local.abort()

    def _refuse(self, error: PamError, head: bytes | None) -> None:
        """Begin to tell the program; the upward loop goes on with it. ``head`` None: what was seen."""
        self._observer.report(str(error), error.hint)
        refusal = self._launch.refusal(str(error), error.hint)
        self._socket.settimeout(REFUSAL_TIMEOUT)
        with self._lock:
            heard = self._seen if head is None else head
            self._refusal = refusal
            self._seen = None
            # Within the lock: the upward thread must not answer later bytes before these.
            self._answer(heard or b"")

    def _note(self, data: bytes) -> bool:
        """Whether ``data`` is for a refusal; else it is kept while it may be needed for one."""
        if self._seen is None and self._refusal is None:
            return False  # the usual case, without the lock
        with self._lock:
            if self._refusal is not None:
                return True
            if self._seen is not None:
                kept = self._seen + data
                self._seen = kept if len(kept) <= MAX_SEEN else None
            return False

    def _answer(self, data: bytes) -> None:
        assert self._refusal is not None
        with contextlib.suppress(OSError):
            answer = self._refusal.feed(data)
            if answer:
                self._socket.sendall(answer)
            if self._refusal.done:
                # What the program still sends is read all the same, so that no reset eats the answer.
                self._socket.shutdown(socket.SHUT_WR)
