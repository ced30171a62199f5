"""One request and its answer.

client                      exchange                               app
  | head                      |                                     |
  |-------------------------->| 1. admitted? (every request)        |
  |                           | 2. rules: method, path, size        |
  |                           | 3. login, if the app needs one      |
  |                           | 4. "request" is recorded            |
  |                           |------------------------------------>|
  | body ....................>| .... recorded, then sent on ......> |  (a thread of its own, if long)
  |                           |                 head                |
  |                           |<------------------------------------|
  |                           | 5. logged out? log in, ask again    |
  |                           | 6. "response" is recorded           |
  |<--------------------------|                                     |
  |<..........................| .... recorded, then sent on <...... |
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import Any, Final

import h11

from pam_agent.protocols.base import ClientProtocolError, Conversation, Event, TargetProtocolError
from pam_agent.protocols.http import pages
from pam_agent.protocols.http.account import Account
from pam_agent.protocols.http.bodies import Body, media_type
from pam_agent.protocols.http.client_side import ClientSide
from pam_agent.protocols.http.door import Door, Entry, Preamble
from pam_agent.protocols.http.frames import Frames
from pam_agent.protocols.http.links import LinkRewriter
from pam_agent.protocols.http.rewrite import Origins, response_fields
from pam_agent.protocols.http.rules import RuleError
from pam_agent.protocols.http.sockets import Socket
from pam_agent.protocols.http.target_side import ANSWER_SECONDS, TargetGoneError, TargetSide
from pam_agent.protocols.http.upload import Upload
from pam_agent.protocols.http.wire import PIECE, Fields, Request, Response, gather, without
from pam_common.errors import PamError, TruncatedError, UnavailableError

#: How long an app may think before somebody watches whether the client is still there.
WATCH_SECONDS: Final = 2.0

#: RFC 9110, 9.2: may be asked again without asking the user.
_SAFE: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_IDEMPOTENT: Final = _SAFE | {"PUT", "DELETE"}
_NEVER: Final = frozenset({"CONNECT", "TRACE"})
#: What an answer says of its very bytes, which a page's links change.
_OF_THE_BYTES: Final = (b"content-md5", b"digest", b"content-digest", b"repr-digest")


class ClientGoneError(UnavailableError):
    """The client closed before its answer was there."""


class AskAgainError(UnavailableError):
    """The login was renewed, and the request is not one that may be sent twice."""


@dataclass(frozen=True)
class Line:
    """What the exchanges of one user's connection share. ``name`` begins the names of its threads."""

    client: ClientSide
    target: TargetSide
    conversation: Conversation
    preamble: Preamble
    account: Account
    door: Door
    name: str

    @property
    def origins(self) -> Origins:
        return Origins(self.preamble.origin, self.account.options.origin)


class Exchange:
    """``run`` it once. ``url`` and ``request`` are for the events."""

    def __init__(self, line: Line, number: int, request: Request) -> None:
        self._line = line
        self._number = number
        self._request = request
        self._client, self._target = line.client, line.target
        self._rules = line.account.options.rules
        self._began = time.monotonic()
        self._upload: Upload | None = None
        self._answering = False  # the final head has come
        self._gone = False

    @property
    def answered(self) -> bool:
        """Whether the client got the beginning of an answer, so that no page of ours can follow."""
        return self._client.machine.begun

    def run(self) -> bool:
        """True if the user's connection may carry another exchange. Raises PamError or OSError for what is to
        be told, unless ``answered``."""
        request, account = self._request, self._line.account
        entry = self._admit()
        if entry is not None:
            self._client.answer(*pages.entrance(entry), head_only=request.method == "HEAD")
            return not request.has_body and self._client.piece() is None and self._client.machine.over
        target = self._rules.check(request.method, request.target)
        self._rules.check_size(request.length or 0)
        first, whole = self._first()
        self._rules.check_size(len(first))
        self._target.wait = self._wait
        try:
            login = account.ensure(self._target, self._line.conversation)
            response = self._ask(target, first, whole)
            if account.logged_out(response, target) and account.renewable(login):
                response = self._ask_again(login, target, first, whole)
            if response.status == 101:
                self._switch(target, response)
                return False
            self._respond(target, response)
        except (OSError, PamError):
            if self._gone:
                raise ClientGoneError("the client closed before the answer was there") from None
            if self._upload is not None and self._upload.failure is not None:
                raise self._upload.failure from None
            raise
        return self._client.machine.over

    def refuse(self, error: PamError) -> bool:
        """Record and tell an error; True if the connection may go on all the same."""
        request = self._request
        keep = isinstance(error, RuleError) and not request.has_body and not request.upgrades
        event: Event = {"kind": "failed", "id": self._number, "reason": str(error)}
        rule = getattr(error, "rule", None)
        if rule is not None:
            event = {"kind": "refused", "id": self._number, "rule": rule}
        event.update(method=request.method, url=self._url(request.target), status=pages.status_of(error))
        # The page says no more than the user knows, so a recording that failed does not keep it back.
        with contextlib.suppress(PamError):
            self._line.conversation.record([event])
        if keep:
            keep = self._client.piece() is None
        response, body = pages.refusal(error, close=not keep)
        self._client.answer(response, body, head_only=request.method == "HEAD")
        return keep and self._client.machine.over

    # -- the request ---------------------------------------------------------------------------------

    def _admit(self) -> Entry | None:
        request = self._request
        entry = self._line.door.admit(self._line.preamble, request)
        if request.method.upper() in _NEVER:
            raise RuleError(f"{request.method} has no place here", f"method {request.method}", 405)
        if request.words(b"expect") - {b"100-continue"}:
            raise RuleError("the request expects what is not known here", "expect", 417)
        if self._socket and request.has_body:
            raise ClientProtocolError("a request for a socket has no body")
        return entry

    @property
    def _socket(self) -> bool:
        """Whether it asks for a WebSocket; any other protocol is not asked for (``Upgrade`` is dropped)."""
        return self._request.upgrades and self._request.words(b"upgrade") == {b"websocket"}

    def _first(self) -> tuple[bytes, bool]:
        """What is there of the body, and whether that is all of it. A short one is waited for."""
        request = self._request
        if request.has_body and b"100-continue" in request.words(b"expect"):
            return b"", False
        if request.chunked or (request.length or 0) > PIECE:
            return gather(lambda: self._client.piece(wait=False))
        first, whole = gather(self._client.piece)
        # Exactly a piece's worth: its end is yet to be taken.
        return first, whole or self._client.piece() is None

    def _ask(self, target: str, first: bytes, whole: bool) -> Response:
        fields = self._fields(target, first, whole)
        body = self._body(self._request, "up")
        self._line.conversation.record(self._request_events(target, fields, body, first, whole))
        while True:
            self._target.ready()
            try:
                self._send(target, fields, first, whole, body)
                return self._target.final(self._interim)
            except (OSError, TargetGoneError):
                # The app may have closed just as it was asked: a kept connection is no promise.
                again = whole and not self._target.fresh and self._request.method in _IDEMPOTENT
                if not again or self._gone or self._line.conversation.end_reason is not None:
                    raise
                self._target.close()

    def _send(self, target: str, fields: Fields, first: bytes, whole: bool, body: Body) -> None:
        sending = self._target.send_request
        if whole:
            sending(self._request.method, target, fields, first, whole=True)
            return
        upload = Upload(self._client, self._target, self._line.conversation, self._rules, body)
        sending(self._request.method, target, fields, first, whole=False)
        self._upload = upload
        upload.start(f"{self._line.name}-up")

    def _ask_again(self, login: int, target: str, first: bytes, whole: bool) -> Response:
        """The app has forgotten the login. What changes something is not sent twice on our own account."""
        self._target.close()
        account = self._line.account
        account.renew(login, self._target, self._line.conversation)
        if not whole or self._request.method not in _SAFE:
            raise AskAgainError(
                "the app had ended the login; it is renewed now",
                hint="nothing was changed: go back and do it again.",
            )
        self._target.wait = self._wait
        self._answering = False
        self._target.ready()
        self._target.send_request(
            self._request.method, target, self._fields(target, first, whole), first, whole=True
        )
        return self._target.final(self._interim)

    def _fields(self, target: str, first: bytes, whole: bool) -> Fields:
        request, account = self._request, self._line.account
        page = self._line.preamble.mode == "browser" and b"text/html" in (request.value(b"accept") or b"")
        fields = account.rewriter.fields(request, self._line.preamble.origin, target, account.jar, page=page)
        if self._socket:
            return [*fields, (b"Connection", b"Upgrade"), (b"Upgrade", b"websocket")]
        if whole and (request.has_body or request.length == 0):
            fields.append((b"Content-Length", str(len(first)).encode()))
        elif not whole and request.length is not None:
            fields.append((b"Content-Length", str(request.length).encode()))
        elif not whole:
            fields.append((b"Transfer-Encoding", b"chunked"))
        return fields

    def _interim(self, response: Response) -> None:
        expecting = b"100-continue" in self._request.words(b"expect")
        if response.status == 100 and expecting and self._request.version == "1.1":
            self._client.send(h11.InformationalResponse(status_code=100, headers=[], reason="Continue"))

    def _wait(self) -> None:
        """Before each read of the app. While it is silent somebody watches the client."""
        waited, moved = 0.0, 0
        while self._target.quiet(WATCH_SECONDS):
            upload = self._upload
            if upload is not None and upload.running:
                waited = 0.0 if upload.moved != moved else waited
                moved = upload.moved
            else:
                self._client.watch(self._left)
            waited += WATCH_SECONDS
            if waited >= ANSWER_SECONDS and not self._answering:
                raise UnavailableError(f"the app has not answered for {ANSWER_SECONDS:.0f} s")

    def _left(self) -> None:
        self._gone = True
        self._target.abort()

    # -- the answer ----------------------------------------------------------------------------------

    def _respond(self, target: str, response: Response) -> None:
        line = self._line
        self._answering = True
        fields = response_fields(
            response, target, line.origins, line.account.jar, injected=line.account.injects
        )
        body = self._body(response, "down")
        first, whole = gather(lambda: self._target.piece(wait=False))
        event = self._response_event(response)
        if whole:
            line.conversation.record([{**event, **body.whole(first)}])
        else:
            line.conversation.record([{**event, "body_bytes": None}, *body.take(first)])
        links = self._links(response)
        if links is not None:
            fields = without(fields, b"content-length", *_OF_THE_BYTES)
            if whole:
                first, links = links.feed(first) + links.finish(), None
                fields.append((b"Content-Length", str(len(first)).encode()))
        if self._target.exhausted or (self._upload is not None and not self._upload.done):
            fields.append((b"Connection", b"close"))
        reason = response.reason.encode("latin-1")
        head = h11.Response(status_code=response.status, headers=fields, reason=reason)
        parts = [self._client.machine.send(head), self._piece(first, links)]
        if whole:
            parts.append(self._end(links))
        self._write(b"".join(parts))
        line.conversation.touch()
        if not whole:
            self._stream(body, links)

    def _stream(self, body: Body, links: LinkRewriter | None) -> None:
        """The rest of the answer's body, as it comes."""
        conversation = self._line.conversation
        try:
            while (piece := self._target.piece()) is not None:
                events = body.take(piece)
                if events:
                    conversation.record(events)
                self._write(self._piece(piece, links))
                conversation.touch()
            if self._gone or conversation.end_reason is not None:
                # An answer that lasts until its connection ends would look whole: it is we who ended it.
                raise TargetGoneError("the answer was cut")
        except (OSError, PamError):
            with contextlib.suppress(PamError):
                conversation.record([body.end(cut=True, ms=self._ms())])
            raise
        conversation.record([body.end(ms=self._ms())])
        self._write(self._end(links))

    def _piece(self, data: bytes, links: LinkRewriter | None) -> bytes:
        data = data if links is None else links.feed(data)
        return self._client.machine.send(h11.Data(data=data)) if data else b""

    def _end(self, links: LinkRewriter | None) -> bytes:
        rest = links.finish() if links is not None else b""
        last = self._client.machine.send(h11.Data(data=rest)) if rest else b""
        return last + self._client.machine.send(h11.EndOfMessage())

    def _write(self, data: bytes) -> None:
        try:
            self._client.write(data)
        except (OSError, TruncatedError):
            raise ClientGoneError("the client closed before the answer was there") from None

    def _links(self, response: Response) -> LinkRewriter | None:
        """Whether links are to be put right: in whole pages for a browser."""
        page = media_type(response)[0] in ("text/html", "application/xhtml+xml")
        plain = not response.words(b"content-encoding") - {b"identity"} and response.status != 206
        bodiless = self._request.method == "HEAD" or response.status in (204, 304)
        if self._line.preamble.mode == "browser" and page and plain and not bodiless:
            return LinkRewriter(self._line.origins)
        return None

    def _switch(self, target: str, response: Response) -> None:
        line = self._line
        if not self._socket or response.words(b"upgrade") != {b"websocket"}:
            raise TargetProtocolError("the app switched to a protocol that nobody asked for")
        if response.values(b"sec-websocket-extensions"):
            raise TargetProtocolError("the app uses extensions that nobody asked for")
        fields = response_fields(
            response, target, line.origins, line.account.jar, injected=line.account.injects
        )
        fields += [(b"Connection", b"Upgrade"), (b"Upgrade", b"websocket")]
        line.conversation.record([{**self._response_event(response), "body_bytes": 0}])
        self._answering = True
        self._write(
            self._client.machine.send(
                h11.InformationalResponse(status_code=101, headers=fields, reason="Switching Protocols")
            )
        )
        self._target.wait = lambda: None
        budget, redactor = line.account.options.record_bodies, line.account.redactor
        up = Frames(self._number, "up", budget, redactor, self._rules)
        down = Frames(self._number, "down", budget, redactor, self._rules)
        Socket(self._client, self._target, line.conversation, up, down).run(f"{line.name}-up")

    def finish(self) -> None:
        """After ``run``, and after ``refuse`` if it came to that: let go of what is still under way."""
        if self._upload is not None:
            self._upload.finish()
        self._target.wait = self._target.wait_answer
        self._target.release()

    # -- events --------------------------------------------------------------------------------------

    def _body(self, head: Request | Response, way: Any) -> Body:
        account = self._line.account
        return Body(head, self._number, way, account.options.record_bodies, account.redactor)

    def _request_events(
        self, target: str, fields: Fields, body: Body, first: bytes, whole: bool
    ) -> list[Event]:
        event: Event = {
            "kind": "request",
            "id": self._number,
            "method": self._request.method,
            "url": self._url(target),
            "version": self._request.version,
            "headers": self._line.account.redactor.fields(fields),
        }
        if whole:
            return [{**event, **body.whole(first)}]
        return [{**event, "body_bytes": None}, *body.take(first)]

    def _response_event(self, response: Response) -> Event:
        return {
            "kind": "response",
            "id": self._number,
            "status": response.status,
            "reason": response.reason,
            "version": response.version,
            "headers": self._line.account.redactor.fields(response.fields),
            "ms": self._ms(),
        }

    def _url(self, target: str) -> str:
        return self._line.account.redactor.address(self._line.account.options.origin + target)

    def _ms(self) -> float:
        return round((time.monotonic() - self._began) * 1000, 3)
