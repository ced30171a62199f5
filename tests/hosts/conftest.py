"""Tests on real systemd hosts: skipped, with the reason, where this machine cannot boot any."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

PROGRAMS = ("systemd-nspawn", "debootstrap", "ip", "nft", "ssh", "ssh-keygen", "gpg", "gpgv")


def _reason() -> str:
    if os.geteuid() != 0:
        return "only root can boot systemd hosts"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"not installed: {', '.join(missing)}" if missing else ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    reason = _reason()
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.root)
            if reason and not os.environ.get("CI"):  # there they must run, or fail
                item.add_marker(pytest.mark.skip(reason=reason))
