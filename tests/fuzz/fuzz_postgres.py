"""A PostgreSQL conversation after login, both sides hostile: what is followed, recorded and refused.

Input: flags, then steps: a side (client or target) and its bytes, behind two bytes of length. The LONG steps
make one message instead, of the first byte as kind and the others so many times as two further bytes say.
"""

from __future__ import annotations

from collections.abc import Iterator

from material import Input, pieces, sized

from pam_agent.protocols.base import ClientProtocolError, Event, TargetProtocolError
from pam_agent.protocols.postgres import codec
from pam_agent.protocols.postgres.client_side import ClientSide
from pam_agent.protocols.postgres.codec import CLIENT_KINDS, TARGET_KINDS, message
from pam_agent.protocols.postgres.framing import COPY_DATA, DATA_ROW, Framer
from pam_agent.protocols.postgres.pipeline import Pipeline
from pam_agent.protocols.postgres.target_side import TargetSide
from pam_common.errors import PamError
from pam_common.recording.writer import encode_event

CLIENT, TARGET, CLIENT_LONG, TARGET_LONG = range(4)
#: The budgets for rows that the low bits of the flags choose from.
ROWS = (0, 10, 1000, 16384)
BACKSLASHES = 4
ENCODINGS = ("UTF8", "LATIN1", "SJIS", "BIG5", "EUC_JIS_2004", "GB18030", "JOHAB", "SQL_ASCII")
#: A LONG message ends here: beyond what is captured of a Bind or of a row.
LONG = 40_000

Step = tuple[int, bytes]


def TestOneInput(data: bytes) -> None:
    source = Input(data)
    flags = source.byte()
    steps = []
    while source:
        steps.append(_step(source))
    whole, split = _Conversation(flags), _Conversation(flags)
    for side, sent in steps:
        whole.feed(side, [sent])
        split.feed(side, list(pieces(sent)))
        if whole.error or split.error:
            break
    assert split.error == whole.error
    assert split.framers[TARGET].at_boundary == whole.framers[TARGET].at_boundary
    plain = all(sent.isascii() for _, sent in steps)
    assert split.events(plain) == whole.events(plain)


def seeds() -> Iterator[bytes]:
    for name in range(len(ENCODINGS)):
        yield bytes([3 | name << 3]) + _simple()
    for rows in range(len(ROWS)):
        yield bytes([rows]) + _extended()
        yield bytes([rows | BACKSLASHES]) + _copies()
    for side, kinds in ((CLIENT_LONG, CLIENT_KINDS), (TARGET_LONG, TARGET_KINDS)):
        for kind in kinds:
            yield bytes([3, side]) + sized(bytes([kind]) + b"a\0b\0") + b"\x40\0"


def steps_to_input(flags: int, steps: list[Step]) -> bytes:
    """Put a conversation into the form of an input."""
    out = bytes([flags])
    for side, sent in steps:
        for at in range(0, len(sent), 65535):
            out += bytes([side]) + sized(sent[at : at + 65535])
    return out


def _step(source: Input) -> Step:
    side = source.byte() % 4
    sent = source.sized()
    if side in (CLIENT_LONG, TARGET_LONG):
        kind, unit = sent[:1] or b"Q", sent[1:] or b"a"
        sent = message(kind, (unit * min(source.short(), LONG // len(unit))) + b"\0")
        side -= CLIENT_LONG
    return side, sent


class _Conversation:
    """The codec as the pump uses it, without the pump."""

    def __init__(self, flags: int) -> None:
        self.error = ""
        pipeline = Pipeline()
        self._client = ClientSide(pipeline, lambda: 0.0)
        self._target = TargetSide(pipeline, ROWS[flags & 3], lambda: 0.0)
        self._target.setting("client_encoding", ENCODINGS[flags >> 3 & 7])
        self._target.setting("standard_conforming_strings", "off" if flags & BACKSLASHES else "on")
        bulk = frozenset({DATA_ROW, COPY_DATA})
        self.framers = (
            Framer(CLIENT_KINDS, frozenset({COPY_DATA}), self._client, ClientProtocolError),
            Framer(TARGET_KINDS, bulk, self._target, TargetProtocolError),
        )
        self._kept = [b"", b""]

    def feed(self, side: int, chunks: list[bytes]) -> None:
        framer = self.framers[side]
        blamed = ClientProtocolError if side == CLIENT else TargetProtocolError
        for chunk in chunks:
            buffer = self._kept[side] + chunk
            try:
                safe = framer.feed(buffer, len(buffer))
            except blamed as error:
                self.error = str(error)
                return
            self._kept[side] = buffer[safe:]
            assert len(self._kept[side]) < codec.HEADER_SIZE
            assert len(framer._body) <= max(limit.capture for limit in CLIENT_KINDS.values())

    def events(self, plain: bool) -> list[list[Event]]:
        """What each side has recorded, as far as it does not depend on where buffers end."""
        sides = []
        for side in (self._client, self._target):
            events = side.take_events()
            for event in events:
                try:
                    encode_event(0.0, 1, event)
                except PamError as error:
                    raise AssertionError("an event that no recording takes") from error
            sides.append(_merged(events, plain))
        return sides


def _merged(events: list[Event], plain: bool) -> list[Event]:
    """The samples of rows and copies, which are cut where buffers end, in one event each."""
    merged: list[Event] = []
    for event in events:
        if not plain and "data" in event:
            event["data"] = ""  # a character that spans two messages reads differently
        last = merged[-1] if merged else {}
        if event["kind"] == "rows" == last.get("kind") and last["id"] == event["id"]:
            for name in ("rows", "data"):
                if name in event:
                    last[name] = last.get(name, type(event[name])()) + event[name]
        else:
            merged.append(dict(event))
    return merged


def _simple() -> bytes:
    columns = b"\0\2" + b"a\0" + bytes(6) + b"\0\0\0\x17" + bytes(8) + b"b\0" + bytes(6) + bytes(12)
    row = message(b"D", b"\0\2" + b"\0\0\0\2" + b"17" + b"\xff\xff\xff\xff")
    answer = message(b"T", columns) + row * 3 + message(b"C", b"SELECT 3\0")
    failed = message(b"E", b'SERROR\0C42601\0Msyntax error at or near "x"\0\0')
    ready = message(b"Z", b"I")
    steps = [
        (CLIENT, message(b"Q", b"select a, b from t where c = 'x'\0")),
        (TARGET, answer + ready),
        (CLIENT, message(b"Q", b"alter role x password 'secret'\0") + message(b"Q", b"\0")),
        (TARGET, failed + ready + message(b"I") + ready),
        (TARGET, message(b"A", b"\0\0\0\7channel\0payload\0") + message(b"S", b"client_encoding\0SJIS\0")),
        (CLIENT, message(b"F", b"\0\0\3\xbb\0\1\0\1\0\1\0\0\0\4\0\0\0\1\0\1")),
        (TARGET, message(b"V", b"\0\0\0\4\0\0\0\1") + ready),
        (CLIENT, message(b"X")),
    ]
    return steps_to_input(0, steps)[1:]


def _extended() -> bytes:
    parse = message(b"P", b"s1\0select $1, $2\0\0\2\0\0\0\x17\0\0\0\x19")
    bind = message(b"B", b"\0s1\0" + b"\0\2\0\1\0\0" + b"\0\2" + b"\0\0\0\4\0\0\0\7\0\0\0\1x" + b"\0\1\0\1")
    execute = message(b"E", b"\0\0\0\0\5")
    steps = [
        (CLIENT, parse + message(b"D", b"Ss1\0") + bind + message(b"D", b"P\0") + execute + message(b"S")),
        (TARGET, message(b"1") + message(b"t", b"\0\2\0\0\0\x17\0\0\0\x19") + message(b"n")),
        (TARGET, message(b"2") + message(b"n") + message(b"D", b"\0\1\0\0\0\4\0\0\0\7") + message(b"s")),
        (CLIENT, execute + message(b"C", b"Ss1\0") + message(b"H") + message(b"S")),
        (TARGET, message(b"Z", b"T") + message(b"C", b"SELECT 1\0") + message(b"3") + message(b"Z", b"I")),
        (CLIENT, parse + parse + bind + execute + message(b"S")),
        (TARGET, message(b"1") + message(b"E", b"SERROR\0C42P05\0Mexists\0\0") + message(b"Z", b"I")),
    ]
    return steps_to_input(0, steps)[1:]


def _copies() -> bytes:
    lines = message(b"d", b"1\tone\n") * 3
    steps = [
        (CLIENT, message(b"Q", b"copy t from stdin\0")),
        (TARGET, message(b"G", b"\0\0\2\0\0\0\0")),
        (CLIENT, lines + message(b"c")),
        (TARGET, message(b"C", b"COPY 3\0") + message(b"Z", b"I")),
        (CLIENT, message(b"Q", b"copy t to stdout\0")),
        (TARGET, message(b"H", b"\0\0\2\0\0\0\0") + lines + message(b"c")),
        (TARGET, message(b"C", b"COPY 3\0") + message(b"Z", b"I")),
        (CLIENT, message(b"Q", b"copy t from stdin\0") + message(b"d", b"x") + message(b"f", b"why\0")),
        (TARGET, message(b"W", b"\0\0\0") + message(b"E", b"SERROR\0Mfailed\0\0") + message(b"Z", b"E")),
    ]
    return steps_to_input(0, steps)[1:]
