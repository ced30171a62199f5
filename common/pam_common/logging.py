"""Logs for an operator at 3 a.m.: one line per event, ``key=value``, on stderr.

    log = get_logger("agent.tunnel")
    log.info("tunnel up", extra=kv(relay="r1", slot=1))

gives ``ts=2026-01-31T03:00:00.123Z level=info component=agent.tunnel event="tunnel up" relay=r1 slot=1``.
Values are quoted when they need it and cut at a bound; control characters never reach the log as such,
so nothing that a peer sends can forge a line or steer a terminal.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from datetime import UTC, datetime
from typing import Any

#: Long enough for any message of ours; what a peer sends beyond it is noise.
MAX_VALUE = 1000

_PLAIN = re.compile(r"[A-Za-z0-9_./:@%+,\[\]-]+")


def get_logger(part: str) -> logging.Logger:
    """The logger of one part, named as in the log line: ``agent.session``."""
    return logging.getLogger(f"pam.{part}")


def kv(**fields: Any) -> dict[str, Any]:
    """Fields of an event, for ``extra=``. Never pass a secret: nothing here could tell."""
    return {"pam_fields": fields}


def setup(level: str = "info") -> None:
    """Send this process's logs to stderr; other libraries' from warning on. May be called again."""
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter())
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("pam").setLevel(level.upper())
    # paramiko logs every refused peer with a traceback; ours say it in one line.
    logging.getLogger("paramiko").setLevel(logging.CRITICAL)


class LineFormatter(logging.Formatter):
    """``key=value`` lines; an exception becomes one field, never a second line."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields: dict[str, Any] = {
            "ts": when.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "component": record.name.removeprefix("pam."),
            "event": record.getMessage(),
        }
        fields.update(getattr(record, "pam_fields", {}))
        if record.exc_info and record.exc_info[1] is not None:
            fields["traceback"] = self.formatException(record.exc_info)[-MAX_VALUE:]
        return " ".join(f"{key}={_quoted(value)}" for key, value in fields.items())


def _quoted(value: object) -> str:
    text = str(value)
    if len(text) > MAX_VALUE:
        text = text[:MAX_VALUE] + "…"
    if _PLAIN.fullmatch(text):
        return text
    return json.dumps(text)
