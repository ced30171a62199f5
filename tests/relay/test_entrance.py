"""The relay's public port: its own, or one that systemd keeps for it."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from typing import Any

import pytest

from pam_common import fast_ssh
from pam_common.errors import ConfigError
from pam_relay import config as relay_config
from pam_relay.platform import enrol
from pam_relay.service import Service


@pytest.fixture
def passed() -> Any:
    """A listening socket of somebody else's."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


@pytest.fixture
def enrolled(config: Any, platform: Any) -> Any:
    """The configuration of an enrolled relay whose port is systemd's."""
    enrol(config, "good", "r1", "0")
    text = config.path.read_text()
    config.path.write_text(
        "".join(f"{line}\n" for line in text.splitlines() if not line.startswith("listen"))
    )
    with config.path.open("a") as file:
        file.write("listen: systemd\n")
    return relay_config.load(config.path)


def start(config: Any, listener: socket.socket, log: Any) -> subprocess.Popen[bytes]:
    """The relay as systemd starts it, with the socket as descriptor 3."""
    script = f'exec 3<&{listener.fileno()}; export LISTEN_FDS=1 LISTEN_PID=$$; exec "$@"'
    words = [sys.executable, "-m", "pam_relay", "--config", str(config.path), "run"]
    return subprocess.Popen(["bash", "-c", script, "bash", *words], pass_fds=[listener.fileno()], stderr=log)


def test_systemds_socket_outlives_the_relay(enrolled, world, passed, until_up, wait_for, tmp_path) -> None:
    world.address = passed.getsockname()
    with (tmp_path / "log").open("wb") as log:
        process = start(enrolled, passed, log)
        try:
            until_up(process)
            world.agent()
            stream = fast_ssh.open_direct(world.client(), "dc1")
            stream.sendall(b"hello")
            assert stream.recv(100) == b"hello"

            # While it drains, a newcomer is sent away at once instead of waiting for the next relay.
            process.send_signal(signal.SIGTERM)
            wait_for(lambda: b"draining" in (tmp_path / "log").read_bytes())
            with socket.create_connection(world.address, timeout=60) as newcomer:
                assert newcomer.recv(100) == b""
            stream.sendall(b"still here")
            assert stream.recv(100) == b"still here"
            stream.close()
            assert process.wait(60) == 0
        finally:
            process.kill()
            process.wait(60)

        # Nobody listens now, but the port is open: who comes waits for the next relay.
        with socket.create_connection(world.address, timeout=60) as waiting:
            again = start(enrolled, passed, log)
            try:
                waiting.settimeout(120)
                assert waiting.recv(4) == b"SSH-"
            finally:
                again.terminate()
                again.wait(60)


def test_the_port_is_opened_as_configured_or_not_at_all(enrolled, passed, monkeypatch) -> None:
    monkeypatch.setattr("pam_relay.service.passed_sockets", lambda: [])
    with pytest.raises(ConfigError, match="passes no socket"):
        Service(enrolled)._listen()
    text = enrolled.path.read_text().replace("listen: systemd", "listen: 127.0.0.1:0")
    enrolled.path.write_text(text)
    monkeypatch.setattr("pam_relay.service.passed_sockets", lambda: [passed])
    with pytest.raises(ConfigError, match="systemd passes a socket"):
        Service(relay_config.load(enrolled.path))._listen()


def test_a_reload_takes_on_what_it_can_and_refuses_the_rest(config, platform) -> None:
    enrol(config, "good", "r1", "0")
    service = Service(config)
    text = config.path.read_text()
    config.path.write_text(text.replace("poll_interval: 1s", "poll_interval: 7s\nlimits: {channels: 3}"))
    service.reload()
    assert (service.poller.interval, service.server.limits.channels) == (7, 3)
    for line, word in (("drain_timeout: nonsense", "drain_timeout"), ("metrics: 127.0.0.1:9", "restart")):
        config.path.write_text(
            f"{text}{line}\n" if "metrics" in line else text.replace("drain_timeout: 60s", line)
        )
        with pytest.raises(ConfigError, match=word):
            service.reload()
    assert (service.poller.interval, service.server.limits.channels) == (7, 3)
