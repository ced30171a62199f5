"""A request's body on its way to the app, in a thread of its own where it does not come with the head.

The answer may begin before the body has ended (a refusal, an app that streams both ways), so another thread
reads that meanwhile. What goes on was recorded before; a slow app slows the client.
"""

from __future__ import annotations

import contextlib
import threading
from typing import Final

from pam_agent.protocols.base import Conversation
from pam_agent.protocols.http.bodies import Body
from pam_agent.protocols.http.client_side import ClientSide
from pam_agent.protocols.http.rules import Rules
from pam_agent.protocols.http.target_side import TargetSide
from pam_common.errors import PamError, UnavailableError

#: Waiting for the thread once both its sides are cut.
JOIN_SECONDS: Final = 5.0


class Upload:
    """Carries the rest of one body; ``start`` it, then ``finish``."""

    def __init__(
        self, client: ClientSide, target: TargetSide, conversation: Conversation, rules: Rules, body: Body
    ) -> None:
        self._client, self._target, self._conversation = client, target, conversation
        self._rules = rules
        self._body = body
        self.failure: PamError | None = None
        self.done = False  #: the whole body went to the app
        self.moved = 0  #: bytes, so that who waits for the answer sees that it is not idle
        self._thread: threading.Thread | None = None

    def start(self, name: str) -> None:
        """Raises UnavailableError when the system gives no thread."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        try:
            self._thread.start()
        except RuntimeError:
            self._thread = None
            raise UnavailableError("the agent has no room for one more thread") from None

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def carry(self, piece: bytes) -> None:
        """Record and send one piece. Raises PamError; OSError when the app takes no more."""
        self._rules.check_size(self._body.bytes + len(piece))
        events = self._body.take(piece)
        if events:
            self._conversation.record(events)
        self._target.send_piece(piece)
        self._conversation.touch()
        self.moved += len(piece)

    def end(self) -> None:
        self._conversation.record([self._body.end()])
        self._target.send_end()
        self.done = True

    def _run(self) -> None:
        try:
            while (piece := self._next()) is not None:
                self.carry(piece)
            self.end()
        except PamError as error:
            self._fail(error)
        except OSError:
            # The app takes no more of it. It may have answered: the other thread finds out.
            self._discard()

    def _next(self) -> bytes | None:
        try:
            return self._client.piece()
        except OSError:
            raise UnavailableError("the client was cut off within its request") from None

    def _fail(self, error: PamError) -> None:
        self.failure = error
        self._target.abort()  # wakes the other thread, which tells
        self._discard()

    def _discard(self) -> None:
        """So that the client comes to read the answer."""
        try:
            while self._client.piece() is not None:
                pass
        except (OSError, PamError):
            return

    def finish(self) -> None:
        """The exchange is over. A body that did not end by itself does now."""
        if self._thread is None:
            return
        if self.running and not self.done:
            self._target.abort()
            self._client.linger(self._thread)
            if self.running:
                self._client.abort()
        self._thread.join(JOIN_SECONDS)
        if not self.done:
            # Nothing goes on after it, so a recording that failed is no matter here.
            with contextlib.suppress(PamError):
                self._conversation.record([self._body.end(cut=True)])
