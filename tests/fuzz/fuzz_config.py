"""Configuration files: every text is a valid configuration or gives ConfigError, soon.

Input: a schema to choose, then the file.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from material import Input

from pam_common.config import parse, parse_duration, parse_size
from pam_common.errors import ConfigError

SCHEMAS = ("access", "agent", "client", "platform", "relay")


def TestOneInput(data: bytes) -> None:
    source = Input(data)
    schema = SCHEMAS[source.byte() % len(SCHEMAS)]
    text = source.rest().decode(errors="replace")
    problems = _problems(text, schema)
    assert problems is None or problems
    assert all(re.match(r"file\.yml:[1-9][0-9]*: ", problem) for problem in problems or ())
    for word in text.split()[:20]:
        for read in (parse_duration, parse_size):
            with contextlib.suppress(ValueError):
                assert read(word) >= 0


def seeds() -> Iterator[bytes]:
    files = {
        "agent": b"platform: https://p\nstate_dir: /s\nruntime_dir: /r\nallow_targets: ['10.0.0.0/24:1']\n",
        "relay": b"platform: https://p\nstate_dir: /s\nruntime_dir: /r\nlisten: 0.0.0.0:2222\n",
        "platform": b"public_url: https://p\nstate_dir: /s\nlisten: 0.0.0.0:443\ntls: {cert: /c, key: /k}\n",
        "client": b"platform: https://p\n",
        "access": b"groups: [{name: dba}]\nusers:\n  - {name: alice, groups: [dba], password: {file: f}}\n",
    }
    for name, file in files.items():
        yield bytes([SCHEMAS.index(name)]) + file
    for odd in ODD:
        yield bytes([1]) + odd


def _problems(text: str, schema: str) -> list[str] | None:
    """What is wrong with the file; None where nothing is."""
    try:
        document = parse(text, schema, name="file.yml")
    except ConfigError as error:
        return error.problems
    assert isinstance(document, dict)
    return None


ODD = (
    b"platform: 2001-99-99",
    b"platform: !!int abc",
    b"platform: !!bool x",
    b"platform: !!timestamp x",
    b"platform: 1:1:1",
    b"2001-01-01: 1",
    b"limits: {1: x}",
    b"limits: {2001-01-01: x}",
    b"? [a]\n: b",
    b"a: &a {b: c}\nd: {<<: *a}",
    b"a: &b [*b]",
    b"a: .nan\nb: -.inf\nc: ~",
    b"--- a\n--- b",
    b"a: 512MiB 8h 9223372036854775807s",
)
