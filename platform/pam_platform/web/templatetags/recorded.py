"""Template filters for recorded text and times."""

from __future__ import annotations

from datetime import UTC, datetime

from django import template
from django.utils.safestring import SafeString

from pam_platform.web.text import visible as visible_html

register = template.Library()


@register.filter
def visible(value: object) -> SafeString:
    """Escaped text with control characters shown; see :mod:`pam_platform.web.text`."""
    return visible_html(value)


@register.filter
def moment(value: datetime | float | None) -> str:
    """A time (aware datetime or UNIX seconds) as UTC, or a dash."""
    if value is None:
        return "–"
    when = value if isinstance(value, datetime) else datetime.fromtimestamp(value, UTC)
    return f"{when.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


@register.filter
def size(value: int | None) -> str:
    """Bytes in a unit people read."""
    amount = float(value or 0)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} GiB"
