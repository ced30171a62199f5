"""The units as files: what systemd itself says of them, and that they do not drift apart."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pam_packages.parts import ROOT

UNITS = ROOT / "systemd"
SERVICES = sorted(UNITS.glob("*.service"))


def options(path: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found.setdefault(name, []).append(value)
    return found


@pytest.mark.parametrize("path", SERVICES, ids=lambda path: path.name)
def test_the_exposure_is_low(path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not here")
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    exposure = re.search(r"exposure level for \S+: ([0-9.]+)", done.stdout)
    if exposure is None:
        pytest.skip(f"systemd-analyze cannot tell: {done.stderr}")
    assert float(exposure[1]) <= 1.5, done.stdout


def test_all_services_are_confined_alike() -> None:
    marker = "# What the service may see and change."
    confined = {
        path.name: path.read_text().partition(marker)[2].partition("[Install]")[0] for path in SERVICES
    }
    assert all(confined.values())
    assert len(set(confined.values())) == 1


@pytest.mark.parametrize("path", SERVICES, ids=lambda path: path.name)
def test_a_service_neither_gives_up_nor_spins(path: Path) -> None:
    unit = options(path)
    assert unit["Type"] == ["notify"]
    assert unit["Restart"] == ["always"]
    assert unit["StartLimitIntervalSec"] == ["0"]
    assert unit["RestartSec"] == ["5s"]
    assert unit["RestartPreventExitStatus"] == ["78"], "a wrong configuration stays wrong"
    assert unit["ConditionPathExists"], "without an enrolment it is not started"
    assert unit["WatchdogSec"]
    assert "network-online.target" not in path.read_text()


def test_a_further_agent_is_like_the_first() -> None:
    first, further = (UNITS / "pam-agent.service").read_text(), (UNITS / "pam-agent@.service").read_text()
    further = further.replace("/etc/pam-agent/%i.yml", "/etc/pam-agent/agent.yml").replace(
        "pam-agent-%i", "pam-agent"
    )
    assert first.splitlines()[2:] == further.splitlines()[2:]
