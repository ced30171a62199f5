"""A WebSocket once the app has agreed to it: two threads, each the only writer of its side."""

from __future__ import annotations

import contextlib
import threading

from wsproto.frame_protocol import CloseReason, FrameProtocol

from pam_agent.protocols.base import ClientProtocolError, Conversation
from pam_agent.protocols.http.client_side import ClientSide
from pam_agent.protocols.http.frames import Frames
from pam_agent.protocols.http.rules import RuleError
from pam_agent.protocols.http.target_side import TargetSide
from pam_agent.protocols.http.upload import JOIN_SECONDS
from pam_common.errors import PamError, RefusedError, TruncatedError, UnavailableError


class Socket:
    """One WebSocket. ``run`` until either side ends."""

    def __init__(
        self, client: ClientSide, target: TargetSide, conversation: Conversation, up: Frames, down: Frames
    ) -> None:
        self._client, self._target, self._conversation = client, target, conversation
        self._up, self._down = up, down
        self._failure: PamError | None = None  # of the other thread
        self._client_gone = False

    def run(self, name: str) -> None:
        """Raises PamError for what was not a plain end; the client was told then."""
        thread = threading.Thread(target=self._carry_up, name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError:
            raise UnavailableError("the agent has no room for one more thread") from None
        try:
            self._carry_down()
            self._explain()
        except PamError as error:
            failure = self._better(error)
            self._tell(failure)
            raise failure from error
        finally:
            self._target.abort()
            self._client.linger(thread)
            if thread.is_alive():
                self._client.abort()
            thread.join(JOIN_SECONDS)

    def _carry_down(self) -> None:
        while True:
            try:
                data = self._target.read()
            except OSError:
                return
            if not data:
                return
            events = self._down.feed(data)
            if events:
                self._conversation.record(events)
            try:
                self._client.write(data)
            except (OSError, TruncatedError):
                self._client_gone = True
                return
            self._conversation.touch()

    def _carry_up(self) -> None:
        try:
            while True:
                data = self._client.read()
                if not data:
                    break
                events = self._up.feed(data)
                if events:
                    self._conversation.record(events)
                self._target.send(data)
                self._conversation.touch()
        except TruncatedError:
            pass
        except PamError as error:
            self._failure = error
        except OSError:
            pass  # either side is gone; the other thread sees which
        finally:
            self._target.abort()

    def _explain(self) -> None:
        if self._conversation.end_reason is not None:
            raise RefusedError(self._conversation.end_reason)
        if self._failure is not None:
            raise self._failure

    def _better(self, error: PamError) -> PamError:
        reason = self._conversation.end_reason
        if reason is not None:
            return RefusedError(reason)
        return self._failure or error

    def _tell(self, error: PamError) -> None:
        """A close frame with the reason, if one can be understood where the stream is."""
        if self._client_gone or not self._down.at_boundary:
            return
        text = str(error).encode()[:120].decode("utf-8", "ignore")
        frame = FrameProtocol(client=False, extensions=[]).close(_code(error, self._conversation), text)
        with contextlib.suppress(OSError, PamError):
            self._client.write(frame)


def _code(error: PamError, conversation: Conversation) -> CloseReason:
    if conversation.end_reason is not None:
        return CloseReason.GOING_AWAY
    if isinstance(error, RuleError):
        return CloseReason.MESSAGE_TOO_BIG
    if isinstance(error, ClientProtocolError):
        return CloseReason.PROTOCOL_ERROR
    return CloseReason.INTERNAL_ERROR
