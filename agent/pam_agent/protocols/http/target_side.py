"""The connection to the app: dialled when needed, kept while it lasts, one exchange at a time."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Sequence
from typing import Final

import h11

from pam_agent.protocols.base import Conversation, TargetProtocolError
from pam_agent.protocols.http.wire import PIECE, Fields, Inbox, Machine, Response, response_of
from pam_agent.target_tls import TargetStream
from pam_common.buffer import ReadBuffer
from pam_common.errors import UnavailableError
from pam_common.stream import Data

#: Of one user's connection, one after another, for apps that close after each answer. Beyond it the user's
#: own connection is closed after an answer, and the browser opens another. A conversation dials 16 times at
#: most, and the last exchange may need a login and its redirects, too.
MAX_TARGETS: Final = 8
#: For TLS, as for a dial.
SECURE_SECONDS: Final = 10.0
#: A report may take minutes to begin; whoever waits longer is told.
ANSWER_SECONDS: Final = 600.0
#: Informational answers (100, 103) before the real one.
MAX_INTERIM: Final = 16

#: Turns a fresh socket into a stream: TLS or not, as the resource says.
Secure = Callable[[socket.socket], TargetStream]


class TargetGoneError(UnavailableError):
    """The app closed the connection before it answered."""


class TargetSide:
    """One user's connection's way to the app. Not for two threads but where a method says so."""

    def __init__(self, conversation: Conversation, secure: Secure) -> None:
        self._conversation = conversation
        self._secure = secure
        self._socket: socket.socket | None = None
        self._stream: TargetStream | None = None
        self._memory = ReadBuffer(PIECE)
        self._dials = 0
        self.fresh = False  #: whether the connection was dialled for this exchange
        #: Called before each read that may block.
        self.wait: Callable[[], None] = self.wait_answer
        self.inbox = Inbox(self._read, TargetProtocolError)
        self.machine = Machine("client")

    # -- the connection ------------------------------------------------------------------------------

    def ready(self) -> None:
        """Have a connection that an exchange can begin on. Raises PamError."""
        self.machine = Machine("client")
        if self._stream is not None and not self.inbox.rest and self._stream.quiet(0):
            self.fresh = False
            return
        # Closed by the app meanwhile, or it said something that nobody asked for.
        self.close()
        self._dials += 1
        sock = self._conversation.dial()
        try:
            sock.settimeout(SECURE_SECONDS)
            self._stream = self._secure(sock)
            sock.settimeout(None)
        except BaseException:
            _end(sock)
            raise
        self._socket = sock
        self.fresh = True

    @property
    def exhausted(self) -> bool:
        """Whether the user's connection should end after this exchange."""
        return self._dials >= MAX_TARGETS

    def close(self) -> None:
        """Let go of the connection, if there is one."""
        if self._socket is not None:
            _end(self._socket)
        self._socket = self._stream = None
        self.inbox.rest = b""

    def abort(self) -> None:
        """End it, from any thread: whoever reads or writes it wakes."""
        stream = self._stream
        if stream is not None:
            stream.abort()

    def release(self) -> None:
        """After an exchange: keep the connection if it may carry another. Browsers keep theirs for minutes,
        so the memory that was read into goes back to the system."""
        self._memory.release()
        if not self.machine.over:
            self.close()

    # -- sending (one thread at a time) --------------------------------------------------------------

    def send_request(self, method: str, target: str, fields: Fields, body: bytes, *, whole: bool) -> None:
        """A request's head with what is there of its body, in one go."""
        parts = [self.machine.send(h11.Request(method=method, target=target, headers=fields))]
        if body:
            parts.append(self.machine.send(h11.Data(data=body)))
        if whole:
            parts.append(self.machine.send(h11.EndOfMessage()))
        self.send(b"".join(parts))

    def send_piece(self, data: bytes) -> None:
        self.send(self.machine.send(h11.Data(data=data)))

    def send_end(self) -> None:
        self.send(self.machine.send(h11.EndOfMessage()))

    def send(self, data: Data) -> None:
        if data:
            self._now().sendall(data)

    # -- receiving (one thread) ----------------------------------------------------------------------

    def head(self) -> Response:
        """The next head: interim (1xx) or final. Raises TargetGoneError if there is none."""
        event = self.inbox.begin(self.machine)
        if event is None:
            raise TargetGoneError("the app closed the connection without an answer")
        if not isinstance(event, h11.Response | h11.InformationalResponse):
            raise TargetProtocolError("the app sent something that is no answer")
        return response_of(event)

    def final(self, interim: Callable[[Response], None] = lambda response: None) -> Response:
        """The final head, or one that switches protocols; ``interim`` gets those before it."""
        for _ in range(MAX_INTERIM):
            response = self.head()
            if response.status >= 200 or response.status == 101:
                return response
            interim(response)
        raise TargetProtocolError("the app sends interim answers without end")

    def piece(self, *, wait: bool = True) -> bytes | None:
        """See :meth:`Inbox.piece`."""
        return self.inbox.piece(self.machine, wait=wait)

    def quiet(self, seconds: float) -> bool:
        """Whether nothing arrives for so long."""
        return self._now().quiet(seconds)

    def read(self) -> bytes:
        """Raw bytes, for another protocol; what was read before comes first."""
        if self.inbox.rest:
            data, self.inbox.rest = self.inbox.rest, b""
            return data
        return self._read()

    def _read(self) -> bytes:
        self.wait()
        size = self._now().recv_into(self._memory.view)
        self._memory.note(size)
        return bytes(self._memory.view[:size])

    def wait_answer(self) -> None:
        if self.quiet(ANSWER_SECONDS):
            raise UnavailableError(f"the app has not answered for {ANSWER_SECONDS:.0f} s")

    def _now(self) -> TargetStream:
        if self._stream is None:
            raise TargetGoneError("the connection to the app is closed")
        return self._stream

    def ask(self, method: str, target: str, fields: Sequence[tuple[bytes, bytes]], body: bytes, limit: int
            ) -> tuple[Response, bytes]:  # fmt: skip
        """A whole exchange of our own; the answer's body up to ``limit`` bytes. Raises PamError, OSError."""
        self.ready()
        self.wait = self.wait_answer
        self.send_request(method, target, list(fields), body, whole=True)
        response = self.final()
        pieces, size = [], 0
        while (piece := self.piece()) is not None:
            size += len(piece)
            if size > limit:
                raise TargetProtocolError(f"the app's answer is longer than {limit >> 10} KiB")
            pieces.append(piece)
        self.release()
        return response, b"".join(pieces)


def _end(sock: socket.socket) -> None:
    # The session keeps a second descriptor of it, so closing this one alone would not tell the app.
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()
