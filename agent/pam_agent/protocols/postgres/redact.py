"""Takes secrets out of statements and values before they are stored. Pure functions.

Where it matters the rule is generous: once a statement mentions a password (or another word of
``_MENTIONS``) outside a literal, every string literal after it is replaced. A literal that itself holds
connection strings, URLs with a password, or SQL, is searched the same way inside. The statement's shape
always stays. What this costs: a user who wants to hide a literal from the recording can, by mentioning a
password first. What it cannot see: a secret that nothing names (``select 'hunter2'``) is stored.
"""

from __future__ import annotations

import re
from typing import Final

MASK: Final = "***"

#: What makes a word a mention, in lower case. Plain text searches: a pattern took longer than the rest of
#: what is done for a statement.
_MENTIONS: Final = (
    *("passw", "passphrase", "pwd", "secret", "credential", "crypt", "hmac", "pgp_sym", "pgp_pub"),
    *(
        f"{kind}{key}"
        for kind in ("api", "access", "private", "encryption", "master")
        for key in ("key", "_key")
    ),
    *(f"{kind}_token" for kind in ("api", "access", "auth", "refresh")),
    "identified",
)
#: What has none of these in it has nothing to redact.
_SUSPECTS: Final = (*_MENTIONS, "token", "://", "scram-sha-", "md5")

# password=…, "password": "…", passwd = '…' as conninfo, JSON, YAML and .pgpass-like text write them. The
# value ends at white space, or at its own quote. Each word is looked at once, from its beginning, and no
# repetition gives anything back: the time is linear in the text, which a user or a target chose.
_ASSIGNED: Final = re.compile(
    r"""((?<!\w)(?=\w*?(?:passw|passphrase|pwd|secret|(?:api|access|private)_?key|token(?!\w)))
         \w++["']?\s*+(?:=>|[=:])\s*+)
        ("(?:[^"\\]|\\.)*+(?:"|\\?\Z) | '(?:[^'\\]|\\.|'')*+(?:'|\\?\Z) | (?:[^\s'",;&)\\]|\\.)++)""",
    re.IGNORECASE | re.VERBOSE | re.DOTALL,
)
_URL: Final = re.compile(r"(://[^\s/:@'\"]*+:)([^\s'\"]++)")
_VERIFIER: Final = re.compile(r"SCRAM-SHA-\d+\$[^\s'\"]+|\bmd5[0-9a-f]{32}\b")

#: What ends a field of copy data, whichever format it has.
_FIELDS: Final = re.compile(r"([\t\n])")
_ESCAPE: Final = re.compile(r"\\(.)", re.DOTALL)
_ESCAPED: Final = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
#: Characters of an unfinished field that are looked at again with what follows: a word and its value.
TAIL: Final = 256


def _tokens(plain: str) -> re.Pattern[str]:
    """Where a token that matters begins, leftmost first. All repetitions are possessive: linear time."""
    return re.compile(
        rf"""(?P<comment>--[^\n]*+)
          | (?P<block>/\*)
          | (?P<escape>[eE]'(?:[^'\\]++|\\.|'')*+(?:'|\\?\Z))
          | (?P<plain>(?:[uU]&|[bBxXnN])?'{plain}(?:'|\\?\Z))
          | (?P<name>(?:[uU]&)?"(?:[^"]++|"")*+(?:"|\Z))
          | (?P<dollar>\$(?:[^\W\d]\w*+)?\$)
          | (?P<word>\w[\w$]*+)
          | (?P<end>;)""",
        re.VERBOSE | re.DOTALL,
    )


_TOKENS: Final = _tokens(r"(?:[^']++|'')*+")
#: The same where a backslash escapes in every literal (standard_conforming_strings is off).
_TOKENS_BACKSLASH: Final = _tokens(r"(?:[^'\\]++|\\.|'')*+")
_BLOCK: Final = re.compile(r"/\*|\*/")
#: Statements in which a bare word right after PASSWORD is the password.
_ROLE: Final = re.compile(r"\s*(?:alter|create)\s+(?:role|user|group)\b|\s*set\b", re.IGNORECASE)

#: SQL within literals within SQL: deeper nesting than a function body that executes a string is masked.
_DEPTH: Final = 4


def is_suspect(text: str) -> bool:
    """Whether the functions below would look at the text at all: most they need not, and do not."""
    return _has(text, _SUSPECTS)


def is_sensitive(sql: str) -> bool:
    """Whether the statement mentions a password or the like: its parameters and errors are redacted."""
    return _has(sql, _MENTIONS)


def _has(text: str, words: tuple[str, ...]) -> bool:
    if len(text) < 3 or text.isdigit():
        return False
    lower = text.lower()
    if not _has_root(lower):
        return False
    for word in words:  # noqa: SIM110 - a generator for any() costs more than the search
        if word in lower:
            return True
    return False


def _has_root(text: str) -> bool:
    """Whether there can be any of ``_SUSPECTS``, each of which contains one of these (a test holds it). Half
    as many to search for, one after the other without a loop: this is done for every statement and value."""
    return (
        "pass" in text
        or "key" in text
        or "token" in text
        or "ident" in text
        or "secret" in text
        or "cred" in text
        or "pwd" in text
        or "crypt" in text
        or "md5" in text
        or "://" in text
        or "hmac" in text
        or "scram" in text
        or "pgp_" in text
    )


def redact_sql(sql: str, *, backslashes: bool = False) -> str:
    """The statement with the secrets in it replaced by ``***``. ``backslashes``: they escape in '…'."""
    if not _has(sql, _SUSPECTS):
        return sql
    return _Redaction(backslashes, 0).statement(sql)


def redact_value(text: str) -> str:
    """A parameter, field or other value: connection strings, URLs and password verifiers in it."""
    if not _has(text, _SUSPECTS):
        return text
    text = _ASSIGNED.sub(rf"\1{MASK}", text)
    text = _URL.sub(_without_password, text)
    return _VERIFIER.sub(MASK, text)


def redact_copy(text: str) -> str:
    """Copy data, in the text format or as CSV: each field of each line like a value."""
    if not _has(text, _SUSPECTS):
        return text
    return "".join(_copy_field(field) for field in _FIELDS.split(text))


def _copy_field(field: str) -> str:
    if not _has(field, _SUSPECTS):
        return field
    # CSV doubles the quotes within a field. Undoubled, no quoted secret ends earlier than it does.
    plain = field.replace('""', '"')
    clean = redact_value(plain)
    if "\\" not in field:
        return field if clean == plain else clean
    # Whether a backslash escapes depends on the format, which nothing on the wire tells: where a secret that
    # is beside one ends is not known, and all of the field goes.
    escaped = _ESCAPE.sub(lambda match: _ESCAPED.get(match[1], match[1]), plain)
    return field if clean == plain and redact_value(escaped) == escaped else MASK


class CopyRedaction:
    """Of the copy data of one statement, which comes in pieces: a field may go on in the next one."""

    __slots__ = ("_hiding", "_tail")

    def __init__(self) -> None:
        self._tail = ""
        self._hiding = False

    def next(self, text: str) -> str:
        """The next piece without secrets; what goes on after the start of one is hidden up to its field's
        end."""
        separator = _FIELDS.search(text)
        end = separator.start() if separator is not None else len(text)
        before = self._tail + text[:end]
        if self._hiding or (self._tail and _copy_field(before) != before):
            clean = (MASK if end else "") + redact_copy(text[end:])
        else:
            clean = redact_copy(text)
        if separator is None:
            self._hiding |= clean != text
            self._tail = before[-TAIL:]
        else:
            last = text[max(text.rfind("\n"), text.rfind("\t")) + 1 :]
            self._hiding = _copy_field(last) != last
            self._tail = last[-TAIL:]
        return clean


def redact_message(text: str, *, sensitive: bool) -> str:
    """A server's message about a statement; about a ``sensitive`` one, all that it quotes goes."""
    text = redact_value(text)
    if sensitive:
        text = re.sub(r'"[^"]*(?:"|\Z)', f'"{MASK}"', redact_sql(text))
        text = re.sub(r"'[^']*(?:'|\Z)", f"'{MASK}'", text)
    return text


def _without_password(url: re.Match[str]) -> str:
    """The password in a URL reaches to the last ``@``: it may hold others."""
    password, _, host = url[2].rpartition("@")
    return f"{url[1]}{MASK}@{host}" if password else url[0]


class _Redaction:
    """One pass over one text. ``armed`` from the first mention on."""

    def __init__(self, backslashes: bool, depth: int) -> None:
        self._backslashes = backslashes
        self._depth = depth
        self._armed = False
        self._after_password = False
        self._bare = False

    def statement(self, sql: str) -> str:
        tokens = _TOKENS_BACKSLASH if self._backslashes else _TOKENS
        out: list[str] = []
        position = 0
        self._bare = _ROLE.match(sql) is not None
        while (match := tokens.search(sql, position)) is not None:
            out.append(sql[position : match.start()])
            kind = match.lastgroup or ""
            end = _end(kind, match, sql)
            out.append(self._token(kind, sql[match.start() : end]))
            position = end
            if kind == "end":
                self._bare = _ROLE.match(sql, position) is not None
        out.append(sql[position:])
        return "".join(out)

    def _token(self, kind: str, token: str) -> str:
        if kind == "word":
            return self._word(token)
        if kind == "comment":
            return "--" + self._inside(token[2:])
        if kind == "block":
            return "/*" + self._inside(token[2:])
        after, self._after_password = self._after_password, False
        if kind == "name":
            if after:
                return f'"{MASK}"'  # another database's habit: PASSWORD "hunter2"
            return self._word(token)
        if kind == "dollar":
            tag = token[: token.index("$", 1) + 1]
            return self._quoted(tag, token[len(tag) :], tag)
        if kind == "end":
            return token
        start = token.index("'") + 1
        return self._quoted(token[:start], token[start:], "'")

    def _word(self, token: str) -> str:
        if self._after_password and token.lower() in ("to", "null", "default"):
            return token
        if self._bare and self._after_password:
            self._after_password = False
            return MASK  # PASSWORD hunter2: a syntax error, and still a secret
        self._after_password = _has(token, _MENTIONS)
        self._armed |= self._after_password
        return token

    def _quoted(self, start: str, rest: str, end: str) -> str:
        if self._armed:
            return f"{start}{MASK}{end}"
        if not _has(rest, _SUSPECTS):
            return start + rest
        content = rest.removesuffix(end)
        if end == "'" and "''" in content:
            return start + self._inside(content.replace("''", "'")).replace("'", "''") + end
        return start + self._inside(content) + end

    def _inside(self, text: str) -> str:
        """What a literal or a comment holds, itself perhaps SQL."""
        if not _has(text, _SUSPECTS):
            return text
        if self._depth >= _DEPTH:
            return MASK
        return _Redaction(self._backslashes, self._depth + 1).statement(redact_value(text))


def _end(kind: str, match: re.Match[str], sql: str) -> int:
    """Where the token ends: dollar quotes and block comments, which nest, are no regular language."""
    if kind == "dollar":
        close = sql.find(match.group(), match.end())
        return len(sql) if close < 0 else close + len(match.group())
    if kind != "block":
        return match.end()
    depth = 1
    for mark in _BLOCK.finditer(sql, match.end()):
        depth += 1 if mark.group() == "/*" else -1
        if not depth:
            return mark.end()
    return len(sql)
