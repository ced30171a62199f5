"""Options of an account and its resource: what they permit, and that nonsense opens nothing."""

from __future__ import annotations

import base64

import paramiko
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pam_agent.protocols.base import Credential, TargetLoginError
from pam_agent.protocols.ssh import login
from pam_agent.protocols.ssh.codec import string
from pam_agent.protocols.ssh.hostkeys import MAX_CERTIFICATE, HostKeys
from pam_agent.protocols.ssh.login import MAX_PROMPTS, MAX_TRIES
from pam_agent.protocols.ssh.policy import MAX_ENTRIES, MAX_TRANSFER_BUDGET, Place, Policy
from pam_common.errors import PamError, ProtocolError

ED25519 = "ssh-ed25519 " + base64.b64encode(string(b"ssh-ed25519") + string(b"k" * 32)).decode()


def test_by_default_nothing_leads_into_the_network() -> None:
    policy = Policy.parse({})
    assert policy.rights == {"shell", "exec", "sftp"}
    assert not policy.may_forward("10.0.0.1", 80)
    assert not policy.may_bind("localhost", 8000)
    assert not policy.may_set("LANG")


@pytest.mark.parametrize(
    ("place", "host", "port", "allowed"),
    [
        ("10.0.0.0/8:443", "10.1.2.3", 443, True),
        ("10.0.0.0/8:443", "10.1.2.3", 444, False),
        ("10.0.0.0/8:443", "11.1.2.3", 443, False),
        ("10.0.0.0/8:443", "::ffff:10.1.2.3", 443, True),
        ("[fd00::/8]:*", "fd00::1", 1, True),
        ("[fd00::/8]:*", "fd00::1%eth0", 1, False),
        ("db.internal:1-9", "DB.internal.", 9, True),
        ("db.internal:1-9", "xdb.internal", 9, False),
        ("0.0.0.0/0:*", "127.0.0.1", 1, False),
        ("0.0.0.0/0:*", "169.254.169.254", 80, False),
        ("0.0.0.0/0:*", "::ffff:127.0.0.1", 80, False),
        ("127.0.0.1:*", "127.0.0.1", 80, True),
        ("localhost:*", "localhost", 80, True),
        ("127.0.0.0/8:*", "localhost", 80, False),
        ("127.0.0.0/8:*", "0177.0.0.1", 80, False),
        ("10.0.0.0/8:*", "10.1", 80, False),
    ],
)
def test_destinations(place, host, port, allowed) -> None:
    policy = Policy.parse({"allow": ["local-forward"], "forward_to": [place]})
    assert policy.may_forward(host, port) is allowed


@pytest.mark.parametrize(
    ("place", "address", "port", "allowed"),
    [
        ("127.0.0.1:8000-8100", "localhost", 8050, True),
        ("127.0.0.1:8000-8100", "127.0.0.1", 8101, False),
        ("127.0.0.1:8000-8100", "", 8050, False),
        ("127.0.0.1:8000-8100", "localhost", 0, False),
        ("127.0.0.1:*", "localhost", 0, True),
        ("127.0.0.1:*", "0.0.0.0", 80, False),
        ("0.0.0.0:*", "", 80, True),
        ("0.0.0.0/0:*", "*", 80, False),
    ],
)
def test_bound_addresses(place, address, port, allowed) -> None:
    policy = Policy.parse({"allow": ["remote-forward"], "remote_bind": [place]})
    assert policy.may_bind(address, port) is allowed


@pytest.mark.parametrize(
    "options",
    [
        {"allow": ["x11"]},
        {"allow": "shell"},
        {"allow": [1]},
        {"forward_to": ["10.0.0.0/8"]},
        {"forward_to": ["10.0.0.0/8:0"]},
        {"forward_to": ["10.0.0.0/8:9-1"]},
        {"forward_to": ["10.0.0.0/8:70000"]},
        {"forward_to": ["2130706433:80"]},
        {"forward_to": ["a b:80"]},
        {"forward_to": ["x:1"] * (MAX_ENTRIES + 1)},
        {"remote_bind": [":80"]},
        {"env": ["LANG", 5]},
        {"transfer_budget": -1},
        {"transfer_budget": MAX_TRANSFER_BUDGET + 1},
        {"transfer_budget": True},
    ],
)
def test_what_is_not_understood_opens_nothing(options) -> None:
    with pytest.raises(ProtocolError):
        Policy.parse(options)


@settings(deadline=None)
@given(st.text(max_size=40), st.text(max_size=40), st.integers(0, 70000))
def test_any_text_is_a_place_or_refused(text, host, port) -> None:
    try:
        place = Place.parse(text)
    except ProtocolError:
        return
    assert place.permits(host, port) in (True, False)


@pytest.mark.parametrize(
    "line", ["x", "ssh-ed25519", "ssh-ed25519 !!", "ssh-dss AAAAB3NzaC1kc3M=", "ssh-rsa AAAA"]
)
def test_a_host_key_that_cannot_be_checked_is_refused(line) -> None:
    with pytest.raises(ProtocolError):
        HostKeys.parse({"host_keys": [line]})


def test_a_pinned_key_is_compared_whole() -> None:
    keys = HostKeys.parse({"host_keys": [ED25519 + " a comment"]})
    assert keys.algorithms == ("ssh-ed25519",)
    blob = base64.b64decode(ED25519.split()[1])
    keys.check(blob, "h", 0)
    for other in (b"", blob[:-1], blob + b"x"):
        with pytest.raises(TargetLoginError, match="another host key"):
            keys.check(other, "h", 0)


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_abuse_1_nonsense_is_no_host_certificate(rest) -> None:
    keys = HostKeys.parse({"host_ca": [ED25519]})
    with pytest.raises(TargetLoginError):
        keys.check(string(b"ssh-ed25519-cert-v01@openssh.com") + rest, "h", 0)


def test_a_huge_certificate_is_not_parsed() -> None:
    keys = HostKeys.parse({"host_ca": [ED25519]})
    with pytest.raises(TargetLoginError, match="cannot be read"):
        keys.check(string(b"ssh-ed25519-cert-v01@openssh.com") + bytes(MAX_CERTIFICATE), "h", 0)


class FakeLeg:
    """A target that refuses everything and counts."""

    def __init__(self) -> None:
        self.tries: list[str] = []

    def is_active(self) -> bool:
        return True

    def is_authenticated(self) -> bool:
        return False

    def __getattr__(self, name: str):
        def refuse(*_words: object, **_options: object) -> None:
            self.tries.append(name)
            raise paramiko.AuthenticationException

        return refuse


def test_tries_and_questions_are_limited(monkeypatch) -> None:
    leg = FakeLeg()
    attempt = login._Login(leg, Credential("u", "p"))
    with pytest.raises(paramiko.SSHException, match="too many questions"):
        attempt._answer("", "", [("Password:", False)] * (MAX_PROMPTS + 1))
    monkeypatch.setattr(
        login._Login, "methods", lambda self, identity: [("password", leg.auth_password)] * (MAX_TRIES + 3)
    )
    opening = type("Opening", (), {"credential": Credential("u", "p"), "ssh": None})
    with pytest.raises(PamError):
        login.log_in(leg, opening)
    assert len(leg.tries) == MAX_TRIES
    assert leg.auth_timeout == login.ANSWER_SECONDS
