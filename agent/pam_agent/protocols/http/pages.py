"""Answers of our own: refusals and failures, as plain pages that hold nothing but text. No I/O."""

from __future__ import annotations

import html
from http import HTTPStatus
from typing import Final

import h11

from pam_agent.protocols.base import (
    ClientProtocolError,
    TargetLoginError,
    TargetProtocolError,
)
from pam_agent.protocols.http.door import AdmissionError, Entry
from pam_agent.protocols.http.rules import RuleError
from pam_common.errors import PamError, RefusedError, UnavailableError

_PAGE: Final = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>body{{font:16px/1.5 sans-serif;max-width:40em;margin:4em auto;padding:0 1em}}</style></head>
<body><h1>{title}</h1><p>{message}</p>{more}</body></html>
"""
_ENTRANCE: Final = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>pam</title>{refresh}
<style>body{{font:16px/1.5 sans-serif;max-width:40em;margin:4em auto;padding:0 1em}}</style></head>
<body><p>{message}<a href="{url}">Continue</a></p></body></html>
"""
#: Nothing of a page of ours runs, loads, is framed or is kept.
_FIELDS: Final = [
    ("Content-Type", "text/html; charset=utf-8"),
    ("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cache-Control", "no-store"),
]
#: The first match counts. What is left is a recording that failed, or the like.
_STATUSES: Final[tuple[tuple[type[PamError], int], ...]] = (
    (AdmissionError, 403),
    (ClientProtocolError, 400),
    (TargetLoginError, 502),
    (TargetProtocolError, 502),
    (UnavailableError, 502),
    (RefusedError, 403),
)


def status_of(error: PamError) -> int:
    if isinstance(error, RuleError):
        return error.status
    return next((status for kind, status in _STATUSES if isinstance(error, kind)), 502)


def refusal(error: PamError, *, close: bool = True) -> tuple[h11.Response, bytes]:
    """The page that tells of an error."""
    rule = f"rule: {error.rule}" if isinstance(error, RuleError) else ""
    return page(status_of(error), str(error), error.hint, rule, close=close)


def page(
    status: int, message: str, hint: str = "", rule: str = "", *, close: bool = True
) -> tuple[h11.Response, bytes]:
    """A page with a sentence, what to do, and which rule it was. ``close``: the connection ends with it."""
    more = "".join(f"<p>{html.escape(line)}</p>" for line in (rule, hint and f"HINT: {hint}") if line)
    title = f"{status} {HTTPStatus(status).phrase}"
    body = _PAGE.format(title=html.escape(title), message=html.escape(message), more=more).encode()
    fields = [*_FIELDS, ("Content-Length", str(len(body)))]
    if close:
        fields.append(("Connection", "close"))
    return h11.Response(status_code=status, headers=fields, reason=HTTPStatus(status).phrase), body


def entrance(entry: Entry) -> tuple[h11.Response, bytes]:
    """The answer to the one-time link, from which on the browser is known; or to a link on another page.

    The first leads on by itself, the second when the user says so: no other page causes a request. Neither
    is a redirect: no browser sends a ``SameSite=Strict`` cookie along a chain that another site began, and a
    file, from which the one-time link is opened, is another site.
    """
    url = html.escape(entry.url)
    refresh = f'<meta http-equiv="refresh" content="0; url={url}">' if entry.cookie else ""
    message = "" if entry.cookie else f"Another page led here, to <code>{url}</code>. "
    body = _ENTRANCE.format(refresh=refresh, message=message, url=url).encode()
    fields = [*_FIELDS, ("Content-Length", str(len(body)))]
    if entry.cookie:
        fields.append(("Set-Cookie", entry.cookie))
    return h11.Response(status_code=200, headers=fields, reason="OK"), body
