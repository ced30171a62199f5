"""Programs of ``tests/apps.txt``, which live in an environment of their own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

_BIN = Path(sys.prefix) / "apps/bin"


def app(name: str) -> Path:
    """The program ``name``; skips the test where `make test` has not installed it."""
    program = _BIN / name
    if not program.exists():
        reason = f"{name} is not installed: make .venv/apps/.installed"
        if os.environ.get("CI"):  # there it must be
            pytest.fail(reason)
        pytest.skip(reason)
    return program
