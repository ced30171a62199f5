"""One session with an app: its user's connections, from the first byte of each to the last."""

from __future__ import annotations

import contextlib

from pam_agent.protocols.base import Conversation, Opening
from pam_agent.protocols.http import options, pages
from pam_agent.protocols.http.account import Account
from pam_agent.protocols.http.client_side import ClientSide
from pam_agent.protocols.http.door import Door
from pam_agent.protocols.http.exchange import ClientGoneError, Exchange, Line
from pam_agent.protocols.http.target_side import TargetSide
from pam_common.errors import PamError, RefusedError, TruncatedError, UnavailableError
from pam_common.stream import Stream


class HttpInterceptor:
    """The :class:`~pam_agent.protocols.base.Interceptor` for HTTP/1.1 and WebSocket."""

    def __init__(self, opening: Opening) -> None:
        """Raises PamError for options that are not understood, or a login that lacks its secret."""
        self._opening = opening
        self._account = Account(opening, options.parse(opening))
        self._door = Door()

    def serve(self, client: Stream, conversation: Conversation) -> None:
        name = f"session-{self._opening.session}-{conversation.number}"
        side = ClientSide(client, f"{name}-watch")
        target = TargetSide(conversation, self._account.secure)
        outcome = "client closed"
        try:
            outcome = self._serve(side, target, conversation, name)
        except ClientGoneError as error:
            outcome = str(error)
            side.abort()  # it must not take a cut answer for a whole one
        except (PamError, OSError) as error:
            failure = _reason(error, conversation)
            outcome = str(failure)
            raise failure from error
        finally:
            target.close()
            with contextlib.suppress(PamError):
                conversation.record([{"kind": "end", "reason": outcome}])

    def _serve(self, side: ClientSide, target: TargetSide, conversation: Conversation, name: str) -> str:
        try:
            preamble = side.preamble()
        except PamError as error:
            self._tell(side, error)
            raise
        conversation.record([self._start_event(preamble.mode, preamble.origin)])
        line = Line(side, target, conversation, preamble, self._account, self._door, name)
        number = 0
        while True:
            try:
                request = side.request()
            except (OSError, TruncatedError):
                return "client gone"
            except PamError as error:
                self._tell(side, error)
                raise
            if request is None:
                return "client closed"
            number += 1
            if not self._exchange(Exchange(line, number, request), side, conversation):
                side.linger()
                return "last answer sent"

    def _exchange(self, exchange: Exchange, side: ClientSide, conversation: Conversation) -> bool:
        try:
            return exchange.run()
        except ClientGoneError:
            raise
        except (PamError, OSError) as error:
            failure = _reason(error, conversation)
            if exchange.answered:
                side.abort()
                raise failure from error
            with contextlib.suppress(OSError, TruncatedError):
                if exchange.refuse(failure):
                    return True
                side.linger()
            raise failure from error
        finally:
            exchange.finish()

    @staticmethod
    def _tell(side: ClientSide, error: PamError) -> None:
        with contextlib.suppress(OSError, PamError):
            side.answer(*pages.refusal(error), head_only=False)
            side.linger()

    @staticmethod
    def refuse(client: Stream, message: str, hint: str) -> None:
        side = ClientSide(client, "refusal-watch")
        side.preamble()
        request = side.request()
        if request is not None:
            side.answer(*pages.page(403, message, hint), head_only=request.method == "HEAD")
            side.linger()

    def _start_event(self, mode: str, origin: str) -> dict[str, object]:
        settings = self._account.options
        return {
            "kind": "start",
            "protocol": "http",
            "mode": mode,
            "origin": origin,
            "app": settings.origin,
            "login": settings.login,
            "user": self._opening.credential.user,
        }


def _reason(error: PamError | OSError, conversation: Conversation) -> PamError:
    """What to say of an error: the session's end, when that caused it."""
    if conversation.end_reason is not None:
        return RefusedError(conversation.end_reason)
    if isinstance(error, PamError):
        return error
    if isinstance(error, TimeoutError):
        return UnavailableError("the app does not answer")
    return UnavailableError(f"the app cannot be used: {error.strerror or type(error).__name__}")
