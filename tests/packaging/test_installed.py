"""On a real systemd host: what the units allow and forbid, and what the packages do to a running host."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pam_packages.parts import ROOT

#: The first run on a machine makes the host's root file system.
pytestmark = [pytest.mark.slow, pytest.mark.root, pytest.mark.timeout(1200)]

SERVICES = ("pam-platform", "pam-relay", "pam-agent")
URL = "http://127.0.0.1:8443"
CONFIGURATION = {
    "platform": f"public_url: {URL}\nstate_dir: /var/lib/pam-platform\nlisten: 127.0.0.1:8443\n",
    "relay": f"platform: {URL}\nstate_dir: /var/lib/pam-relay\nruntime_dir: /run/pam-relay\n"
    "listen: 127.0.0.1:2222\npoll_interval: 1s\n",
    "agent": f"platform: {URL}\nstate_dir: /var/lib/pam-agent\nruntime_dir: /run/pam-agent\n"
    'allow_targets: ["10.0.0.0/8:*"]\n',
}


def install(host: Any, folder: Path, names: str = "*") -> str:
    """Copy packages to the host and have dpkg install them; what dpkg says."""
    target = host.root / "root" / folder.name
    shutil.copytree(folder, target, dirs_exist_ok=True)
    script = f"DEBIAN_FRONTEND=noninteractive dpkg -i --force-confold /root/{folder.name}/{names}.deb 2>&1"
    return str(host.sh(script, timeout=300))


def state(host: Any, unit: str) -> str:
    return str(host.run("systemctl", "show", "-p", "ActiveState", "--value", unit)).strip()


def as_user(host: Any, part: str, *words: str, **more: Any) -> str:
    return str(host.run(f"pam-{part}", *words, user=f"pam-{part}", timeout=120, **more))


def platform_answers(host: Any) -> None:
    """Wait for it: what systemd calls started has no worker yet."""
    host.wait("runuser", "-u", "pam-platform", "--", "pam-platform", "status", what="a platform that answers")


@pytest.fixture(scope="module")
def bare(fleet, packages) -> Any:
    """A host with the packages, not configured."""
    host = fleet.add("one", "bookworm")
    fleet.boot()
    install(host, packages)
    return host


@pytest.fixture(scope="module")
def host(bare) -> Any:
    """The same host with a platform, a relay and an agent that are enrolled and run."""
    for part, text in CONFIGURATION.items():
        bare.write(f"/etc/pam-{part}/{part}.yml", text)
    as_user(bare, "platform", "init")
    bare.write(
        "/tmp/access.yml", "gateways: [{name: dc1}]\nrelays: [{name: r1, host: 127.0.0.1, port: 2222}]\n"
    )
    as_user(bare, "platform", "apply", "-f", "/tmp/access.yml")
    bare.run("systemctl", "start", "pam-platform", timeout=120)
    platform_answers(bare)
    token = as_user(bare, "platform", "enrol-token", "relay", "r1", "--quiet")
    as_user(bare, "relay", "enrol", "--token-file", "-", "--name", "r1", input=token)
    token = as_user(bare, "platform", "enrol-token", "agent", "a1", "--gateway", "dc1", "--quiet")
    as_user(bare, "agent", "enrol", "--token-file", "-", "--name", "a1", input=token)
    bare.run("systemctl", "start", "pam-relay", "pam-agent", timeout=120)
    bare.wait("pam-agent", "status", what="an agent that is well")
    return bare


def test_before_its_configuration_nothing_runs_and_nothing_fails(bare) -> None:
    for service in SERVICES:
        assert bare.run("systemctl", "is-enabled", service).strip() == "enabled"
        assert state(bare, service) == "inactive"
        bare.run("systemctl", "start", service)
        assert state(bare, service) == "inactive"
        shown = bare.ssh(f"systemctl status --no-pager {service}").stdout
        assert "ConditionPathExists" in shown or "condition" in shown.lower()
    assert bare.run("systemctl", "--failed", "--no-legend").strip() == ""
    assert bare.run("stat", "-c", "%a %U", "/var/lib/pam-agent").strip() == "700 pam-agent"


def test_nothing_but_the_packages_own_modules_is_run(bare) -> None:
    bare.run("mkdir", "-p", "/tmp/evil/pam_common", "/root/.local/lib/python3.11/site-packages")
    for path in ("/tmp/evil/click.py", "/tmp/evil/pam_common/__init__.py", "/tmp/evil/sitecustomize.py",
                 "/root/.local/lib/python3.11/site-packages/click.py",
                 "/usr/lib/python3/dist-packages/click.py"):  # fmt: skip
        bare.write(path, "print('injected')\nraise SystemExit(9)\n")
    hostile = (
        "PYTHONPATH=/tmp/evil PYTHONHOME=/tmp/evil PYTHONSTARTUP=/tmp/evil/click.py PATH=/tmp/evil:$PATH"
    )
    for part in ("agent", "relay", "client", "platform"):
        out = bare.sh(f"cd /tmp/evil && {hostile} /usr/bin/pam-{part} --version")
        assert out.startswith(f"pam-{part}, version ")
    bare.run("rm", "-rf", "/tmp/evil", "/root/.local", "/usr/lib/python3/dist-packages/click.py")
    assert bare.run("find", "/usr/lib/pam", "-newer", "/usr/bin/pam-agent", "-name", "*.py").strip() == ""


PROBE = r"""
import ctypes, errno, json, os, pathlib, socket, subprocess
def attempt(action):
    try:
        action()
    except (OSError, subprocess.SubprocessError) as error:
        return getattr(error, "strerror", None) or type(error).__name__
    return "allowed"
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *words):
    def run():
        if getattr(libc, name)(*words) < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return run
state, runtime = os.environ["STATE_DIRECTORY"], os.environ["RUNTIME_DIRECTORY"]
def write(folder):
    return lambda: pathlib.Path(folder, "probe").write_text("x")
def execute():
    path = pathlib.Path(state, "program")
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    subprocess.run([str(path)], check=True)
lines = pathlib.Path("/proc/self/status").read_text().splitlines()
status = dict(line.split(":", 1) for line in lines if ":" in line)
others = [p for p in os.listdir("/proc") if p.isdigit() and os.stat(f"/proc/{p}").st_uid != os.getuid()]
print(json.dumps({
    "state": attempt(write(state)), "runtime": attempt(write(runtime)), "tmp": attempt(write("/tmp")),
    "etc": attempt(write("/etc")), "usr": attempt(write("/usr/lib/pam")), "var": attempt(write("/var/cache")),
    "home": attempt(lambda: os.listdir("/home/alice")), "root": attempt(lambda: os.listdir("/root")),
    "execute": attempt(execute), "others": others,
    "privileges": status["NoNewPrivs"].strip(), "capabilities": status["CapBnd"].strip(),
    "seccomp": status["Seccomp"].strip(), "cores": os.sysconf("SC_OPEN_MAX"),
    "netlink": attempt(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)),
    "packet": attempt(lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW)),
    "resolve": attempt(lambda: socket.getaddrinfo("localhost", 80)),
    "mount": attempt(call("mount", b"x", b"/tmp", b"tmpfs", 0, None)),
    "namespace": attempt(call("unshare", 0x10000000)), "chroot": attempt(call("chroot", b"/tmp")),
    "ptrace": attempt(call("ptrace", 16, 1, 0, 0)), "reboot": attempt(call("reboot", 0)),
    "clock": attempt(call("settimeofday", b"\0" * 16, None)), "nice": attempt(lambda: os.nice(-5)),
    "setuid": attempt(lambda: os.setuid(0)),
    "suid": attempt(lambda: os.chmod(os.path.join(state, "probe"), 0o4755)),
    "wx": attempt(lambda: __import__("mmap").mmap(-1, 4096, prot=7)),
    "devices": sorted(os.listdir("/dev")), "kernel": attempt(write("/proc/sys/kernel")),
    "ports": attempt(lambda: socket.socket().bind(("127.0.0.1", 443))),
}))
"""

#: What of the probe must not succeed.
REFUSED = (
    *("etc", "usr", "var", "home", "root", "kernel", "execute", "wx", "suid"),
    *("netlink", "packet", "ports", "mount", "namespace", "chroot"),
    *("ptrace", "reboot", "clock", "nice", "setuid"),
)


@pytest.mark.parametrize("service", SERVICES)
def test_the_confinement_holds_from_inside(host, service) -> None:
    """The probe runs in the service's own unit, with nothing changed but what is started."""
    text = (ROOT / f"systemd/{service}.service").read_text()
    dropped = ("ExecStart=", "ExecReload=", "Restart", "Type=", "NotifyAccess=", "WatchdogSec=", "Condition")
    kept = [line for line in text.splitlines() if not line.startswith(dropped)]
    host.write("/usr/lib/probe.py", PROBE)
    probe = f"probe-{service}"  # a journal of its own
    unit = "\n".join(kept).replace(
        "[Service]", "[Service]\nType=oneshot\nExecStart=/usr/bin/python3 /usr/lib/probe.py"
    )
    # Its own folders: the service itself goes on.
    for folder in ("StateDirectory=", "RuntimeDirectory=", "/var/lib/", "/run/"):
        unit = unit.replace(f"{folder}{service}\n", f"{folder}probe\n").replace(
            f"{folder}{service} ", f"{folder}probe "
        )
    host.write(f"/run/systemd/system/{probe}.service", unit)
    host.sh(f"rm -rf /var/lib/probe; systemctl daemon-reload; systemctl start {probe}")
    # The journal may take what it said only after it has ended.
    host.wait("sh", "-c", f"journalctl -o cat -u {probe} | grep -q '^{{'", what="the probe's words")
    said = host.journal("-u", probe).splitlines()
    found = json.loads(next(line for line in said if line.startswith("{")))
    for allowed in ("state", "runtime", "tmp", "resolve"):
        assert found[allowed] == "allowed", (allowed, found)
    for refused in REFUSED:
        assert found[refused] != "allowed", (refused, found)
    assert found["others"] == []
    assert (found["privileges"], found["seccomp"]) == ("1", "2")
    assert int(found["capabilities"], 16) == 0
    assert not {"sda", "mem", "kmsg", "net", "fuse"} & set(found["devices"])
    assert not host.ok("ls", "/tmp/probe"), "its /tmp is its own"


def main_pid(host: Any, service: str) -> int:
    return int(host.run("systemctl", "show", "-p", "MainPID", "--value", service))


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_that_hangs_or_dies_comes_back(host, service) -> None:
    host.sh(f"mkdir -p /run/systemd/system/{service}.service.d")
    host.write(f"/run/systemd/system/{service}.service.d/soon.conf",
               "[Service]\nWatchdogSec=10\nRestartSec=1\nTimeoutAbortSec=3\n")  # fmt: skip
    host.sh(f"systemctl daemon-reload; systemctl restart {service}", timeout=120)
    for number in ("STOP", "KILL"):
        before = main_pid(host, service)
        host.run("kill", f"-{number}", str(before))
        host.wait("sh", "-c", f"p=$(systemctl show -p MainPID --value {service}); "
                  f"test $p -ne 0 && test $p -ne {before} && systemctl is-active {service}",
                  what=f"{service} after SIG{number}")  # fmt: skip
    host.sh(f"rm -r /run/systemd/system/{service}.service.d; systemctl daemon-reload")
    host.sh(f"systemctl restart {service}", timeout=120)


def test_a_wrong_configuration_is_not_loaded_and_does_not_loop(host) -> None:
    path, good = "/etc/pam-agent/agent.yml", CONFIGURATION["agent"]
    before = main_pid(host, "pam-agent")
    host.write(path, good + "nonsense: 1\n")
    assert not host.ok("systemctl", "reload", "pam-agent")
    assert main_pid(host, "pam-agent") == before
    assert host.ok("pam-agent", "--config", path, "check-config") is False
    host.ssh("systemctl restart pam-agent", timeout=120)
    host.wait("systemctl", "is-failed", "pam-agent", what="the end of the tries")
    host.wait("sh", "-c", "systemctl status --no-pager pam-agent | grep -q 'unknown key'",
              what="the reason in the journal")  # fmt: skip
    assert int(host.run("systemctl", "show", "-p", "NRestarts", "--value", "pam-agent")) == 0
    host.write(path, good + "grace: 20m\n")
    host.run("systemctl", "start", "pam-agent", timeout=120)
    host.write(path, good)
    host.run("systemctl", "reload", "pam-agent")
    host.wait("sh", "-c", "journalctl -u pam-agent | grep -q event=reloaded", what="the reload")


def test_the_relay_takes_port_443_without_any_capability(host) -> None:
    path, good = "/etc/pam-relay/relay.yml", CONFIGURATION["relay"]
    host.run("systemctl", "stop", "pam-relay", timeout=120)
    host.write(path, good.replace("listen: 127.0.0.1:2222", "listen: systemd"))
    host.run("systemctl", "start", "pam-relay.socket")
    # systemd listens at once; the first who comes has the relay started.
    said = "timeout 60 sh -c 'exec 3<>/dev/tcp/127.0.0.1/443; head -c 4 <&3'".replace("sh -c", "bash -c")
    assert host.sh(said).startswith("SSH-")
    status = host.read(f"/proc/{main_pid(host, 'pam-relay')}/status")
    assert "CapEff:\t0000000000000000" in status
    host.run("systemctl", "restart", "pam-relay", timeout=120)
    assert host.sh(said).startswith("SSH-")
    host.run("systemctl", "stop", "pam-relay.socket", "pam-relay.service", timeout=120)
    host.write(path, good)
    host.run("systemctl", "start", "pam-relay", timeout=120)


def test_the_vaults_key_comes_as_a_credential(host) -> None:
    ours, systemds = "/var/lib/pam-platform/keys/vault.key", "/etc/credstore/pam-platform.vault-key"
    host.sh(
        f"systemctl stop pam-platform; mkdir -p /etc/credstore; mv {ours} {systemds};"
        f"chown root: {systemds}; systemctl start pam-platform",
        timeout=120,
    )
    platform_answers(host)
    assert not host.ok("runuser", "-u", "pam-platform", "--", "cat", systemds)
    host.sh(
        f"systemctl stop pam-platform; mv {systemds} {ours};"
        f"chown pam-platform: {ours}; systemctl start pam-platform",
        timeout=120,
    )


def test_a_further_agent_of_the_host(host) -> None:
    host.write("/etc/pam-agent/two.yml", CONFIGURATION["agent"].replace("/pam-agent\n", "/pam-agent-two\n"))
    host.run("install", "-d", "-m", "700", "-o", "pam-agent", "-g", "pam-agent", "/var/lib/pam-agent-two")
    token = as_user(host, "platform", "enrol-token", "agent", "a2", "--gateway", "dc1", "--quiet")
    words = ("--config", "/etc/pam-agent/two.yml", "enrol", "--token-file", "-", "--name", "a2")
    as_user(host, "agent", *words, input=token)
    host.run("systemctl", "enable", "--now", "pam-agent@two", timeout=120)
    host.wait("pam-agent", "--config", "/etc/pam-agent/two.yml", "status", what="the second agent")


def test_an_upgrade_keeps_the_configuration_and_restarts_what_runs(host, next_packages) -> None:
    before = {service: main_pid(host, service) for service in (*SERVICES, "pam-agent@two")}
    host.run("systemctl", "stop", "pam-relay", timeout=120)
    said = install(host, next_packages)
    assert "error" not in said.lower(), said
    for part in CONFIGURATION:
        assert host.read(f"/etc/pam-{part}/{part}.yml") == CONFIGURATION[part]
    for service in ("pam-platform", "pam-agent", "pam-agent@two"):
        assert state(host, service) == "active"
        assert main_pid(host, service) != before[service]
    assert state(host, "pam-relay") == "inactive", "what was stopped stays so"
    assert "0.1.1" in host.run("pam-agent", "--version")
    host.run("systemctl", "start", "pam-relay")
    host.wait("pam-agent", "status", what="an agent that is well")


def test_removal_keeps_and_purge_tells_of_unsent_recordings(host) -> None:
    host.sh("dpkg --remove pam-agent pam-relay 2>&1", timeout=300)
    assert state(host, "pam-agent") == "inactive"
    assert not host.ok("pgrep", "-u", "pam-agent")
    assert host.ok("test", "-e", "/var/lib/pam-agent/identity.key")
    assert host.read("/etc/pam-agent/agent.yml") == CONFIGURATION["agent"]
    assert not host.ok("test", "-e", "/usr/lib/pam/agent")

    host.sh("install -D -m 600 /dev/null /var/lib/pam-agent/spool/ready/s1.1.pamrec")
    host.sh("touch /etc/pam-agent/platform-ca.pem")  # put there by hand, or by a role
    said = host.sh("dpkg --purge pam-agent pam-relay 2>&1", timeout=300)
    assert "WARNING: 1 unsent recordings are left in /var/lib/pam-agent/spool" in said
    assert not host.ok("test", "-e", "/var/lib/pam-agent/identity.key")
    assert not host.ok("test", "-e", "/var/lib/pam-agent-two")
    assert not host.ok("test", "-e", "/var/lib/pam-relay")
    assert not host.ok("test", "-e", "/etc/pam-relay")
