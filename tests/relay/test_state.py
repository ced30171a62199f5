"""Enrolment, the cached bundle, and what a relay does with a platform that is away or lies."""

from __future__ import annotations

import shutil
import stat

import pytest

from pam_common.errors import AuthenticationError, PamError, RefusedError, UnavailableError
from pam_common.keys import SigningKey, new_session_id
from pam_relay.platform import BundlePoller, connect, enrol
from pam_relay.state import RelayState


@pytest.fixture
def enrolled(config, platform) -> RelayState:
    return enrol(config, "good", "r1", "0")


@pytest.fixture
def poller(config, enrolled):
    applied = []
    client = connect(config, enrolled.keys.identity, "r1", enrolled.issuer)
    poller = BundlePoller(client, enrolled, 1, applied.append)
    poller.applied = applied
    return poller


def test_enrolment_stores_keys_that_never_travel(config, platform, enrolled) -> None:
    sent = str(platform.enrolments)
    for name in ("identity.key", "host.key", "relay.json", "trust", "bundle"):
        path = config.state_dir / name
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert path.read_bytes().hex() not in sent
    assert stat.S_IMODE(config.state_dir.stat().st_mode) == 0o700
    loaded = RelayState.load(config.state_dir)
    assert (loaded.keys, loaded.relay, loaded.issuer) == (enrolled.keys, "r1", platform.url)
    assert (loaded.trust.token, loaded.bundle.token) == (enrolled.trust.token, enrolled.bundle.token)
    assert enrolled.keys.host_seed.hex() not in repr(enrolled)
    assert repr(enrolled.keys) == "RelayKeys()"


def test_a_lost_answer_is_repeated_with_the_same_keys(config, platform, enrolled) -> None:
    (config.state_dir / "relay.json").unlink()
    enrol(config, "good", "r1", "0")
    first, second = platform.enrolments
    assert first == second


def test_a_wrong_token_or_name_is_refused(config, platform) -> None:
    with pytest.raises(RefusedError, match="token"):
        enrol(config, "bad", "r1", "0")
    with pytest.raises(PamError, match="not a relay name"):
        enrol(config, "good", "../r1", "0")
    assert not (config.state_dir / "relay.json").exists()


def test_an_enrolled_folder_is_not_given_to_another_relay(config, enrolled) -> None:
    with pytest.raises(PamError, match="already belongs to relay r1"):
        enrol(config, "good", "r2", "0")


def test_what_is_not_enrolled_says_so(config) -> None:
    with pytest.raises(PamError, match="not enrolled"):
        RelayState.load(config.state_dir)


def test_a_new_bundle_is_applied_and_cached(config, platform, poller) -> None:
    session = new_session_id()
    platform.serial, platform.revoked_sessions = 2, [session]
    poller.poll()
    assert poller.applied[0].revoked_sessions == {session}
    assert RelayState.load(config.state_dir).bundle.serial == 2


def test_while_the_platform_is_away_the_last_bundle_stays(platform, poller, config) -> None:
    platform.down = True
    with pytest.raises(UnavailableError):
        poller.poll()
    assert poller.state.bundle.serial == 1
    assert RelayState.load(config.state_dir).bundle.serial == 1


def test_an_older_bundle_is_refused(platform, poller) -> None:
    platform.serial = 5
    poller.poll()
    platform.serial = 4
    with pytest.raises(AuthenticationError, match="older"):
        poller.poll()
    assert poller.state.bundle.serial == 5


def test_a_bundle_signed_by_another_key_is_refused(platform, poller) -> None:
    platform.key = SigningKey.generate()
    with pytest.raises(AuthenticationError):
        poller.poll()
    assert not poller.applied


def test_the_platforms_key_can_be_rotated_in_two_steps(platform, poller) -> None:
    old, new = platform.key, SigningKey.generate()
    platform.trust_keys = [old, new]
    poller.poll()
    platform.key, platform.trust_keys, platform.serial = new, [new], 2
    poller.poll()
    assert poller.state.bundle.serial == 2
    platform.key, platform.trust_keys = old, [old]
    with pytest.raises(AuthenticationError):
        poller.poll()


@pytest.mark.parametrize(
    "changes",
    [
        {"serial": "2"},
        {"serial": True},
        {"serial": -1},
        {"gateways": "dc1"},
        {"gateways": ["DC1"]},
        {"gateways": [1]},
        {"revoked_sessions": ["../x"]},
        {"revoked_agents": [None]},
        {"relay_user_ca": [{"kid": "0" * 16, "key": "AA"}]},
        {"host_certificate": "ssh-ed25519 AAAA"},
        {"host_certificate": None},
        {"aud": "relay:r2"},
        {"iss": "https://other.example.com"},
    ],
)
def test_a_bundle_that_is_not_what_it_must_be_changes_nothing(platform, poller, changes) -> None:
    answer = {"trust": poller.state.trust.token, "bundle": platform.bundle_token(**changes)}
    platform.bundle = lambda _authorization: (200, answer)
    with pytest.raises(AuthenticationError):
        poller.poll()
    assert not poller.applied
    assert poller.state.bundle.serial == 1


def test_a_damaged_cache_is_refused_at_start(config, enrolled) -> None:
    bundle = config.state_dir / "bundle"
    token = bundle.read_bytes()
    bundle.write_bytes(token[:-8] + b"AAAAAAAA")
    with pytest.raises(AuthenticationError):
        RelayState.load(config.state_dir)
    bundle.write_bytes(token)
    shutil.copy(config.state_dir / "identity.key", config.state_dir / "host.key")
    with pytest.raises(PamError, match="damaged"):
        RelayState.load(config.state_dir)


def test_a_key_others_may_read_is_refused(config, enrolled) -> None:
    (config.state_dir / "host.key").chmod(0o644)
    with pytest.raises(PamError, match="may be read by others"):
        RelayState.load(config.state_dir)
