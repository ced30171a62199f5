"""Values of rows and bind parameters as text for the recording. Pure functions that never raise on data.

Binary forms: https://github.com/postgres/postgres/tree/master/src/backend/utils/adt (``*_send``).
What is not known, or not as it should be, is given as hexadecimal with a leading ``\\x``.
"""

from __future__ import annotations

import datetime
import struct
import uuid
from collections.abc import Callable, Sequence
from typing import Final

from pam_agent.protocols.postgres.codec import Column

TEXT: Final = 0
BINARY: Final = 1

#: Longest byte string shown in hexadecimal; the rest is counted. 256 bytes show what kind of data it is.
HEX_LIMIT: Final = 256

#: The codec for each ``client_encoding`` that is not UTF-8 and that Python has. A list, because a name from
#: a target must not choose among all of Python's codecs.
ENCODINGS: Final = {
    "BIG5": "cp950",
    "EUC_CN": "gb2312",
    "EUC_JIS_2004": "euc_jis_2004",
    "EUC_JP": "euc_jp",
    "EUC_KR": "euc_kr",
    "GB18030": "gb18030",
    "GBK": "gbk",
    "ISO_8859_5": "iso8859_5",
    "ISO_8859_6": "iso8859_6",
    "ISO_8859_7": "iso8859_7",
    "ISO_8859_8": "iso8859_8",
    "JOHAB": "johab",
    "KOI8R": "koi8_r",
    "KOI8U": "koi8_u",
    "LATIN1": "latin_1",
    "LATIN2": "iso8859_2",
    "LATIN3": "iso8859_3",
    "LATIN4": "iso8859_4",
    "LATIN5": "iso8859_9",
    "LATIN6": "iso8859_10",
    "LATIN7": "iso8859_13",
    "LATIN8": "iso8859_14",
    "LATIN9": "iso8859_15",
    "LATIN10": "iso8859_16",
    "SHIFT_JIS_2004": "shift_jis_2004",
    "SJIS": "cp932",
    "UHC": "cp949",
    "WIN866": "cp866",
    "WIN874": "cp874",
    **{f"WIN{number}": f"cp{number}" for number in range(1250, 1259)},
}


def python_encoding(name: str) -> str:
    """The codec for a ``client_encoding``; UTF-8 (with escapes for what is none) where there is no other."""
    return ENCODINGS.get(name.upper(), "utf-8")


def hexadecimal(data: bytes) -> str:
    if len(data) <= HEX_LIMIT:
        return "\\x" + data.hex()
    return f"\\x{data[:HEX_LIMIT].hex()}… ({len(data)} bytes)"


def decode_text(data: bytes, encoding: str) -> str:
    return data.decode(encoding, errors="backslashreplace")


def decode_value(data: bytes | None, type_: int, format_: int | None, encoding: str = "utf-8") -> str | None:
    """One value as text. ``format_`` None: not known, text if it reads as text."""
    if data is None:
        return None
    if format_ == TEXT:
        return decode_text(data, encoding)
    if format_ is None:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            return hexadecimal(data)
        return text if text.isprintable() else hexadecimal(data)
    if type_ in TEXT_TYPES:
        return decode_text(data, encoding)
    known = _BINARY_TYPES.get(type_)
    if known is None:
        return hexadecimal(data)
    try:
        return known(data)
    except (struct.error, ValueError, OverflowError, IndexError):
        return hexadecimal(data)


def decode_row(
    body: bytes, columns: Sequence[Column], formats: Sequence[int] | None, encoding: str
) -> list[str | None]:
    """The values of a DataRow body, which may be cut off: then the last value is cut and the rest missing."""
    values: list[str | None] = []
    position = 2
    for index in range(int.from_bytes(body[:2], "big")):
        if position + 4 > len(body):
            break
        size = int.from_bytes(body[position : position + 4], "big", signed=True)
        position += 4
        column = columns[index] if index < len(columns) else None
        format_ = format_of(formats, index) if formats is not None else column.format if column else None
        data = None if size < 0 else body[position : position + size]
        values.append(decode_value(data, column.type if column else 0, format_, encoding))
        position += max(size, 0)
    return values


def format_of(formats: Sequence[int], index: int) -> int | None:
    """The format code of one value: none given means text, one given counts for all."""
    if not formats:
        return TEXT
    if len(formats) == 1:
        return formats[0]
    return formats[index] if index < len(formats) else None


def _unpack(layout: str) -> Callable[[bytes], str]:
    packed = struct.Struct(layout)
    return lambda data: str(packed.unpack(data)[0])


def _bool(data: bytes) -> str:
    return {b"\0": "f", b"\1": "t"}.get(data) or hexadecimal(data)


_EPOCH: Final = datetime.datetime(2000, 1, 1)  # noqa: DTZ001 - PostgreSQL's own epoch, zone given by the type


def _timestamp(data: bytes) -> str:
    (microseconds,) = struct.unpack("!q", data)
    if microseconds == 2**63 - 1:
        return "infinity"
    if microseconds == -(2**63):
        return "-infinity"
    return (_EPOCH + datetime.timedelta(microseconds=microseconds)).isoformat(" ")


def _timestamptz(data: bytes) -> str:
    text = _timestamp(data)
    return text if text.endswith("infinity") else text + "+00"


def _date(data: bytes) -> str:
    (days,) = struct.unpack("!i", data)
    if days == 2**31 - 1:
        return "infinity"
    if days == -(2**31):
        return "-infinity"
    return (_EPOCH.date() + datetime.timedelta(days=days)).isoformat()


def _numeric(data: bytes) -> str:
    count, weight, sign, scale = struct.unpack_from("!HhHH", data)
    if sign in (0xC000, 0xD000, 0xF000):
        return {0xC000: "NaN", 0xD000: "Infinity", 0xF000: "-Infinity"}[sign]
    if not -16 <= weight <= 16 or scale > 64:
        raise ValueError("a number too long to be shown")  # its zeros need no bytes on the wire
    digits = struct.unpack_from(f"!{count}H", data, 8)
    whole = "".join(f"{digits[i] if i < count else 0:04d}" for i in range(weight + 1)) or "0"
    rest = "".join(
        f"{digits[i] if 0 <= i < count else 0:04d}" for i in range(weight + 1, weight + 2 + scale // 4)
    )
    number = whole.lstrip("0") or "0"
    return ("-" if sign == 0x4000 else "") + number + ("." + rest[:scale] if scale else "")


def _jsonb(data: bytes) -> str:
    if data[0] != 1:
        raise ValueError("a jsonb version that is not known")
    return data[1:].decode()


#: text, varchar, bpchar, name, "char", json, xml, unknown, citext has no fixed oid.
TEXT_TYPES: Final = frozenset({25, 1043, 1042, 19, 18, 114, 142, 705})

#: Numbers, truth values, dates, times and uuids: what can hold no secret text.
PLAIN_TYPES: Final = frozenset(
    {16, 20, 21, 23, 26, 700, 701, 790, 1082, 1083, 1114, 1184, 1186, 1266, 1700, 2950}
)

_BINARY_TYPES: Final[dict[int, Callable[[bytes], str]]] = {
    16: _bool,
    17: hexadecimal,
    20: _unpack("!q"),
    21: _unpack("!h"),
    23: _unpack("!i"),
    26: _unpack("!I"),
    700: _unpack("!f"),
    701: _unpack("!d"),
    1082: _date,
    1114: _timestamp,
    1184: _timestamptz,
    1700: _numeric,
    2950: lambda data: str(uuid.UUID(bytes=data)),
    3802: _jsonb,
}
