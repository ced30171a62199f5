"""Client → target: small messages in the thread that brings them, the rest in one of its own.

Waking a thread for each query would cost more than all that is done for it here. So while the own thread
waits in ``recv``, the thread that reads the ssh connection calls ``take``, which looks, records and sends on
by itself. That thread serves other sessions too and must not wait: whatever is large, has no room, does not
fit into the target's socket at once, or is an end or a failure, is left to the own thread, which is woken.
The two never run at the same time.
"""

from __future__ import annotations

import threading
from typing import Final

from pam_agent.protocols.base import ClientProtocolError, Conversation
from pam_agent.protocols.postgres.client_side import ClientSide
from pam_agent.protocols.postgres.codec import CLIENT_KINDS
from pam_agent.protocols.postgres.framing import COPY_DATA, Framer
from pam_agent.protocols.postgres.pipeline import Pipeline
from pam_agent.target_tls import TargetStream
from pam_common.errors import PamError, TruncatedError, UnavailableError
from pam_common.frames import BATCH_DATA
from pam_common.stream import Data, DeliveringStream, Stream

#: One read of the client.
UP_SIZE: Final = BATCH_DATA
#: What the reading thread does itself. Looking at so many bytes takes it 5 ms at the very worst (a Sync in
#: every five of them), for which other sessions wait; and with more, waking a thread no longer matters.
INLINE: Final = 8 << 10


class Upward:
    """One connection's bytes from client to target. ``name`` is that of its thread."""

    def __init__(
        self,
        client: Stream,
        target: TargetStream,
        conversation: Conversation,
        pipeline: Pipeline,
        side: ClientSide,
        name: str,
    ) -> None:
        self.bytes = 0
        self.client_done = False  #: it said Terminate, or closed its side
        self.client_gone = False
        self.failure: PamError | None = None
        self._client = client
        self._target = target
        self._conversation = conversation
        self._pipeline = pipeline
        self._side = side
        self._framer = Framer(CLIENT_KINDS, frozenset({COPY_DATA}), side, ClientProtocolError)
        self._early = b""
        self._rest = b""  # of the last batch, less than a header
        self._unsent: Data = b""  # of what take() did; not empty only while our thread is being woken
        self._raised: Exception | None = None  # by take()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self, early: bytes) -> None:
        """Begin, with what was read ``early``. Raises UnavailableError when there are no more threads."""
        self._early = early
        try:
            self._thread.start()
        except RuntimeError:
            raise UnavailableError("the agent has no room for one more thread") from None

    @property
    def started(self) -> bool:
        return self._thread.ident is not None

    def ended(self, timeout: float | None = None) -> bool:
        """Wait until the thread is done; False if it was not in ``timeout`` seconds."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        clean = False
        try:
            self._carry(self._early)
            self.client_done = True
            self._target.end_sending()
            clean = True
        except PamError as error:
            self.failure = error
        except OSError:
            self.client_gone = True
        finally:
            if not clean:
                # Wakes the other direction, whatever happened here: it sees why and ends the connection.
                self._target.abort()

    def _carry(self, data: bytes) -> None:
        if isinstance(self._client, DeliveringStream):
            self._client.deliver_to(self.take)
        while True:
            if data and not self._forward(self._looked_at(data)):
                return
            if self._side.terminated:
                return
            self._pipeline.wait_for_room()
            try:
                data = self._client.recv(UP_SIZE)
            except InterruptedError:
                data = b""
                if not self._finish_taken():
                    return
            except TruncatedError:
                raise OSError("the client was cut off") from None
            else:
                if not data:
                    return

    def _looked_at(self, data: bytes) -> Data:
        """Look at a batch and record it; returns what may go on, keeps the start of a header."""
        if self._rest:
            data = self._rest + data
        safe = self._framer.feed(data, len(data))
        events = self._side.take_events()
        if events:
            self._conversation.record(events)
        if safe == len(data):
            self._rest = b""
            return data
        self._rest = data[safe:]
        return memoryview(data)[:safe]

    def _forward(self, data: Data) -> bool:
        try:
            self._target.sendall(data)
        except OSError:
            return False  # the target is gone; what it said last is still to be read by the other thread
        self._count(len(data))
        return True

    def _count(self, size: int) -> None:
        self.bytes += size
        self._conversation.touch()

    # -- in the thread that reads the ssh connection ---------------------------------------------------

    def take(self, data: memoryview) -> int:
        """Carry a batch on without waiting; how much of it is done, all or nothing.

        Raises InterruptedError when it is done but for what our thread has to look after.
        """
        if len(data) > INLINE or not self._pipeline.has_room:
            return 0
        try:
            ready = self._looked_at(bytes(data))
            left = self._target.send_soon(ready)
            self._count(len(ready))
        except Exception as error:
            # Ours to raise, in our own thread: this one carries other people's sessions.
            self._raised = error
            raise InterruptedError from error
        if left or self._side.terminated:
            self._unsent = left
            raise InterruptedError
        return len(data)

    def _finish_taken(self) -> bool:
        """In our thread: what take() left; False when the target is gone."""
        error, self._raised = self._raised, None
        if error is not None:
            raise error
        left, self._unsent = self._unsent, b""
        try:
            if left:
                self._target.send_rest(left)
        except OSError:
            return False
        return True
