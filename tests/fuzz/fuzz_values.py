"""Values, rows, errors and column lists of a hostile server or client, as text for the recording.

Input: a type, a format and an encoding to choose, then the bytes.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator

from material import Input

from pam_agent.protocols.base import TargetProtocolError
from pam_agent.protocols.postgres import values
from pam_agent.protocols.postgres.codec import Column, message, parse_columns, parse_error

TYPES = [*sorted(values._BINARY_TYPES), *sorted(values.TEXT_TYPES), 0, 600]
FORMATS = (None, values.TEXT, values.BINARY, 2)
ENCODINGS = ["utf-8", *values.ENCODINGS.values()]
#: Most characters of JSON for one byte on the wire (a header of four bytes counts too): see bulk.ROW.
GROWTH = 12


def TestOneInput(data: bytes) -> None:
    source = Input(data)
    type_ = TYPES[source.byte() % len(TYPES)]
    format_ = FORMATS[source.byte() % len(FORMATS)]
    encoding = ENCODINGS[source.byte() % len(ENCODINGS)]
    body = source.rest()
    _fits(values.decode_value(body, type_, format_, encoding), len(body) + 4)
    columns = [Column("a", type_, format_ or 0)] * 3
    for formats in (None, (), (1,), (0, 1)):
        _fits(values.decode_row(body, columns, formats, encoding), len(body) + 2)
    parse_error(body, encoding)
    with contextlib.suppress(TargetProtocolError):
        parse_columns(body, encoding)


def seeds() -> Iterator[bytes]:
    samples = {
        16: b"\1",
        20: b"\0\0\0\0\0\0\0\1",
        701: b"\x7f\xf8\0\0\0\0\0\0",
        1082: b"\x7f\xff\xff\xff",
        1114: b"\x7f\xff\xff\xff\xff\xff\xff\xff",
        1700: b"\0\2\0\0\x40\0\0\4" + b"\0\1\x26\x94",
        2950: bytes(16),
        3802: b'\1{"a": 1}',
        25: "täxt".encode(),
    }
    for type_, body in samples.items():
        for format_ in range(len(FORMATS)):
            yield bytes([TYPES.index(type_), format_, 0]) + body
    row = b"\0\3" + b"\0\0\0\1x" + b"\xff\xff\xff\xff" + b"\0\0\0\4\0\0\0\1"
    yield bytes([0, 2, 0]) + row
    for encoding in range(len(ENCODINGS)):
        yield bytes([0, 1, encoding]) + b"\x81\x40\xa4\xa2\xff\x1b$B"
    yield bytes([0, 0, 0]) + b"\0\1a\0" + bytes(18)
    yield bytes([0, 0, 0]) + message(b"E", b"SERROR\0C42601\0Mwhy\0\0")[5:]


def _fits(decoded: object, size: int) -> None:
    assert len(json.dumps(decoded)) <= GROWTH * size + HEXADECIMAL


#: A value that is shown in hexadecimal says its size beside it; an empty row still has its brackets.
HEXADECIMAL = 64
