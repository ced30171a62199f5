"""Redaction of statements and values: what is secret goes, whatever it is, in time linear in the text.

Input: a mode. SECRET: the rest is a password, quoted in each way SQL knows. TEXT: the rest is a statement.
LONG: a text to begin with and one to repeat (each behind two bytes of length), which must not take long.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from material import Input, sized

from pam_agent.protocols.postgres.redact import MASK, redact_message, redact_sql, redact_value

SECRET, TEXT, LONG = range(3)
MODES = (SECRET, TEXT, LONG) + (SECRET, TEXT) * 8
#: Characters, and seconds of processor time they may take. Linear passes take a fiftieth of it; what was
#: quadratic took ten seconds.
LENGTH, SECONDS = 8_000, 1.0


def TestOneInput(data: bytes) -> None:
    source = Input(data)
    # Few of the long ones: each takes as much time as dozens of the others.
    mode = MODES[source.byte() % len(MODES)]
    if mode == SECRET:
        _secret(source.rest().decode(errors="replace"))
    elif mode == TEXT:
        _text(source.rest().decode(errors="replace"))
    else:
        _long(source.sized().decode(errors="replace"), source.sized().decode(errors="replace"))


def seeds() -> Iterator[bytes]:
    for secret in (
        b"hunter2",
        b"it's",
        b"a\\",
        b"\\'",
        b"$$",
        b'"',
        b"a\nb",
        b"/*",
        b"://a:b@c",
        b"password='x'",
    ):
        yield bytes([SECRET]) + secret
    statements = (
        b"alter role x with password 'y'; select 'postgres://u:p@h/d', 'pwd=abc', $a$ secret = 'x' $a$",
        b"create user u password E'a\\'b' /* token=abc /* nested */ */ -- api_key: x",
        b"select u&'\\0041' \"password\", 'SCRAM-SHA-256$4096:abc', 'md5" + b"0" * 32 + b"'",
        b"do $x$ begin execute 'alter role a password ''b'''; end $x$",
    )
    for statement in statements:
        yield bytes([TEXT]) + statement
    for part in (
        b"a",
        b"passw",
        b"'",
        b"''",
        b"$$",
        b"/*",
        b"://a:",
        b"://a:b@",
        b'pwd="',
        b"E'\\",
        b"a_token",
    ):
        yield bytes([LONG]) + sized(b"md5 password ", part)


def _secret(secret: str) -> None:
    """Each literal says MASK instead, and nothing else changes."""
    doubled = secret.replace("'", "''")
    escaped = secret.replace("\\", "\\\\").replace("'", "\\'")
    tag = "$t$"
    while tag in secret + "$":
        tag = tag[:-1] + "t$"
    for backslashes, start, quoted, end in (
        (False, "'", doubled, "'"),
        (True, "'", doubled.replace("\\", "\\\\"), "'"),
        (True, "'", escaped, "'"),
        (False, "e'", escaped, "'"),
        (False, "u&'", doubled, "'"),
        (False, tag, secret, tag),
    ):
        for before, after in (("alter role x password ", " valid until now"), ("select f(password, ", ")")):
            sql = f"{before}{start}{quoted}{end}{after}"
            redacted = redact_sql(sql, backslashes=backslashes)
            assert redacted == f"{before}{start}{MASK}{end}{after}", sql
    assert redact_value(f"password='{escaped}' user=u") == f"password={MASK} user=u"
    every = "".join("\\" + character for character in secret)
    assert redact_value(f'{{"token": "{every}", "user": 1}}') == f'{{"token": {MASK}, "user": 1}}'


def _text(sql: str) -> None:
    for backslashes in (False, True):
        redacted = redact_sql(sql, backslashes=backslashes)
        # '' becomes '***': no text more than doubles and a half, however it is nested.
        assert len(redacted) <= 4 * len(sql) + 16
    redact_value(sql)
    for sensitive in (False, True):
        redact_message(sql, sensitive=sensitive)


def _long(start: str, part: str) -> None:
    text = (start + (part or "a") * (LENGTH // len(part or "a")))[: LENGTH + len(start)]
    before = time.process_time()
    redact_sql(text)
    redact_sql(text, backslashes=True)
    redact_value(text)
    redact_message(text, sensitive=True)
    assert time.process_time() - before < SECONDS
