"""Open a page in the person's browser, where there is one."""

from __future__ import annotations

import os
import webbrowser


def show(url: str) -> bool:
    """Whether a browser was started on ``url``. It stands in an argument list, which others can read."""
    if not _has_display():
        return False
    try:
        return webbrowser.open(url)
    except webbrowser.Error:
        return False


def _has_display() -> bool:
    """What is found without one may be a text browser, which would take over the terminal."""
    if os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY") or os.environ.get("BROWSER"):
        return True
    return os.uname().sysname == "Darwin" and not os.environ.get("SSH_CONNECTION")
