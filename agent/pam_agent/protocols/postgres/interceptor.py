"""One PostgreSQL session: its connections, from the first byte of each to the last."""

from __future__ import annotations

import contextlib
import time
from contextlib import ExitStack
from typing import Final

from pam_agent.protocols.base import Conversation, Event, Opening
from pam_agent.protocols.postgres import codec, startup
from pam_agent.protocols.postgres.cancel import CancelKeys
from pam_agent.protocols.postgres.client_side import ClientSide
from pam_agent.protocols.postgres.codec import CancelRequest, Startup
from pam_agent.protocols.postgres.failures import REFUSED, reason, tell
from pam_agent.protocols.postgres.login import ANSWER_SECONDS, Login, log_in, secure
from pam_agent.protocols.postgres.pipeline import Pipeline
from pam_agent.protocols.postgres.pump import Pump
from pam_agent.protocols.postgres.startup import Request
from pam_agent.protocols.postgres.target_side import TargetSide
from pam_common.errors import PamError
from pam_common.secure_channel import deadline
from pam_common.stream import SocketStream, Stream

#: For the whole login to the target, as long as PostgreSQL's own authentication_timeout.
LOGIN_SECONDS: Final = 60.0
#: For the target to act on a cancel request, which it answers by closing.
CANCEL_SECONDS: Final = 10.0


class PostgresInterceptor:
    """The :class:`~pam_agent.protocols.base.Interceptor` for PostgreSQL's protocol 3.0 and 3.2."""

    def __init__(self, opening: Opening) -> None:
        self._opening = opening
        self._keys = CancelKeys()

    def serve(self, client: Stream, conversation: Conversation) -> None:
        with ExitStack() as stack:
            pump: Pump | None = None
            try:
                first = _first_request(client)
                if first is None:
                    return
                asked, early = first
                if isinstance(asked, CancelRequest):
                    self._cancel(asked, conversation)
                    return
                request = startup.narrow(asked, self._opening)
                login = self._log_in(request, conversation, stack)
                conversation.record([self._start_event(request, login)])
                client.sendall(self._greeting(asked, request, login, stack))
                pump = self._pump(client, conversation, login)
                stack.callback(pump.finish)
                outcome = pump.run(early, login.rest)
                _record_end(conversation, outcome, pump)
            except (PamError, OSError) as error:
                failure = reason(error, conversation)
                _record_end(conversation, str(failure), pump)
                if pump is None or pump.at_boundary:
                    tell(client, failure)
                if failure is error:
                    raise
                raise failure from error

    @staticmethod
    def refuse(client: Stream, message: str, hint: str) -> None:
        first = _first_request(client)
        if first is not None and not isinstance(first[0], CancelRequest):
            client.sendall(codec.error_response(REFUSED, message, hint))

    def _log_in(self, request: Request, conversation: Conversation, stack: ExitStack) -> Login:
        opening = self._opening
        sock = conversation.dial()
        stack.callback(sock.close)
        with deadline(SocketStream(sock), LOGIN_SECONDS, "the login to the target"):
            sock.settimeout(ANSWER_SECONDS)
            target = secure(sock, opening.target, opening.credential)
            login = log_in(target, opening.credential, request.version, request.parameters)
            sock.settimeout(None)
        return login

    def _greeting(self, asked: Startup, request: Request, login: Login, stack: ExitStack) -> bytes:
        """What a client gets that is logged in. No password was asked of it: its grant let it in."""
        parts = []
        if asked.version > login.version or request.unsupported:
            parts.append(codec.negotiate_version(login.version, request.unsupported))
        parts += [codec.message(b"R", codec.UINT32.pack(0)), bytes(login.greeting)]
        if login.secret:
            key = self._keys.issue(login.pid, login.secret, login.version)
            stack.callback(self._keys.withdraw, key)
            parts.append(codec.message(b"K", codec.UINT32.pack(key.pid) + key.secret))
        return b"".join([*parts, login.ready])

    def _pump(self, client: Stream, conversation: Conversation, login: Login) -> Pump:
        pipeline = Pipeline()
        client_side = ClientSide(pipeline, time.monotonic, self._opening.rows_bytes)
        target_side = TargetSide(pipeline, self._opening.rows_bytes, time.monotonic)
        for setting in login.settings.items():
            target_side.setting(*setting)
        name = f"session-{self._opening.session}-{conversation.number}-up"
        return Pump(client, login.stream, conversation, pipeline, (client_side, target_side), name)

    def _start_event(self, request: Request, login: Login) -> Event:
        return {
            "kind": "start",
            "protocol": f"{login.version >> 16}.{login.version & 0xFFFF}",
            "database": request.database,
            "user": self._opening.credential.user,
            "application": request.application,
            "server_version": login.settings.get("server_version"),
            "encoding": login.settings.get("client_encoding"),
            "pid": login.pid,
            "tls": login.stream.tls_version,
            "login": login.method,
            "options": request.parameters.get("options"),
            "replication": request.parameters.get("replication"),
        }

    def _cancel(self, request: CancelRequest, conversation: Conversation) -> None:
        """Pass a cancel request on; a key that is not of this session is ignored, as PostgreSQL does."""
        theirs = self._keys.find(request)
        conversation.record([{"kind": "cancel", "pid": request.pid, "known": theirs is not None}])
        if theirs is None:
            return
        with contextlib.closing(conversation.dial()) as sock:
            sock.settimeout(CANCEL_SECONDS)
            target = secure(sock, self._opening.target, self._opening.credential)
            target.sendall(codec.cancel_request(theirs.pid, theirs.secret))
            # The client takes the end of its stream as "done", so wait for the target to say so.
            with contextlib.suppress(OSError):
                target.recv_into(memoryview(bytearray(1)))


def _first_request(client: Stream) -> tuple[Startup | CancelRequest, bytes] | None:
    with deadline(client, startup.SECONDS, "the client's start-up"):
        return startup.read(client)


def _record_end(conversation: Conversation, outcome: str, pump: Pump | None) -> None:
    """The last event. Nothing is forwarded after it, so a recording that failed is no matter here."""
    event: Event = {"kind": "end" if pump is not None else "refused", "reason": outcome}
    if pump is not None:
        event.update(bytes_up=pump.bytes_up, bytes_down=pump.bytes_down)
    with contextlib.suppress(PamError):
        conversation.record([event])
