"""The state folder: what is stored, what a renewal may change, what is refused when loading."""

from __future__ import annotations

import json
import stat
import time

import pytest

from pam_agent import enrolment
from pam_agent.state import AgentState, parse_relays
from pam_common.errors import AuthenticationError, PamError, ProtocolError, RefusedError
from pam_common.keys import SigningKey


@pytest.fixture
def state(enrolled) -> AgentState:
    return AgentState.load(enrolled().state_dir)


def renewal(platform, **changes):
    return {**platform._renewal("dc1-a"), **changes}


def test_enrolment_leaves_private_files_only(enrolled) -> None:
    folder = enrolled().state_dir
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "identity.key",
        "noise.key",
        "sealing.key",
        "agent.json",
        "trust.json",
        "statement",
        "certificate",
    }


def test_what_was_enrolled_is_loaded(state, platform) -> None:
    standing = state.standing
    assert (standing.agent, standing.gateway, standing.issuer) == ("dc1-a", "dc1", platform.issuer)
    assert standing.certificate_expires > time.time() + 80000
    assert platform.recipient["kid"] in standing.trust.recording_keys
    assert "Key(" not in repr(state.keys)
    assert repr(state.keys.noise) not in repr(state.keys)


def test_enrolling_again_changes_nothing(settings, platform) -> None:
    made = settings()
    first = enrolment.enrol(made, "enrol-me", "dc1-a", "test")
    again = enrolment.enrol(made, "another token", "dc1-a", "test")
    assert (again.agent, again.certificate) == (first.agent, first.certificate)
    assert again.trust.token == first.trust.token
    with pytest.raises(PamError, match="already belongs to agent dc1-a"):
        enrolment.enrol(made, "enrol-me", "dc1-b", "test")


def test_a_lost_answer_is_repeated_with_the_same_keys(settings, platform) -> None:
    made = settings()
    enrolment.enrol(made, "enrol-me", "dc1-a", "test")
    keys = {name: (made.state_dir / name).read_bytes() for name in ("identity.key", "noise.key")}
    (made.state_dir / "agent.json").unlink()
    enrolment.enrol(made, "enrol-me", "dc1-a", "test")
    assert keys == {name: (made.state_dir / name).read_bytes() for name in keys}


def test_a_wrong_token_enrols_nobody(settings) -> None:
    made = settings()
    with pytest.raises(RefusedError, match="not valid"):
        enrolment.enrol(made, "wrong", "dc1-a", "test")
    with pytest.raises(PamError, match="not enrolled"):
        AgentState.load(made.state_dir)


@pytest.mark.parametrize("name", ["", "../x", "Dc1", "a" * 64, "a b"])
def test_a_name_is_a_label(settings, name) -> None:
    with pytest.raises(PamError, match="not an agent name"):
        enrolment.enrol(settings(), "enrol-me", name, "test")


# -- loading -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["identity.key", "noise.key", "sealing.key", "agent.json", "trust.json", "statement", "certificate"],
)
def test_a_missing_or_damaged_file_is_named(enrolled, name) -> None:
    folder = enrolled().state_dir
    path = folder / name
    whole = path.read_bytes()
    path.write_bytes(b"damaged")
    with pytest.raises(PamError):
        AgentState.load(folder)
    path.write_bytes(whole)
    path.chmod(0o640)
    with pytest.raises(PamError, match=f"{name} may be read by others"):
        AgentState.load(folder)
    path.unlink()
    with pytest.raises(PamError, match=f"not enrolled.*{name}"):
        AgentState.load(folder)


def test_keys_that_are_not_those_of_the_statement_are_refused(enrolled) -> None:
    folder = enrolled().state_dir
    (folder / "noise.key").write_bytes(bytes(range(32)))
    with pytest.raises(AuthenticationError, match="other keys"):
        AgentState.load(folder)


def test_an_expired_standing_still_loads_so_that_it_can_be_renewed(enrolled, platform, monkeypatch) -> None:
    folder = enrolled().state_dir
    now = time.time() + 10 * 86400
    monkeypatch.setattr(time, "time", lambda: now)
    AgentState.load(folder)


# -- renewal -------------------------------------------------------------------------------------------


def test_a_renewal_is_stored(state, platform) -> None:
    platform.relays.append({"name": "r9", "host": "relay.example.com", "port": 2222})
    assert state.renew(renewal(platform), time.time())
    assert AgentState.load(state.folder).standing.relays[-1].name == "r9"


def test_a_rotated_grant_key_is_taken_when_the_old_list_knows_it(state, platform) -> None:
    new = SigningKey.generate()
    platform.grant_key, platform.next_grant_key = platform.next_grant_key, new
    state.renew(renewal(platform), time.time())
    platform.grant_key, platform.next_grant_key = new, SigningKey.generate()
    state.renew(renewal(platform), time.time())
    assert new.kid in {entry.kid for entry in state.standing.trust.grant_keys.entries}


def refused(state, answer, match, now=None) -> None:
    before = {path.name: path.read_bytes() for path in state.folder.iterdir()}
    standing = state.standing
    with pytest.raises((AuthenticationError, ProtocolError), match=match):
        state.renew(answer, time.time() if now is None else now)
    assert state.standing is standing
    assert before == {path.name: path.read_bytes() for path in state.folder.iterdir()}


def test_a_trust_list_signed_by_a_key_that_only_it_knows_is_refused(state, platform) -> None:
    stranger = SigningKey.generate()
    platform.grant_key = stranger
    refused(state, renewal(platform), "not trusted")


def test_an_older_trust_list_is_refused(state, platform) -> None:
    old = json.loads((state.folder / "trust.json").read_text())["token"]
    state.renew(renewal(platform), time.time())
    newer = state.standing.trust
    object.__setattr__(newer, "issued", newer.issued + 10)
    refused(state, renewal(platform, trust=old), "older")


def test_an_expired_trust_list_is_refused(state, platform) -> None:
    refused(state, renewal(platform), "expired", now=time.time() + 31 * 86400)


def test_what_is_signed_for_someone_else_is_refused(state, platform) -> None:
    identity = SigningKey.generate()
    platform.agents["dc1-b"] = {**platform.agents["dc1-a"], "identity_key": _public(identity)}
    other = platform._renewal("dc1-b")
    refused(state, renewal(platform, certificate=other["certificate"]), "another agent")
    refused(state, renewal(platform, statement=other["statement"]), "another agent")


def test_another_gateway_is_refused(state, platform) -> None:
    refused(state, renewal(platform, gateway="dc2"), "moved this agent")


@pytest.mark.parametrize("name", ["trust", "statement", "certificate", "relays"])
def test_an_incomplete_answer_changes_nothing(state, platform, name) -> None:
    refused(state, renewal(platform, **{name: None}), name)


def test_a_token_of_another_kind_is_no_trust_list(state, platform) -> None:
    answer = renewal(platform)
    refused(state, {**answer, "trust": answer["statement"]}, "another kind")


@pytest.mark.parametrize(
    "value",
    [
        None,
        [1],
        [{"name": "r1", "host": "h"}],
        [{"name": "r1", "host": "h", "port": 0}],
        [{"name": "r1", "host": "h\n", "port": 1}],
        [{"name": "", "host": "h", "port": 1}],
        [{"name": "r1", "host": "h", "port": 1}] * 2,
        [{"name": f"r{n}", "host": "h", "port": 1} for n in range(65)],
    ],
)
def test_what_is_no_list_of_relays(value) -> None:
    with pytest.raises(ProtocolError):
        parse_relays(value)


def _public(key: SigningKey) -> str:
    from pam_common.keys import b64encode

    return b64encode(key.public)
