"""What every test relies on."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import hypothesis
import pytest

# A machine that does something else for a moment is no finding.
hypothesis.settings.register_profile(
    "patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("patient")


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """A command run in this process sends its logs to a stderr that is gone after the test."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    root.handlers[:] = before
    root.setLevel(level)


@pytest.fixture(autouse=True)
def umask_as_it_was() -> Iterator[None]:
    """pam-platform's commands keep what they write private; the next test's servers run as others."""
    before = os.umask(0o022)
    os.umask(before)
    yield
    os.umask(before)
