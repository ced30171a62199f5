"""What every test relies on."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import hypothesis
import pytest

_shown: list[pytest.TerminalReporter] = []


def pytest_configure(config: pytest.Config) -> None:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and not hasattr(config, "workerinput"):
        _shown.append(reporter)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Name what failed at once: a run that is ended from outside has no summary."""
    if report.failed:
        for reporter in _shown:
            reporter.write_line("")
            reporter.write_line(f"failed after {report.duration:.0f} s: {report.nodeid}")


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
