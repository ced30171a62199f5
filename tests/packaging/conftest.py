"""The packages, built once for all tests; and one real systemd host that has them."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from registry import fetch_wheels

from pam_packages.parts import CACHE, ROOT

#: The version that comes after the tree's own.
NEXT = "0.1.1"
#: No test run takes half a day: what is older was left by one that ended.
STALE = 12 * 3600


def _reason() -> str:
    if os.geteuid() != 0:
        return "only root can boot systemd hosts"
    missing = [name for name in ("systemd-nspawn", "debootstrap", "ip", "nft") if shutil.which(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else ""


@pytest.fixture(scope="session")
def build() -> Callable[..., Path]:
    """Build all packages of a version into a folder; once per test run, whichever worker asks first."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))

    def make(label: str, version: str = "", **environment: str) -> Path:
        folder = CACHE / "tests" / f"{label}-{run}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (folder.parent / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "SHA256SUMS").exists():
                for old in folder.parent.glob(f"{label}-*"):
                    if time.time() - old.stat().st_mtime > STALE:
                        shutil.rmtree(old)
                fetch_wheels()
                words = ["build", "--out", str(folder), "--version", version]
                done = subprocess.run(
                    [sys.executable, "-m", "pam_packages", *words],
                    env={**os.environ, "PYTHONPATH": str(ROOT / "packaging"), **environment},
                    capture_output=True,
                    text=True,
                    check=False,
                    umask=0o077,  # what a strict shell has must not show
                )
                assert done.returncode == 0, done.stdout + done.stderr
        return folder

    return make


@pytest.fixture(scope="session")
def packages(build: Callable[..., Path]) -> Path:
    """The folder with the packages of this tree."""
    return build("this")


@pytest.fixture(scope="session")
def next_packages(build: Callable[..., Path]) -> Path:
    """The same as the version after it."""
    return build("next", NEXT)


@pytest.fixture(scope="module")
def fleet() -> Iterator[Any]:
    if reason := _reason():
        pytest.skip(reason)
    from harness.hosts import Fleet

    with Fleet() as fleet:
        yield fleet
