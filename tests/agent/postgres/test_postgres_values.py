"""Values as text: known binary forms, everything else without ever raising."""

from __future__ import annotations

import codecs
import datetime
import decimal
import struct
import uuid

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pam_agent.protocols.postgres import values
from pam_agent.protocols.postgres.values import decode_row, decode_value, python_encoding


@given(
    st.binary(max_size=60), st.sampled_from([0, *values._BINARY_TYPES, 25]), st.sampled_from([0, 1, 7, None])
)
def test_postgres_values_never_raise(data, type_, format_):
    text = decode_value(data, type_, format_)
    assert isinstance(text, str)
    assert len(text) <= 6 * len(data) + 700
    text.encode()


@given(st.binary(max_size=100), st.lists(st.integers(0, 2), max_size=5))
def test_postgres_rows_never_raise(body, formats):
    decode_row(body, [], formats, "utf-8")
    decode_row(body, [], None, "cp932")


NUMBERS = ["0", "5", "10000", "123456789", "-1", "0.5", "0.0001", "-12345.6789", "1e30", "1000000.000001"]


@pytest.mark.parametrize("text", [*NUMBERS, "0.00", "100", "NaN"])
def test_postgres_values_numeric(text):
    number = decimal.Decimal(text)
    dumper = psycopg.adapters.get_dumper(decimal.Decimal, psycopg.adapt.PyFormat.BINARY)
    data = bytes(dumper(decimal.Decimal).dump(number))
    shown = decode_value(data, 1700, 1)
    assert shown == "NaN" if number.is_nan() else decimal.Decimal(shown) == number


@pytest.mark.parametrize(
    ("type_", "data", "text"),
    [
        (16, b"\1", "t"),
        (17, b"\0\xff", "\\x00ff"),
        (20, struct.pack("!q", -5), "-5"),
        (21, struct.pack("!h", 7), "7"),
        (26, struct.pack("!I", 2**32 - 1), "4294967295"),
        (701, struct.pack("!d", 0.5), "0.5"),
        (1082, struct.pack("!i", 1), "2000-01-02"),
        (1082, struct.pack("!i", 2**31 - 1), "infinity"),
        (1114, struct.pack("!q", 1), "2000-01-01 00:00:00.000001"),
        (1184, struct.pack("!q", 0), "2000-01-01 00:00:00+00"),
        (1184, struct.pack("!q", -(2**63)), "-infinity"),
        (1114, struct.pack("!q", 2**62), "\\x4000000000000000"),
        (2950, uuid.UUID(int=1).bytes, str(uuid.UUID(int=1))),
        (3802, b'\1{"a":1}', '{"a":1}'),
        (25, b"a\xff", "a\\xff"),
        (600, b"\0" * 300, "\\x" + "00" * 256 + "… (300 bytes)"),
    ],
)
def test_postgres_values_binary(type_, data, text):
    assert decode_value(data, type_, 1) == text


def test_postgres_values_date_round_trip():
    days = (datetime.date(1970, 1, 1) - datetime.date(2000, 1, 1)).days
    assert decode_value(struct.pack("!i", days), 1082, 1) == "1970-01-01"


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("UTF8", "utf-8"),
        ("LATIN1", "latin1"),
        ("WIN1252", "cp1252"),
        ("SJIS", "cp932"),
        ("EUC_JP", "euc_jp"),
        ("nonsense", "utf-8"),
    ],
)
def test_postgres_encodings(name, codec):
    assert codecs.lookup(python_encoding(name)) == codecs.lookup(codec)


def test_postgres_every_encoding_is_there():
    for codec in values.ENCODINGS.values():
        assert isinstance(bytes(range(256)).decode(codec, errors="backslashreplace"), str)
