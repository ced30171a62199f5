"""Carries the bytes of a connection that is logged in; each side has one writer.

``downward`` carries target → client in the calling thread or on its behalf, so nobody else writes to the
client and that thread can say last words between two messages. ``upward`` carries client → target. Each batch
that was read is looked at, its events are recorded, then it is sent on whole: a slow reader on one side slows
the writer on the other, no queue grows.
"""

from __future__ import annotations

import contextlib
import socket
from typing import Final

from pam_agent.protocols.base import Conversation
from pam_agent.protocols.postgres.client_side import ClientSide
from pam_agent.protocols.postgres.downward import Downward
from pam_agent.protocols.postgres.pipeline import Pipeline
from pam_agent.protocols.postgres.target_side import TargetSide
from pam_agent.protocols.postgres.upward import Upward
from pam_agent.target_tls import TargetStream
from pam_common.errors import PamError, RefusedError, UnavailableError
from pam_common.secure_channel import deadline
from pam_common.stream import Stream

#: For the client to close once it has been told the end, before its stream is aborted.
CLOSE_SECONDS: Final = 1.0


class TargetGoneError(UnavailableError):
    """The target closed in the middle of things."""


class Pump:
    """One connection's traffic. ``name`` is that of the upward thread."""

    def __init__(
        self,
        client: Stream,
        target: TargetStream,
        conversation: Conversation,
        pipeline: Pipeline,
        sides: tuple[ClientSide, TargetSide],
        name: str,
    ) -> None:
        self._client = client
        self._target = target
        self._conversation = conversation
        self._pipeline = pipeline
        self._client_side, self._target_side = sides
        self._up = Upward(client, target, conversation, pipeline, self._client_side, name)
        self._down = Downward(client, target, conversation, self._target_side)

    @property
    def bytes_up(self) -> int:
        return self._up.bytes

    @property
    def bytes_down(self) -> int:
        return self._down.bytes

    @property
    def at_boundary(self) -> bool:
        """Whether the client has got whole messages only, so that one more can be understood."""
        return self._down.at_boundary

    def run(self, early_up: bytes, early_down: bytes) -> str:
        """Carry until either side ends; the words say how. ``early_*`` was read during the login.

        Raises PamError for what the client must be told; ``finish`` must follow in any case.
        """
        self._up.start(early_up)
        try:
            self._down.carry(early_down)
        except PamError:
            self._explain()  # a better reason, if there is one
            raise
        self._explain()
        if self._down.client_gone or self._up.client_gone:
            return "client gone"
        if self._up.client_done or self._client_side.terminated:
            return "client closed"
        if self._target_side.last_words is not None:
            return "target ended the connection"
        raise TargetGoneError("the target closed the connection unexpectedly")

    def finish(self) -> None:
        """Both directions end; returns when the upward thread has."""
        self._target.abort()
        self._pipeline.close()
        if not self._up.started:
            return
        # The client reads the end and closes. One that does not within a second is cut off.
        if not (self._down.client_gone or self._up.client_gone):
            with contextlib.suppress(OSError, PamError), deadline(self._client, CLOSE_SECONDS):
                self._client.shutdown(socket.SHUT_WR)
            self._up.ended(CLOSE_SECONDS)
        if not self._up.ended(0):
            self._client.abort()
            self._up.ended()

    def _explain(self) -> None:
        """Raise the reason of the end that is known best: the session's, then the other thread's."""
        reason = self._conversation.end_reason
        if reason is not None:
            raise RefusedError(reason)
        if self._up.failure is not None:
            raise self._up.failure
