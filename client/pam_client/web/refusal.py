"""Tell a browser or a program why its request cannot be carried: a plain page, 502 Bad Gateway.

    program                          here
      GET / HTTP/1.1 … CR LF CR LF ──▶
                                    ◀── HTTP/1.1 502 Bad Gateway, the page, then close

https://www.rfc-editor.org/rfc/rfc9112. The request's body, if it has one, is not waited for.
"""

from __future__ import annotations

import html
import re

#: The shortest method and its space.
HEAD = 4
#: A head longer than this gets its answer before it has ended.
MAX_HEAD = 16 << 10

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>502 Bad Gateway</title>
<style>body{{font:16px/1.5 sans-serif;max-width:40em;margin:4em auto;padding:0 1em}}</style></head>
<body><h1>502 Bad Gateway</h1><p>{message}</p>{hint}</body></html>
"""
#: Nothing of the page runs, loads, is framed or is kept.
_HEADERS = (
    "HTTP/1.1 502 Bad Gateway",
    "Content-Type: text/html; charset=utf-8",
    "Content-Security-Policy: default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "X-Content-Type-Options: nosniff",
    "Referrer-Policy: no-referrer",
    "Cache-Control: no-store",
    "Connection: close",
)


class HttpRefusal:
    """One refusal in progress: ``feed`` what the program sends, send back what it returns."""

    def __init__(self, message: str, hint: str = "") -> None:
        more = f"<p>HINT: {html.escape(hint)}</p>" if hint else ""
        self._body = _PAGE.format(message=html.escape(message), hint=more).encode()
        self._buffer = b""
        #: Nothing more is to be said; close.
        self.done = False

    def feed(self, data: bytes) -> bytes:
        """Take the program's next bytes and return the answer, once the request's head is complete."""
        if self.done:
            return b""
        self._buffer += data
        if b"\r\n\r\n" not in self._buffer and len(self._buffer) <= MAX_HEAD:
            return b""
        self.done = True
        head = "\r\n".join([*_HEADERS, f"Content-Length: {len(self._body)}", "", ""]).encode()
        return head if self._buffer.startswith(b"HEAD ") else head + self._body


def starts_http(head: bytes) -> bool:
    """Whether these 4 bytes can begin an HTTP/1.1 request: a method in capital letters (and no TLS)."""
    return re.fullmatch(rb"[A-Z]{3}[A-Z ]", head) is not None
