"""pam-agent as the bench runs it: what it serves depends on the resource's name.

    .venv/bin/python tests/bench/agent.py --config FILE run

``echo``        whatever bytes come, carried as they are, each batch recorded: the path without a database
``unrecorded``  PostgreSQL, with nothing recorded: what is left is what recording costs
anything else   PostgreSQL, as it is

Registered nowhere but here: the product has no such protocols.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Sequence

from pam_agent.__main__ import main
from pam_agent.protocols import PROTOCOLS
from pam_agent.protocols.base import Conversation, Event, Interceptor, Opening
from pam_agent.protocols.postgres import PostgresInterceptor
from pam_common.errors import PamError
from pam_common.frames import BATCH_DATA
from pam_common.stream import DeliveringStream, LendingStream, Stream

#: As the PostgreSQL interceptor reads, and what it does in the thread that brings the bytes.
DOWN, UP, INLINE = BATCH_DATA, BATCH_DATA, 8 << 10


class EchoInterceptor:
    """Carries bytes to a server that echoes, and back; every batch is recorded before it goes on."""

    def __init__(self, opening: Opening) -> None:
        pass

    def serve(self, client: Stream, conversation: Conversation) -> None:
        with contextlib.closing(conversation.dial()) as target:
            up = threading.Thread(target=_up, args=(client, conversation, target), daemon=True)
            up.start()
            try:
                _down(client, conversation, target)
                with contextlib.suppress(OSError, PamError):
                    client.shutdown(socket.SHUT_WR)
            finally:
                with contextlib.suppress(OSError):
                    target.shutdown(socket.SHUT_RDWR)
            up.join()

    @staticmethod
    def refuse(client: Stream, message: str, hint: str) -> None:
        PostgresInterceptor.refuse(client, message, hint)


def _up(client: Stream, conversation: Conversation, target: socket.socket) -> None:
    def take(data: memoryview) -> int:
        if len(data) > INLINE:
            return 0
        conversation.record([{"kind": "up", "bytes": len(data)}])
        try:
            return target.send(data, socket.MSG_DONTWAIT)
        except OSError:
            return 0

    if isinstance(client, DeliveringStream):
        client.deliver_to(take)
    with contextlib.suppress(OSError, PamError):
        while data := client.recv(UP):
            conversation.record([{"kind": "up", "bytes": len(data)}])
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


def _down(client: Stream, conversation: Conversation, target: socket.socket) -> None:
    view = memoryview(bytearray(DOWN))
    unsent = 0

    def ready() -> bool:
        nonlocal unsent
        try:
            size = target.recv_into(view, INLINE, socket.MSG_DONTWAIT)
        except OSError:
            return False
        if size:
            conversation.record([{"kind": "down", "bytes": size}])
            unsent = 0 if client.send_soon(view[:size]) else size
        return 0 < size < INLINE and not unsent

    if isinstance(client, LendingStream) and client.lend(target.fileno(), ready) and unsent:
        client.sendall(view[:unsent])
    while size := target.recv_into(view):
        conversation.record([{"kind": "down", "bytes": size}])
        client.sendall(view[:size])


class _Unrecorded:
    """A conversation that keeps nothing."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self.number = conversation.number
        self.dial = conversation.dial
        self.touch = conversation.touch

    @property
    def end_reason(self) -> str | None:
        return self._conversation.end_reason

    def record(self, events: Sequence[Event]) -> None:
        """Nothing."""


class UnrecordedInterceptor(PostgresInterceptor):
    """PostgreSQL without the recording."""

    def serve(self, client: Stream, conversation: Conversation) -> None:
        super().serve(client, _Unrecorded(conversation))


class ByName:
    """The one of the three that the resource's name asks for."""

    def __init__(self, opening: Opening) -> None:
        kinds: dict[str, type[Interceptor]] = {"echo": EchoInterceptor, "unrecorded": UnrecordedInterceptor}
        kind = kinds.get(opening.account.split("/")[0], PostgresInterceptor)
        self.serve = kind(opening).serve

    @staticmethod
    def refuse(client: Stream, message: str, hint: str) -> None:
        PostgresInterceptor.refuse(client, message, hint)


if __name__ == "__main__":
    PROTOCOLS["postgres"] = ByName  # type: ignore[assignment]
    main()
