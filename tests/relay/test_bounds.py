"""The relay's bounds that no other test goes past."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from patience import Metronome

from pam_common import fast_ssh, tokens
from pam_common.errors import AuthenticationError, PamError, ProtocolError, RefusedError, UnavailableError
from pam_common.keys import VerifyKeys
from pam_common.ssh_certs import CERT_TYPE
from pam_relay import admission, bundle, service
from pam_relay.admission import AUTH_FAILED, AUTH_SUCCESSFUL, MAX_ATTEMPTS, Admission
from pam_relay.config import Limits
from pam_relay.entrance import Entrance
from pam_relay.platform import MAX_WAIT, BundlePoller, connect, enrol
from pam_relay.server import LOGIN_SHARE, OPEN_TRIES
from pam_relay.service import Service


@pytest.fixture
def enrolled(config: Any, platform: Any) -> Any:
    return enrol(config, "good", "r1", "0")


# -- connections and channels --------------------------------------------------------------------------


def test_after_so_many_attempts_a_good_key_does_not_help(world: Any) -> None:
    good = world.login("serve:dc1", "dc1-x")
    now = time.time
    _, certificate = admission.admit(good.asbytes(), world.bundle(), now=now(), source_address="127.0.0.1")

    def offer(blob: bytes) -> Any:
        named = SimpleNamespace(key_blob=blob, key_type=CERT_TYPE)
        return SimpleNamespace(public_blob=named, asbytes=lambda: certificate.public_key)

    for wrong, answer in ((MAX_ATTEMPTS - 1, AUTH_SUCCESSFUL), (MAX_ATTEMPTS, AUTH_FAILED)):
        door = Admission(world.bundle, now, "127.0.0.1", requests=None)  # type: ignore[arg-type]
        for _ in range(wrong):
            assert door.check_auth_publickey("pam", offer(b"none")) == AUTH_FAILED
        assert door.check_auth_publickey("pam", offer(good.asbytes())) == answer


def test_a_channel_tries_a_few_tunnels_only(
    relay: Any, wait_for: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pam_relay.server.OPEN_TIMEOUT", 0.2)
    tried: list[str] = []
    for number in range(OPEN_TRIES + 2):
        agent = relay.agent(f"dc1-{'abcdefgh'[number]}")
        agent.transport._handler_table[90] = lambda _message, number=number: tried.append(str(number))
    with pytest.raises((RefusedError, PamError)):
        fast_ssh.open_direct(relay.client(), "dc1")
    wait_for(lambda: len(tried) >= OPEN_TRIES)  # the last may be told late
    assert len(tried) == OPEN_TRIES


def test_more_connections_than_the_kernels_queue_holds_wait(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pam_relay.entrance.BACKLOG", 1)
    monkeypatch.setattr(Entrance, "_accept", lambda _self: None)  # as if it were slow
    world.start()
    held: list[socket.socket] = []

    def connect_all() -> None:
        for _ in range(5):
            held.append(socket.create_connection(world.address, timeout=0.3))

    with pytest.raises(TimeoutError):
        connect_all()
    for sock in held:
        sock.close()


# -- the platform --------------------------------------------------------------------------------------


def test_a_bundle_that_is_too_large_changes_nothing(platform: Any, enrolled: Any, config: Any) -> None:
    client = connect(config, enrolled.keys.identity, "r1", enrolled.issuer)
    poller = BundlePoller(client, enrolled, 1, lambda _bundle: None)
    answer = {"trust": poller.state.trust.token, "bundle": "x" * (bundle.MAX_BUNDLE + 1)}
    platform.bundle = lambda _authorization: (200, answer)
    with pytest.raises((AuthenticationError, ProtocolError)):
        poller.poll()
    assert poller.state.bundle.serial == 1


def test_a_bundle_of_too_many_names_changes_nothing(
    platform: Any, enrolled: Any, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "MAX_NAMES", 3)
    client = connect(config, enrolled.keys.identity, "r1", enrolled.issuer)
    poller = BundlePoller(client, enrolled, 1, lambda _bundle: None)
    platform.serial, platform.revoked_agents = 2, ["a", "b", "c"]
    poller.poll()
    platform.serial, platform.revoked_agents = 3, ["a", "b", "c", "d"]
    with pytest.raises(AuthenticationError, match="revoked agents"):
        poller.poll()
    assert poller.state.bundle.serial == 2


def test_a_requests_token_is_useless_when_found_later(platform: Any, enrolled: Any, config: Any) -> None:
    sent: list[str] = []
    answer = platform.bundle
    platform.bundle = lambda authorization: sent.append(authorization) or answer(authorization)
    client = connect(config, enrolled.keys.identity, "r1", enrolled.issuer)
    BundlePoller(client, enrolled, 1, lambda _bundle: None).poll()
    token = sent[0].removeprefix("Bearer ")

    def verify(later: float) -> object:
        keys = VerifyKeys.of(enrolled.keys.identity.public)
        return tokens.verify(
            token, keys, tokens.RELAY_REQUEST, issuer="r1", audience=platform.url, now=time.time() + later
        )

    assert verify(0)
    with pytest.raises(AuthenticationError, match="expired"):
        verify(61)


def test_the_wait_between_polls_grows_to_its_cap(enrolled: Any) -> None:
    poller = BundlePoller(SimpleNamespace(), enrolled, 10, lambda _bundle: None)  # type: ignore[arg-type]
    waits: list[float] = []

    class Wake:
        """What the thread waits on between polls; ends it after some."""

        def wait(self, seconds: float) -> None:
            waits.append(seconds)
            if len(waits) == 10:
                raise SystemExit

        def clear(self) -> None:
            """Nobody set it."""

    poller._wake = Wake()  # type: ignore[assignment]
    poller._attempt = lambda: UnavailableError("away")  # type: ignore[method-assign]
    with pytest.raises(SystemExit):
        poller._run()
    assert waits[0] == 20
    assert max(waits) == MAX_WAIT == waits[-1]


def test_a_loop_that_hangs_is_a_reason_to_be_restarted() -> None:
    now = time.monotonic()
    for poll, clock, healthy in (
        (service.POLL_STUCK - 5, service.CLOCK_STUCK - 5, True),
        (service.POLL_STUCK + 1, 0, False),
        (0, service.CLOCK_STUCK + 1, False),
    ):
        running = SimpleNamespace(
            poller=SimpleNamespace(beat=now - poll), server=SimpleNamespace(beat=now - clock)
        )
        assert Service._healthy(running) is healthy  # type: ignore[arg-type]


def test_a_token_file_that_is_too_large_is_refused(config: Any, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text("x" * 4097)
    words = ["--config", str(config.path), "enrol", "--token-file", str(token), "--name", "r1"]
    done = subprocess.run(
        [sys.executable, "-m", "pam_relay", *words], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "larger than 4096" in done.stderr


def test_who_comes_when_many_log_in_waits_its_turn(world: Any, wait_for: Any) -> None:
    """Silent peers hold all places: an honest login waits for the oldest to have had its time, no longer."""
    limits = Limits(unauthenticated=3, unauthenticated_per_address=50, login_timeout=60)
    world.start(limits)
    with Metronome() as beat:
        began = time.monotonic()
        silent = [socket.create_connection(world.address) for _ in range(3)]
        wait_for(lambda: world.relay.status()["unauthenticated"] == 3)
        client = world.client()
        seconds = time.monotonic() - began
        assert seconds > LOGIN_SHARE * 0.5
        assert seconds - beat.lost() < 10 + LOGIN_SHARE
    assert client.is_active()
    wait_for(lambda: world.relay.status()["unauthenticated"] == 2)
    for sock in silent:
        sock.close()


def test_more_logins_at_once_than_there_are_places_all_succeed(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a restart: each newcomer used to push out the oldest, and hardly anybody got through."""
    monkeypatch.setattr("pam_relay.server.LOGIN_SHARE", 60.0)  # many times what a login needs, here as well
    monkeypatch.setattr("pam_common.fast_ssh.transport.HANDSHAKE_TIMEOUT", 120.0)
    world.start(Limits(unauthenticated=5, unauthenticated_per_address=50, login_timeout=120))
    with ThreadPoolExecutor(40) as pool:
        clients = list(pool.map(lambda _: world.client(), range(80)))
    assert all(client.is_active() for client in clients)
