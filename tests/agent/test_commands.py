"""pam-agent: configuration errors with file and line, enrolment, a real process that runs and stops."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pam_agent import __main__ as commands
from pam_agent import config
from pam_agent.protocols import PROTOCOLS, registry
from pam_common import cli
from pam_common.errors import ConfigError

GOOD = {
    "platform": "http://127.0.0.1:1",
    "state_dir": "/var/lib/pam-agent",
    "runtime_dir": "/run/pam-agent",
    "allow_targets": ["10.0.0.0/8:5432"],
}


def write(tmp_path: Path, **changes: object) -> Path:
    path = tmp_path / "agent.yml"
    path.write_text(yaml.safe_dump({**GOOD, **changes}, sort_keys=False))
    return path


def run(*args: object) -> int:
    return cli.run(commands.main_command, [str(arg) for arg in args])


# -- configuration -------------------------------------------------------------------------------------


def test_defaults(tmp_path) -> None:
    made = config.load(write(tmp_path))
    assert (made.grace, made.drain_timeout, made.tunnels_per_relay) == (900, 30, 1)
    assert (made.max_spool, made.recipients, made.log_level) == (2 << 30, None, "info")
    assert made.status_socket == Path("/run/pam-agent/status.sock")


def test_everything_can_be_set(tmp_path) -> None:
    made = config.load(
        write(
            tmp_path,
            recording={"recipients": ["0123456789abcdef"], "max_spool": "512MiB"},
            tunnels_per_relay=4,
            grace="2h",
            drain_timeout=5,
            limits={"sessions": 7, "connections": 70, "connections_per_session": 10},
            log_level="debug",
        )
    )
    assert made.recipients == (("0123456789abcdef", None),)
    assert (made.max_spool, made.grace, made.limits.sessions) == (512 << 20, 7200, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"allow_target": []}, 'agent.yml:6: unknown key "allow_target"'),
        ({"allow_targets": []}, "allow_targets"),
        ({"allow_targets": ["10.0.0.1"]}, 'allow_targets[0]: "10.0.0.1": expected host:port'),
        ({"platform": "http://pam.example.com"}, "platform: http://pam.example.com is not encrypted"),
        ({"platform": "ftp://x"}, "platform: expected the platform's address"),
        ({"platform_ca": "/nonexistent.pem"}, "platform_ca: no such file"),
        ({"state_dir": "relative"}, "state_dir: expected an absolute path"),
        ({"tunnels_per_relay": 17}, "tunnels_per_relay: expected at most 16, got 17"),
        ({"grace": "soon"}, "grace: expected a duration"),
        ({"recording": {"recipients": ["me"]}}, "recording.recipients[0]: expected a key id"),
        (
            {"recording": {"recipients": [{"kid": "0" * 16, "key": "A" * 43}]}},
            "recording.recipients[0]: a recipient's key id",
        ),
        ({"recording": {"max_spool": "big"}}, "recording.max_spool: expected a size"),
        ({"limits": {"users": 1}}, 'limits: unknown key "users"'),
    ],
)
def test_what_is_wrong_is_named(tmp_path, capsys, changes, message) -> None:
    path = write(tmp_path, **changes)
    assert run("--config", path, "check-config") == 78
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    assert message in str(caught.value)


def test_a_missing_key_is_named(tmp_path) -> None:
    path = tmp_path / "agent.yml"
    path.write_text("platform: https://pam.example.com\n")
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    assert '"allow_targets" is a required property' in str(caught.value)


def test_check_config_says_ok(tmp_path, capsys) -> None:
    assert run("--config", write(tmp_path), "check-config") == 0
    assert capsys.readouterr().out.endswith("agent.yml: ok (1 target rules)\n")


# -- enrol and status ----------------------------------------------------------------------------------


def test_enrol_says_where(settings, platform, tmp_path, capsys) -> None:
    made = settings()
    token = tmp_path / "token"
    token.write_text("enrol-me\n")
    assert run("--config", made.path, "enrol", "--token-file", token, "--name", "dc1-a") == 0
    assert capsys.readouterr().out == "enrolled as dc1-a of gateway dc1 (relays: none yet)\n"


@pytest.mark.parametrize("content", ["", "\n", "two\nlines", "x" * 5000])
def test_a_bad_token_file_is_refused(settings, platform, tmp_path, capsys, content) -> None:
    token = tmp_path / "token"
    token.write_text(content)
    assert run("--config", settings().path, "enrol", "--token-file", token, "--name", "dc1-a") == 1
    assert "holds no enrolment token" in capsys.readouterr().err
    assert platform.agents == {}


def test_run_needs_an_enrolment(settings, platform, capsys) -> None:
    assert run("--config", settings().path, "run") == 1
    error = capsys.readouterr().err
    assert "error: this agent is not enrolled" in error
    assert "HINT: pam-agent --config FILE enrol" in error


def test_status_without_an_agent(settings, platform, capsys) -> None:
    assert run("--config", settings().path, "status") == 69
    assert "HINT: is the service running" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["enrol"], ["run"], ["check-config"], ["status"]])
def test_help_has_an_example(command, capsys) -> None:
    assert run(*command, "--help") == 0
    assert "Example" in capsys.readouterr().out


# -- a process -----------------------------------------------------------------------------------------


def test_a_process_runs_reports_reloads_and_stops(enrolled, relay, platform, tmp_path, wait_until) -> None:
    made = enrolled()
    notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notify.bind(str(tmp_path / "notify"))
    notify.settimeout(60)
    environment = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "1000000"}
    base = [sys.executable, "-m", "pam_agent", "--config", str(made.path)]
    log = (tmp_path / "log").open("w+")
    process = subprocess.Popen([*base, "run"], stderr=log, env=environment)
    try:
        said = ""
        while "READY=1" not in said or "WATCHDOG=1" not in said or "STATUS=1/1 tunnels" not in said:
            said += notify.recv(4096).decode() + "\n"
        status = subprocess.run([*base, "status", "--json"], capture_output=True, check=False)
        assert status.returncode == 0
        assert json.loads(status.stdout)["tunnels_up"] == 1
        shown = subprocess.run([*base, "status"], capture_output=True, text=True, check=False).stdout
        assert shown.startswith("dc1-a of gateway dc1: 1/1 tunnels, 0 sessions\n  tunnel r1:1 up\n")
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: "event=reloaded" in (tmp_path / "log").read_text(), "the reload")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert not made.status_socket.exists()
    finally:
        process.kill()
        process.wait()
        notify.close()
        log.close()


# -- the registry --------------------------------------------------------------------------------------


def test_a_protocol_has_one_interceptor(echo_interceptor) -> None:
    with pytest.raises(ValueError, match="two interceptors for echo"):
        registry([("echo", echo_interceptor), ("echo", echo_interceptor)])


def test_the_protocols_are_those_named_in_the_docs() -> None:
    assert set(PROTOCOLS) == {"http", "postgres", "ssh"}
