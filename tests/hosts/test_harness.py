"""The test hosts themselves: what other tests rely on when they say that nothing came in, or was left."""

from __future__ import annotations

import subprocess
import sys

import pytest
from harness.hosts import Fleet
from harness.images import ImageError, image
from harness.network import CONTROLLER_ADDRESS
from harness.sweep import left_over, sweep

#: The first run on a machine makes the root file system.
pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(autouse=True, scope="module")
def _root_file_system() -> None:
    try:
        image("bookworm")
    except ImageError as error:
        pytest.skip(f"no root file system can be had: {error}")


def reaches(host, address, port=22, seconds=30):
    return host.ok("timeout", str(seconds), "bash", "-c", f"echo > /dev/tcp/{address}/{port}")


def test_hosts_boot_meet_reboot_and_leave_nothing() -> None:
    with Fleet() as fleet:
        server, gateway = fleet.add("server", "bookworm"), fleet.add("gw", "bookworm", private=True)
        fleet.boot()
        assert server.run("cat", "/proc/1/comm").strip() == "systemd"
        assert server.run("hostname").strip() == "server"
        assert reaches(gateway, server.address)

        assert reaches(server, gateway.address)
        fleet.network.refuse_inbound("gw")
        assert not reaches(server, gateway.address, seconds=5)
        assert fleet.network.refused("gw") > 0
        assert reaches(gateway, server.address), "outbound goes on"
        assert gateway.ok("true"), "the controller's ssh goes on"
        assert not reaches(server, gateway.private), "the private network is the gateways' alone"

        fleet.network.link("server", "down")
        assert not reaches(gateway, server.address, seconds=5)
        fleet.network.link("server", "up")
        gateway.wait("timeout", "10", "bash", "-c", f"echo > /dev/tcp/{server.address}/22", what="the link")

        boot = gateway.read("/proc/sys/kernel/random/boot_id"), gateway.run("stat", "-c", "%z", "/proc/1")
        gateway.write("/etc/kept", "kept\n")
        gateway.reboot()
        assert gateway.read("/etc/kept") == "kept\n"
        assert gateway.run("stat", "-c", "%z", "/proc/1") != boot[1]
        assert not reaches(gateway, CONTROLLER_ADDRESS, 8443)
        label = fleet.label
    assert left_over(label) == []


def test_what_a_killed_run_left_is_removed_by_the_next() -> None:
    program = (
        "import os, signal\n"
        "from harness.hosts import Fleet\n"
        "fleet = Fleet()\n"
        "fleet.add('lost', 'bookworm')\n"
        "fleet.boot()\n"
        "print(fleet.label, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = [folder for folder in sys.path if folder.endswith("/hosts")]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{program}"],
        capture_output=True,
        text=True,
        timeout=1000,
        check=False,
    )
    label = done.stdout.split()[-1]
    assert left_over(label) != [], done.stderr
    sweep()
    assert left_over(label) == []
