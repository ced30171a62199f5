"""Lead the browser to the one-time link.

Any user of the machine can read the arguments of any program, so the browser is called with the name of a
file that only this user can read, and the file leads on to the link.
"""

from __future__ import annotations

import contextlib
import html
import time
from collections.abc import Iterator
from pathlib import Path

from pam_client import browser
from pam_client.home import Home
from pam_common.files import make_private_dir, write_private

_FOLDER = "open"
#: Files of connects that were killed: their links are good for nothing since then.
_LEFT_OVER_SECONDS = 86400

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>pam-client</title>
<meta name="referrer" content="no-referrer"><meta http-equiv="refresh" content="0; url={link}"></head>
<body><p><a href="{link}">Continue</a></p></body></html>
"""


@contextlib.contextmanager
def opened(home: Home, name: str, link: str) -> Iterator[bool]:
    """Have a browser open ``link``; gives whether there is one. The file ``name`` is gone afterwards."""
    file = _folder(home) / f"{name}.html"
    write_private(file, _PAGE.format(link=html.escape(link)).encode())
    try:
        yield browser.show(file.as_uri())
    finally:
        file.unlink(missing_ok=True)


def _folder(home: Home) -> Path:
    folder = make_private_dir(home.make() / _FOLDER)
    for file in folder.glob("*.html"):
        with contextlib.suppress(OSError):
            if file.stat().st_mtime < time.time() - _LEFT_OVER_SECONDS:
                file.unlink()
    return folder
