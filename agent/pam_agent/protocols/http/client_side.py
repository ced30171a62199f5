"""The user's connection: requests one after another, and their answers."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Any, Final

import h11

from pam_agent.protocols.base import ClientProtocolError
from pam_agent.protocols.http.door import MAX_PREAMBLE, Preamble, parse_preamble
from pam_agent.protocols.http.wire import PIECE, Inbox, Machine, Request, request_of
from pam_common.errors import PamError, UnavailableError
from pam_common.secure_channel import deadline
from pam_common.stream import Data, Stream

#: For the client's own line, which it sends at once.
PREAMBLE_SECONDS: Final = 10.0
#: For the rest of a head whose beginning is there.
HEAD_SECONDS: Final = 30.0
#: For whoever still sends a body that nobody wants: it reads the answer first, or is cut.
LINGER_SECONDS: Final = 2.0


class ClientSide:
    """Requests are read one at a time: one that came too early waits, in one read's worth of memory."""

    def __init__(self, stream: Stream, name: str) -> None:
        """``name`` is for the thread that watches for the client's end."""
        self._stream = stream
        self._name = name
        self._ahead: _Ahead | None = None
        self.inbox = Inbox(self._read, ClientProtocolError)
        self.machine = Machine("server")
        self.abort = stream.abort

    # -- receiving (one thread at a time) ------------------------------------------------------------

    def preamble(self) -> Preamble:
        """The client's own line, which precedes the program's bytes. Raises PamError."""
        buffer = b""
        with deadline(self._stream, PREAMBLE_SECONDS, "the client's first line"):
            while b"\n" not in buffer:
                data = self._stream.recv(PIECE)
                buffer += data
                if not data or len(buffer.partition(b"\n")[0]) > MAX_PREAMBLE:
                    raise ClientProtocolError("the client did not say what it carries")
        line, _, self.inbox.rest = buffer.partition(b"\n")
        if len(line) > MAX_PREAMBLE:
            raise ClientProtocolError("the client did not say what it carries")
        return parse_preamble(line)

    def request(self) -> Request | None:
        """The next request; None when the client has closed. Its body is still to be read."""
        self.machine = Machine("server")
        if not self.inbox.rest:
            # A browser keeps connections for minutes without a word: no clock runs until it begins.
            self.inbox.rest = self._read()
            if not self.inbox.rest:
                return None
        if b"\r\n\r\n" in self.inbox.rest:
            return self._request()
        with deadline(self._stream, HEAD_SECONDS, "the head of a request"):
            return self._request()

    def _request(self) -> Request | None:
        event = self.inbox.begin(self.machine)
        if event is None:
            return None
        if not isinstance(event, h11.Request):
            raise ClientProtocolError("the client sent something that is no request")
        return request_of(event)

    def piece(self, *, wait: bool = True) -> bytes | None:
        """See :meth:`Inbox.piece`."""
        return self.inbox.piece(self.machine, wait=wait)

    def read(self) -> bytes:
        """Raw bytes, for another protocol; what was read before comes first."""
        if self.inbox.rest:
            data, self.inbox.rest = self.inbox.rest, b""
            return data
        return self._read()

    def _read(self) -> bytes:
        ahead, self._ahead = self._ahead, None
        return self._stream.recv(PIECE) if ahead is None else ahead.result()

    def watch(self, gone: Callable[[], None]) -> None:
        """Have a thread notice that the client closes, while this one waits for the app: ``gone`` is called
        then, from that thread. What the client sends instead is its next request, and is kept."""
        if self._ahead is None and not self.inbox.rest:
            self._ahead = _Ahead(self._stream, gone, self._name)

    # -- sending (one thread) ------------------------------------------------------------------------

    def send(self, event: Any) -> None:
        """A message of h11, or a piece of one."""
        self.write(self.machine.send(event))

    def write(self, data: Data) -> None:
        if data:
            self._stream.sendall(data)

    def answer(self, response: h11.Response, body: bytes, *, head_only: bool) -> None:
        """A whole answer of our own."""
        parts = [self.machine.send(response)]
        if body and not head_only:
            parts.append(self.machine.send(h11.Data(data=body)))
        parts.append(self.machine.send(h11.EndOfMessage()))
        self.write(b"".join(parts))

    def linger(self, reader: threading.Thread | None = None) -> None:
        """The last answer was sent: say that it was the last, and read what still comes, for a moment (or let
        ``reader`` do it). A program that is cut while it sends may never look at the answer."""
        with contextlib.suppress(OSError, PamError), deadline(self._stream, LINGER_SECONDS):
            self._stream.shutdown(socket.SHUT_WR)
            if reader is not None:
                reader.join(2 * LINGER_SECONDS)
                return
            while self._read():
                pass


class _Ahead:
    """One read in a thread of its own."""

    def __init__(self, stream: Stream, gone: Callable[[], None], name: str) -> None:
        self._stream = stream
        self._gone = gone
        self._data = b""
        self._error: OSError | PamError | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        try:
            self._thread.start()
        except RuntimeError:
            raise UnavailableError("the agent has no room for one more thread") from None

    def _run(self) -> None:
        try:
            self._data = self._stream.recv(PIECE)
        except (OSError, PamError) as error:
            self._error = error
        if not self._data:
            self._gone()

    def result(self) -> bytes:
        """Waits for it."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._data
