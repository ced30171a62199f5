"""The .rpm packages under a real systemd: installed, upgraded, erased and verified, with their scripts.

The host is a Debian with rpm, since no system of rpm's own can be had: hence --nodeps, for what Debian's own
packages provide.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pam_packages import building
from pam_packages.parts import CACHE, COMPONENTS

#: The first run on a machine makes the host's root file system.
pytestmark = [pytest.mark.slow, pytest.mark.root, pytest.mark.timeout(1200)]

CONFIG = "/etc/pam-agent/agent.yml"


def bring_rpm(root: Path) -> None:
    """Copy this machine's rpm, a Debian's as well, to a host: installing it there would bring all of perl."""
    linked = subprocess.run(["ldd", "/usr/bin/rpm"], capture_output=True, text=True, check=True).stdout
    libraries = [word for word in linked.split() if word.startswith("/")]
    for path in map(Path, ["/usr/bin/rpm", *libraries]):
        target = root / str(path.parent.resolve() / path.name).lstrip("/")
        if not target.exists():
            shutil.copy(path, target)
    shutil.copytree("/usr/lib/rpm", root / "usr/lib/rpm")
    (root / "var/lib/rpm").mkdir()


@pytest.fixture(scope="module")
def host(fleet, packages, next_packages) -> Any:
    host = fleet.add("rpm", "bookworm")
    bring_rpm(host.root)
    for name, folder in (("this", packages), ("next", next_packages)):
        target = host.root / "root" / name
        target.mkdir()
        for path in folder.glob("*.rpm"):
            shutil.copy(path, target)
    fleet.boot()
    return host


@pytest.fixture
def with_new_configuration(next_packages, tmp_path) -> Path:
    """A pam-agent after the next, whose own agent.yml has changed."""
    agent, version = COMPONENTS[0], "0.1.2"
    stage = CACHE / "stage" / version / agent.package
    shutil.rmtree(stage, ignore_errors=True)
    shutil.copytree(CACHE / "stage/0.1.1" / agent.package / "root", stage / "root")
    with (stage / "root" / CONFIG[1:]).open("a") as file:
        file.write("# a comment that is new\n")
    made = building._package(agent, "rpm", tmp_path, version)
    shutil.rmtree(stage)
    return made


def rpm(host: Any, words: str) -> str:
    return str(host.sh(f"rpm --nodeps {words} 2>&1", timeout=300))


def test_install_upgrade_erase_and_verify(host, with_new_configuration) -> None:
    rpm(host, "-i /root/this/*.rpm")
    for part in ("agent", "relay", "client", "platform"):
        assert "0.1.0" in host.run(f"pam-{part}", "--version")
    for part in ("agent", "relay", "platform"):
        assert host.run("systemctl", "is-enabled", f"pam-{part}").strip() == "enabled"
        assert host.run("stat", "-c", "%a %U", f"/var/lib/pam-{part}").strip() == f"700 pam-{part}"
    assert host.run("systemctl", "--failed", "--no-legend").strip() == ""
    assert host.ssh("rpm -V --nodeps pam-common pam-agent pam-relay pam-platform pam-client").stdout == ""

    host.sh("echo '# ours' >> /etc/pam-agent/agent.yml; echo >> /usr/lib/pam/agent/start.py")
    verified = host.ssh("rpm -V --nodeps pam-agent").stdout
    assert f"c {CONFIG}" in verified
    assert "/usr/lib/pam/agent/start.py" in verified

    rpm(host, "-U /root/next/*.rpm")
    assert "0.1.1" in host.run("pam-agent", "--version")
    assert host.read(CONFIG).endswith("# ours\n")
    assert not host.ok("grep", "-q", "# ours", "/usr/lib/pam/agent/start.py")
    assert host.run("systemctl", "is-enabled", "pam-agent").strip() == "enabled"
    assert host.ok("test", "-e", "/usr/lib/pam/agent/pam_agent/__pycache__")

    # A new version of the packaged configuration is put beside the administrator's.
    shutil.copy(with_new_configuration, host.root / "root")
    assert f"{CONFIG}.rpmnew" in rpm(host, f"-U /root/{with_new_configuration.name}")
    assert host.read(CONFIG).endswith("# ours\n")
    assert host.read(f"{CONFIG}.rpmnew").endswith("# a comment that is new\n")

    host.sh("install -D -m 600 /dev/null /var/lib/pam-agent/spool/ready/s1.1.pamrec")
    said = rpm(host, "-e pam-agent pam-relay pam-client pam-platform pam-common")
    assert "/var/lib/pam-agent is left" in said
    assert f"{CONFIG}.rpmsave" in said
    assert host.read(f"{CONFIG}.rpmsave").endswith("# ours\n")
    assert host.ok("test", "-e", "/var/lib/pam-agent/spool/ready/s1.1.pamrec")
    assert not host.ok("test", "-e", "/usr/lib/pam")
    assert host.run("systemctl", "--failed", "--no-legend").strip() == ""
    assert not host.ok("systemctl", "cat", "pam-agent")
