"""WebSocket frames (RFC 6455) of one direction, read for the recording. No I/O.

The bytes go on as they came; this only says what is in them. A frame that cannot be read ends the connection:
what cannot be recorded is not forwarded.
"""

from __future__ import annotations

import base64
import hashlib
from typing import Any, Final

from wsproto.frame_protocol import Frame, FrameDecoder, MessageDecoder, Opcode, ParseFailed

from pam_agent.protocols.base import ClientProtocolError, Event, TargetProtocolError
from pam_agent.protocols.http.bodies import Direction
from pam_agent.protocols.http.redact import Redactor
from pam_agent.protocols.http.rules import Rules

_KINDS: Final = {Opcode.TEXT: "text", Opcode.BINARY: "binary"}


class Frames:
    """One direction of one socket: ``feed`` gives the events of what may then be sent on.

    Messages are recorded up to ``budget`` bytes each, text as it is and binary in base64; what is longer is
    counted and hashed. A user's message is held to the account's largest request.
    """

    def __init__(self, exchange: int, way: Direction, budget: int, redactor: Redactor, rules: Rules) -> None:
        self._exchange, self._way = exchange, way
        self._budget = budget
        self._redactor = redactor
        self._rules = rules if way == "up" else Rules()
        self._fault = ClientProtocolError if way == "up" else TargetProtocolError
        # To wsproto "client" is who reads: a client's frames must be masked, a server's must not.
        self._decoder = FrameDecoder(client=way == "down")
        self._messages = MessageDecoder()
        self._size = 0
        self._hash = hashlib.sha256()

    @property
    def at_boundary(self) -> bool:
        """Whether whole frames were fed only, so that one of our own may follow."""
        return self._decoder.header is None and not len(self._decoder.buffer)

    def feed(self, data: bytes) -> list[Event]:
        """Raises ClientProtocolError or TargetProtocolError for what is no frame, RuleError for a message
        that is too large."""
        events: list[Event] = []
        try:
            self._decoder.receive_bytes(data)
            while (frame := self._decoder.process_buffer()) is not None:
                event = self._event(frame)
                if event is not None:
                    events.append({"kind": "ws", "id": self._exchange, "dir": self._way, **event})
        except ParseFailed as error:
            raise self._fault(f"a socket's frame cannot be read: {str(error)[:100].lower()}") from None
        return events

    def _event(self, frame: Frame) -> dict[str, Any] | None:
        if frame.opcode is Opcode.CLOSE:
            payload = frame.payload if isinstance(frame.payload, bytes) else b""
            code = int.from_bytes(payload[:2], "big") if len(payload) >= 2 else None
            reason = self._redactor.known(payload[2:].decode("utf-8", "replace"))
            return {"opcode": "close", "code": code, "data": reason, "bytes": len(payload)}
        if frame.opcode.iscontrol():
            return None
        raw = frame.payload
        assert isinstance(raw, bytes)
        message = self._messages.process_frame(frame)
        return self._part(message, raw)

    def _part(self, message: Frame, raw: bytes) -> dict[str, Any] | None:
        left = max(0, self._budget - self._size)
        self._size += len(raw)
        self._rules.check_size(self._size)
        self._hash.update(raw)
        event: dict[str, Any] = {"opcode": _KINDS[message.opcode], "bytes": self._size}
        if left and isinstance(message.payload, str):
            event["data"] = self._redactor.text(message.payload[:left])
        elif left:
            event["base64"] = base64.b64encode(self._redactor.binary(raw[:left])).decode()
        if message.message_finished:
            if self._size > self._budget:
                event["sha256"] = self._hash.hexdigest()
            self._size = 0
            self._hash = hashlib.sha256()
            return event
        event["more"] = True
        return event if left else None
