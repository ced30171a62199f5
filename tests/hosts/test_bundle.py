"""The product as its operators meet it: installed by Ansible on real hosts, changed, upgraded, broken.

One topology for all tests, in this order: each goes on from where the one before it ended.
"""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from harness.bundle import GATEWAYS, NEW, OLD, Bundle
from harness.hosts import wait_for
from harness.network import PRIVATE_ADDRESS
from harness.playbook import Run, Unsafe
from harness.watch import CommandLines, in_journal, readable_files

# The first run on a machine makes three root file systems and two sets of packages.
pytestmark = pytest.mark.timeout(2400)

SERVICES = {"platform": "pam-platform", "relay": "pam-relay", "gw1": "pam-agent", "gw2": "pam-agent"}
SERVICES |= {"gw3": "pam-agent"}


@pytest.fixture(scope="module")
def bundle() -> Iterator[Bundle]:
    found = Bundle()
    yield found
    found.close()


@pytest.fixture(scope="module")
def command_lines(bundle: Bundle) -> Iterator[CommandLines]:
    """Every command line from the first play on."""
    watch = CommandLines()
    yield watch
    watch.close()


def pid(bundle: Bundle, host: str, unit: str = "") -> int:
    shown = bundle[host].run("systemctl", "show", "-P", "MainPID", unit or SERVICES[host])
    return int(shown)


def well(bundle: Bundle, host: str) -> bool:
    """Whether the host's service says that all is well."""
    name = SERVICES[host]
    return bundle[host].ok("runuser", "-u", name, "--", name, "status")


def all_well(bundle: Bundle) -> None:
    for host in SERVICES:
        wait_for(lambda host=host: well(bundle, host), f"the service of {host}", timeout=120)


def answers(bundle: Bundle, account: str) -> bool:
    return bundle.alice.query(account, "select 6 * 7").stdout.strip() == "42"


def versions(bundle: Bundle, *hosts: str) -> set[str]:
    return {
        bundle[host].run("dpkg-query", "-W", "-f", "${Version}", package)
        for host in hosts
        for package in ("pam-common", "pam-agent")
    }


# -- a first run ---------------------------------------------------------------------------------------------


def test_one_play_brings_up_everything(bundle: Bundle, command_lines: CommandLines) -> None:
    bundle.packages(OLD)
    told = bundle.controller.run("site.yml", "--check", "--diff", pam_serial="100%").check().changed()
    for host, role in (("platform", "pam_platform"), ("relay", "pam_relay"), ("gw1", "pam_agent")):
        assert (host, f"{role} : Write the configuration") in told
        assert bundle[host].run("sh", "-c", "ls -d /etc/pam-* 2>/dev/null || true") == "", "only told"
    bundle.controller.run("site.yml", "-vvv", pam_serial="100%").check()
    bundle.build(NEW)
    for host in GATEWAYS:
        before = bundle.fleet.network.refused(host)
        for other in ("platform", "relay", "desk"):
            for port in (22, 2222, 8443, 5432):
                reach = f"echo > /dev/tcp/{bundle[host].address}/{port}"
                assert not bundle[other].ok("timeout", "1", "bash", "-c", reach), (other, host, port)
        assert bundle.fleet.network.refused(host) > before
    for other in ("platform", "relay", "desk"):
        reach = f"echo > /dev/tcp/{PRIVATE_ADDRESS}/5432"
        assert not bundle[other].ok("timeout", "1", "bash", "-c", reach), "only gateways reach the target"

    assert "logged in" in bundle.alice.login()
    for account, gateway in (("prod-db/app", "dc1"), ("far-db/app", "dc2")):
        done = bundle.alice.query(account, "select 6 * 7")
        assert done.stdout.strip() == "42", done.stderr
        newest = bundle.alice.sessions()[0]
        assert (newest["account"], newest["gateway"]) == (account, gateway)
    wait_for(lambda: {row["recording"] for row in bundle.alice.sessions()} == {"complete"}, "the recordings")
    replay = bundle.alice.run("replay", bundle.alice.sessions()[0]["id"], "--verify")
    assert replay.returncode == 0, replay.stderr
    assert "select 6 * 7" in replay.stdout
    bundle["platform"].run("runuser", "-u", "pam-platform", "--", "pam-platform", "recordings", "verify")


def test_a_second_run_changes_nothing(bundle: Bundle) -> None:
    assert bundle.controller.run("site.yml", pam_serial="100%").check().changed() == []


def test_check_tells_exactly_what_a_change_will_do(bundle: Bundle) -> None:
    before = {host: pid(bundle, host) for host in SERVICES}
    inventory = bundle.controller.inventory
    targets = [f"{PRIVATE_ADDRESS}:5432", "10.78.0.9:5432"]
    inventory["pam_gateways"]["vars"]["pam_agent_allow_targets"] = targets
    inventory["pam_relays"]["vars"] = {"pam_relay_settings": {"poll_interval": "5s"}}
    inventory["pam_platform"]["vars"]["pam_platform_access"]["groups"].append({"name": "later"})
    told = bundle.controller.run("site.yml", "--check", "--diff", pam_serial="100%").check()
    assert {host: pid(bundle, host) for host in SERVICES} == before
    for line in ("+- 10.78.0.9:5432", "+poll_interval: 5s", "+- name: later"):
        assert line in told.output

    done = bundle.controller.run("site.yml", pam_serial="100%").check()
    assert sorted(told.changed()) == sorted(done.changed()) != []
    assert {host: pid(bundle, host) for host in SERVICES} == before, "nothing needs a restart for that"
    wait_for(lambda: "reloaded" in bundle["relay"].journal("-u", "pam-relay"), "the relay's reload")


# -- what is wrong -------------------------------------------------------------------------------------------


def failure(run: Run) -> str:
    assert run.code != 0, run.output[-3000:]
    ((_, task, message),) = run.failed()
    return f"{task}: {message}\n{run.output[-3000:]}"


def test_a_tampered_package_is_refused(bundle: Bundle) -> None:
    before = pid(bundle, "gw1")
    folder = bundle.folder("tampered")
    shutil.copytree(bundle.packages(NEW), folder)
    with next(folder.glob("pam-agent_*.deb")).open("ab") as package:
        package.write(b"\0")

    def deploy() -> str:
        limit = ("--limit", "gw1")
        return failure(
            bundle.controller.run("deploy-gateway.yml", *limit, pam_common_package_folder=str(folder))
        )

    assert "was tampered with" in deploy()
    sums = folder / "SHA256SUMS"
    sums.write_text(sums.read_text() + "0" * 64 + "  another.deb\n")
    assert "BAD signature" in deploy()
    assert (pid(bundle, "gw1"), versions(bundle, "gw1")) == (before, {OLD})


PWNED = "$(touch /tmp/pwned)`touch /tmp/pwned`; touch /tmp/pwned #"


def test_values_are_never_a_template_a_script_or_yaml(bundle: Bundle) -> None:
    """Also the passwords of the administrator and of the database, with which the first run went well."""
    before = pid(bundle, "gw1")
    refused = {
        "pam_agent_name": "dc1-a" + PWNED,
        "pam_agent_gateway": Unsafe("{{ lookup('pipe', 'touch /tmp/pwned') }}"),
        "pam_common_platform_url": "https://platform.test:8443\nlog_level: debug",
        "pam_common_version": "1.0.0 && touch /tmp/pwned",
    }
    for name, value in refused.items():
        run = bundle.controller.run("deploy-gateway.yml", "--limit", "gw1", **{name: value})
        assert "expected" in failure(run), name
    hostile = {"platform_ca": Unsafe("/etc/{{ 7 * 7 }}: !x " + PWNED), "tunnels_per_relay": 99}
    run = bundle.controller.run("deploy-gateway.yml", pam_agent_settings=hostile)
    assert "tunnels_per_relay: expected" in failure(run)
    assert {host for host, *_ in run.tasks} == {"gw1"}, "the first failure ends it"
    for host in (*SERVICES, "desk"):
        assert not bundle[host].ok("test", "-e", "/tmp/pwned")
    assert pid(bundle, "gw1") == before
    assert "tunnels_per_relay" not in bundle["gw1"].read("/etc/pam-agent/agent.yml")


def test_wrong_files_are_refused_before_any_host_has_them(bundle: Bundle) -> None:
    before = {host: pid(bundle, host) for host in SERVICES}
    wrong, other = bundle.fleet.folder / "wrong.pem", bundle.fleet.folder / "other.key"
    wrong.write_text("-----BEGIN CERTIFICATE-----\nbm9uZQ==\n-----END CERTIFICATE-----\n")
    command = ["openssl", "genpkey", "-quiet", "-algorithm", "ed25519", "-out", str(other)]
    subprocess.run(command, check=True)
    for playbook in ("deploy-gateway.yml", "deploy-relay.yml", "deploy-platform.yml", "deploy-client.yml"):
        run = bundle.controller.run(playbook, pam_common_platform_ca_file=str(wrong))
        assert "platform_ca_file: expected a file on the controller" in failure(run), playbook
    run = bundle.controller.run("deploy-platform.yml", pam_platform_tls_key_file=str(other))
    assert "tls_key_file: expected files on the controller" in failure(run)
    assert {host: pid(bundle, host) for host in SERVICES} == before
    assert answers(bundle, "prod-db/app")


def test_wrong_tokens_and_a_lost_platform_fail_alone(bundle: Bundle) -> None:
    """A further agent on gw2, whose first agent goes on unharmed; then the corrected run."""
    before = pid(bundle, "gw2")
    token = bundle["platform"].run(
        *("runuser", "-u", "pam-platform", "--", "pam-platform", "enrol-token", "agent", "dc1-c"),
        *("--gateway", "dc1", "--quiet"),
    )
    bundle.secrets["token"] = token.strip()
    wrong = bundle.secrets["wrong token"] = "wrong-" + bundle.secrets["alice"] + PWNED

    def deploy(value: str) -> Run:
        inventory = copy.deepcopy(bundle.controller.inventory)
        dc1 = inventory["pam_gateways"]["children"]["dc1"]["hosts"]["gw2"]
        dc1["pam_agent_instances"] = [{"instance": "3", "name": "dc1-c"}]
        dc1 |= {"pam_common_token_source": "given", "pam_agent_tokens": {"dc1-c": Unsafe(value)}}
        kept, bundle.controller.inventory = bundle.controller.inventory, inventory
        try:
            return bundle.controller.run("deploy-gateway.yml", "-vvv", "--limit", "gw2")
        finally:
            bundle.controller.inventory = kept

    assert "dc1-c was not enrolled" in failure(deploy(wrong))
    bundle.fleet.network.link("platform", "down")
    try:
        assert "does not answer" in failure(deploy(token.strip()))
    finally:
        bundle.fleet.network.link("platform", "up")
    deploy(token.strip()).check()
    assert bundle["gw2"].ok("systemctl", "is-active", "pam-agent@3")
    bundle["gw2"].sh("systemctl disable --now pam-agent@3; rm -rf /var/lib/pam-agent-3")
    assert "dc1-c was not enrolled" in failure(deploy(token.strip())), "a token works once"
    assert pid(bundle, "gw2") == before
    bundle["gw2"].sh("rm -rf /var/lib/pam-agent-3 /etc/pam-agent/3.yml")
    # The agents were without their platform for minutes: each tries again after some seconds.
    wait_for(lambda: answers(bundle, "prod-db/app"), "a session", timeout=90)


# -- upgrade and back ----------------------------------------------------------------------------------------


def test_upgrade_and_back_with_sessions_open(bundle: Bundle) -> None:
    both = str(bundle.both())
    held = bundle.alice.start("prod-db/app")
    assert held.stdin is not None
    assert held.stdout is not None
    held.stdin.write("select 'held ' || 'open';\n")
    held.stdin.flush()
    assert any("held open" in line for line in held.stdout)

    stop, failures, finished = threading.Event(), [], []
    # A quarter of a drain, on a busy machine half of one: it is under way in most of them, and finishes.
    bulk = "copy (select i, pg_sleep(0.005) from generate_series(1, 900) i) to stdout"

    def work(sql: str, lines: int) -> None:
        while not stop.is_set():
            done = bundle.alice.query("prod-db/app", sql, timeout=120)
            good = done.returncode == 0 and len(done.stdout.splitlines()) == lines
            (finished if good else failures).append(done.stderr)

    with ThreadPoolExecutor(3) as pool:
        workers = [pool.submit(work, bulk, 900), pool.submit(work, "select 1", 1)]
        try:
            words = ("deploy-gateway.yml", "--limit", "dc1")
            unclear = bundle.controller.run(*words, pam_common_package_folder=both)
            assert "say which by pam_common_version" in failure(unclear)
            for version in (NEW, OLD):
                run = bundle.controller.run(
                    *words, pam_common_package_folder=both, pam_common_version=version
                )
                run.check()
                assert versions(bundle, "gw1", "gw2") == {version}
        finally:
            stop.set()
            for worker in workers:
                worker.result()
    # Nobody waits for an idle psql longer than the drain; it is told why it was ended.
    told = held.communicate("select 'after' || 'wards';\n\\q\n", timeout=60)[0]
    assert "the agent is stopping" in told
    assert "afterwards" not in told
    assert failures == []
    assert len(finished) > 4
    all_well(bundle)
    wait_for(bundle.alice.recorded, "the recordings", timeout=120)
    bundle["platform"].run("runuser", "-u", "pam-platform", "--", "pam-platform", "recordings", "verify")


# -- what breaks ---------------------------------------------------------------------------------------------


def test_services_come_back_after_a_reboot(bundle: Bundle) -> None:
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda host: host.reboot(), bundle.fleet.hosts.values()))
    all_well(bundle)
    for account in ("prod-db/app", "far-db/app"):
        wait_for(lambda account=account: answers(bundle, account), account, timeout=90)


def killed(bundle: Bundle, signal: str) -> None:
    """Send a signal to the main process of each service; each is soon another process and well."""
    before = {host: pid(bundle, host) for host in SERVICES}
    for host, number in before.items():
        bundle[host].run("kill", f"-{signal}", str(number))
    for host in SERVICES:
        wait_for(lambda host=host: pid(bundle, host) not in (0, before[host]), f"{host} again", timeout=150)
    all_well(bundle)
    wait_for(lambda: answers(bundle, "prod-db/app"), "a session", timeout=90)


def test_services_come_back_after_kill_9(bundle: Bundle) -> None:
    killed(bundle, "KILL")


def test_the_watchdog_ends_what_hangs(bundle: Bundle) -> None:
    for host, name in SERVICES.items():
        folder = f"/run/systemd/system/{name}.service.d"
        shorter = "[Service]\nWatchdogSec=20s\nTimeoutAbortSec=2s\n"
        bundle[host].sh(f"mkdir -p {folder}; printf '{shorter}' > {folder}/watchdog.conf")
        bundle[host].sh(f"systemctl daemon-reload; systemctl restart {name}")
    all_well(bundle)
    killed(bundle, "STOP")


def test_a_full_disk_refuses_sessions_until_there_is_room(bundle: Bundle) -> None:
    gateway = bundle["gw3"]
    gateway.sh(
        "systemctl stop pam-agent pam-agent@2; mount -t tmpfs -o size=2m,mode=700,uid=pam-agent,gid=pam-agent"
        " tmpfs /var/lib/pam-agent/spool; dd if=/dev/zero of=/var/lib/pam-agent/spool/lock.fill bs=4k"
        " 2>/dev/null || true; systemctl start pam-agent"
    )
    wait_for(lambda: pid(bundle, "gw3") > 0, "the agent")
    number = pid(bundle, "gw3")
    refused = bundle.alice.query("far-db/app", "select 6 * 7")
    assert refused.returncode != 0
    assert "42" not in refused.stdout, "nothing that is not recorded"
    gateway.run("rm", "/var/lib/pam-agent/spool/lock.fill")
    wait_for(lambda: answers(bundle, "far-db/app"), "a session", timeout=120)
    assert pid(bundle, "gw3") == number
    wait_for(bundle.alice.recorded, "the recordings", timeout=120)  # what is in the tmpfs goes with it
    gateway.sh(
        "systemctl stop pam-agent; umount /var/lib/pam-agent/spool; systemctl start pam-agent pam-agent@2"
    )
    all_well(bundle)


def test_a_clock_that_jumps_harms_no_agent(bundle: Bundle) -> None:
    """The wall clock alone, as somebody sets it; monotonic time goes on."""
    gateway = bundle["gw3"]
    library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    shutil.copy(library, gateway.root / "usr/lib/libfaketime.so.1")
    fake = "LD_PRELOAD=/usr/lib/libfaketime.so.1 FAKETIME_TIMESTAMP_FILE=/etc/pam-agent/clock"
    fake += " FAKETIME_NO_CACHE=1 FAKETIME_DONT_FAKE_MONOTONIC=1 FAKETIME_DISABLE_SHM=1"
    gateway.write("/etc/pam-agent/clock", "+0\n")
    gateway.sh("mkdir -p /run/systemd/system/pam-agent.service.d")
    gateway.write("/run/systemd/system/pam-agent.service.d/clock.conf", f"[Service]\nEnvironment={fake}\n")
    gateway.sh("systemctl daemon-reload; systemctl stop pam-agent@2; systemctl restart pam-agent")
    wait_for(lambda: answers(bundle, "far-db/app"), "a session", timeout=90)
    number = pid(bundle, "gw3")
    # Forward alone: at a jump back libfaketime itself makes time.sleep() fail.
    gateway.write("/etc/pam-agent/clock", "+3d\n")
    wait_for(lambda: answers(bundle, "far-db/app"), "a session three days later", timeout=120)
    assert pid(bundle, "gw3") == number, "the watchdog goes by monotonic time"
    gateway.sh("rm /run/systemd/system/pam-agent.service.d/clock.conf /etc/pam-agent/clock")
    gateway.sh("systemctl daemon-reload; systemctl restart pam-agent; systemctl start pam-agent@2")
    all_well(bundle)


# -- removal and addition -----------------------------------------------------------------------------------


def test_a_host_is_removed_and_then_serves_another_gateway(bundle: Bundle) -> None:
    gateway, limit = bundle["gw3"], ("--limit", "gw3")
    assert "say by --limit which hosts are meant" in failure(bundle.controller.run("remove.yml"))
    all_well(bundle)
    wait_for(bundle.alice.recorded, "the recordings", timeout=120)
    assert bundle.controller.run("remove.yml", *limit, pam_common_purge=True).check().changed()
    assert not gateway.ok("test", "-e", "/usr/bin/pam-agent")
    assert gateway.run("sh", "-c", "ls -d /var/lib/pam-* /etc/pam-* /usr/lib/pam 2>/dev/null || true") == ""
    assert gateway.run("systemctl", "list-units", "--plain", "--no-legend", "pam-agent*") == ""
    assert {name: state for name, state in states(bundle).items() if name.startswith("dc2-")} == {
        "dc2-a": "revoked",
        "dc2-a-2": "revoked",
    }
    assert bundle.controller.run("remove.yml", *limit, pam_common_purge=True).check().changed() == []

    # Its play alone, on a bare host; the gateway is not known to the platform yet.
    children = bundle.controller.inventory["pam_gateways"]["children"]
    del children["dc2"]
    host = {"ansible_host": gateway.address, "pam_agent_name": "dc3-a"}
    children["dc3"] = {"hosts": {"gw3": host}, "vars": {"pam_agent_gateway": "dc3"}}
    before = {name: pid(bundle, name) for name in ("platform", "relay", "gw1", "gw2")}
    told = bundle.controller.run("deploy-gateway.yml", *limit, "--check", "--diff").check().changed()
    assert ("gw3", "pam_agent : Write the configuration") in told
    assert "dc3-a" not in states(bundle)
    bundle.controller.run("deploy-gateway.yml", *limit).check()
    assert states(bundle)["dc3-a"] == "active"
    assert {name: pid(bundle, name) for name in before} == before, "nobody else is touched"

    access = bundle.controller.inventory["pam_platform"]["vars"]["pam_platform_access"]
    access["gateways"] = [{"name": "dc1"}, {"name": "dc3"}]
    for resource in access["resources"]:
        resource["gateway"] = "dc1" if resource["name"] == "prod-db" else "dc3"
    bundle.controller.run("deploy-platform.yml", "--tags", "access").check()
    wait_for(lambda: answers(bundle, "far-db/app"), "a session through the new gateway", timeout=90)


def states(bundle: Bundle) -> dict[str, str]:
    """What the platform knows of the agents: the state of each by its name."""
    words = ("runuser", "-u", "pam-platform", "--", "pam-platform", "agent", "ls", "--json")
    return {row["name"]: row["state"] for row in json.loads(bundle["platform"].run(*words))["agents"]}


# -- secrets -------------------------------------------------------------------------------------------------


def test_no_secret_is_where_others_can_read_it(bundle: Bundle, command_lines: CommandLines) -> None:
    # Long enough to be found by nothing else, short enough to be there before a value's quotes.
    secrets = [value[:12] for name, value in bundle.secrets.items() if name != "wrong token"]
    secrets += [bundle.secrets["wrong token"][:18], bundle.key.read_text().splitlines()[1]]
    assert [line for line in bundle.controller.printed.splitlines() if any(s in line for s in secrets)] == []
    assert command_lines.holding(secrets) == []
    for host in bundle.fleet.hosts.values():
        assert in_journal(host, secrets) == [], host.name
        assert readable_files(host, secrets) == [], host.name


# -- the end ------------------------------------------------------------------------------------------------


def test_all_else_is_removed(bundle: Bundle) -> None:
    assert "back them up" in failure(remove(bundle, "platform"))
    assert well(bundle, "platform")
    for host, name in (("desk", "pam-client"), ("relay", "pam-relay"), ("platform", "pam-platform")):
        remove(bundle, host, pam_platform_remove_everything=True).check()
        assert not bundle[host].ok("test", "-e", f"/usr/bin/{name}")
        assert bundle[host].run("systemctl", "list-units", "--plain", "--no-legend", "pam-*") == ""
        left = "ls -d /var/lib/pam-* /etc/pam-* /usr/lib/pam 2>/dev/null || true"
        assert bundle[host].run("sh", "-c", left) == "", host


def remove(bundle: Bundle, host: str, **variables: object) -> Run:
    return bundle.controller.run("remove.yml", "--limit", host, pam_common_purge=True, **variables)
