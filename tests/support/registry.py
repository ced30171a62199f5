"""Downloads that tests begin with, tried more than once: a registry may be slow or away for a moment."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

TRIES = 3
PAUSE = 10.0
_PACKAGING = Path(__file__).resolve().parents[2] / "packaging"


def fetch_wheels() -> None:
    """Fetch what the packages carry into the cache of their build, which then downloads nothing.

    What a try fetched stays there. Whether all is there is for the build to say.
    """
    command = [sys.executable, "-c", "from pam_packages.wheels import fetch; fetch()"]
    environment = {**os.environ, "PYTHONPATH": str(_PACKAGING)}
    for number in range(TRIES):
        time.sleep(PAUSE if number else 0)
        done = subprocess.run(command, env=environment, capture_output=True, check=False, umask=0o077)
        if done.returncode == 0:
            return
