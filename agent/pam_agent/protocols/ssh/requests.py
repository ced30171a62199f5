"""Global requests of both peers (RFC 4254, chapter 4): answered here, or asked of the target.

Answers carry no number: each peer gets them in the order of its requests, so one that the target has to give
holds back those that come after it.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Final

from pam_agent.protocols.base import ClientProtocolError, Event
from pam_agent.protocols.ssh import codec
from pam_agent.protocols.ssh.channel import FAULTS, TARGET, USER
from pam_agent.protocols.ssh.codec import MAX_NAME, Reader
from pam_agent.protocols.ssh.forwards import Binds
from pam_common.errors import PamError
from pam_common.fast_ssh.leg import Leg

#: Requests of the user's program that wait for the target: a port or two, and keepalives behind them.
MAX_WAITING: Final = 64

#: ``-R`` of a UNIX socket (OpenSSH's PROTOCOL, 2.4).
_SOCKET_FORWARD: Final = "streamlocal-forward@openssh.com"
_SUCCESS = bytes([codec.REQUEST_SUCCESS])
_FAILURE = bytes([codec.REQUEST_FAILURE])
_INT = struct.Struct(">I")


class _Slot:
    """An answer that the user's program waits for, once it is known."""

    answer: bytes | None = None


class GlobalRequests:
    """Those of one connection. ``take`` is called under ``lock``, which the target's answers take, too."""

    def __init__(
        self,
        binds: Binds,
        record: Callable[[Sequence[Event]], None],
        fail: Callable[[PamError], None],
        legs: Mapping[int, Leg],
        lock: AbstractContextManager[bool],
    ) -> None:
        self._binds = binds
        self._record = record
        self._fail = fail
        self._legs = legs
        self._lock = lock
        self._waiting: deque[_Slot] = deque()

    def take(self, side: int, payload: memoryview) -> None:
        """A global request of ``side``. Raises PamError."""
        reader = Reader(payload, FAULTS[side])
        kind, wants_reply = reader.text(MAX_NAME), reader.flag()
        if side == USER and kind in ("tcpip-forward", "cancel-tcpip-forward"):
            self._bind(kind, reader.rest(), wants_reply)
            return
        if side == USER and kind == _SOCKET_FORWARD:
            self._record([{"kind": "refused", "what": kind, "reason": "not allowed"}])
        if side == USER and wants_reply:
            self._slot(_FAILURE)  # keepalives, as sshd answers them; and what is not known
        elif wants_reply:
            self._legs[TARGET].queue(_FAILURE)

    def _bind(self, kind: str, body: bytes, wants_reply: bool) -> None:
        address, port = Binds.parse(body)
        cancels = kind == "cancel-tcpip-forward"
        allowed = self._binds.cancel(address, port) if cancels else self._binds.want(address, port)
        fields = {"cancel": True} if cancels else {}
        self._record([_event(address, port, **fields, **({} if allowed else {"ok": False}))])
        slot = self._slot(None if allowed else _FAILURE, silent=not wants_reply)
        if allowed:
            answered = partial(self._answered, slot, cancels, address, port)
            self._legs[TARGET].ask(codec.global_request(kind, body), answered)

    def _answered(self, slot: _Slot, cancels: bool, address: str, port: int, answer: bytes | None) -> None:
        """What the target says, in its reader thread."""
        try:
            self._answer(slot, cancels, address, port, answer)
        except PamError as error:
            self._fail(error)

    def _answer(self, slot: _Slot, cancels: bool, address: str, port: int, answer: bytes | None) -> None:
        with self._lock:
            bound = port
            if answer is not None and not port and len(answer) >= 4:
                bound = _INT.unpack_from(answer)[0]
            if not cancels:
                self._binds.answered(address, bound, answer is not None)
                self._record([_event(address, bound, ok=answer is not None)])
            slot.answer = _FAILURE if answer is None else _SUCCESS + answer
            self._flush()
        self._legs[USER].packets.flush_soon()

    def _slot(self, answer: bytes | None, *, silent: bool = False) -> _Slot:
        slot = _Slot()
        slot.answer = answer
        if not silent:
            if len(self._waiting) >= MAX_WAITING:
                raise ClientProtocolError("too many ssh requests without waiting for an answer")
            self._waiting.append(slot)
            self._flush()
        return slot

    def _flush(self) -> None:
        while self._waiting and (answer := self._waiting[0].answer) is not None:
            self._waiting.popleft()
            self._legs[USER].queue(answer)


def _event(address: str, port: int, **fields: object) -> Event:
    return {"kind": "bind", "host": address, "port": port, **fields}
