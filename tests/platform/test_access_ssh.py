"""SSH sessions: no host key no session, and the certificates an agent gets for its keys."""

import json
import time

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_identity
from nacl.public import PrivateKey, SealedBox

from pam_common.keys import SigningKey, b64decode, b64encode
from pam_common.ssh_certs import verify_host_certificate, verify_user_certificate
from pam_platform.access.models import Resource
from pam_platform.vault import keys

HOST = Ed25519PrivateKey.from_private_bytes(b"h" * 32).public_key()
HOST_LINE = HOST.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


@pytest.fixture
def change_access(fleet, apply):
    """Applies access.yml with web-01 in it: ``change_access(ssh={…}, **account)``."""

    def do(ssh=None, **account):
        def change(document):
            document["resources"].append(
                {
                    "name": "web-01",
                    "protocol": "ssh",
                    "gateway": "dc1",
                    "host": "10.0.0.7",
                    "port": 22,
                    "ssh": {"host_keys": [HOST_LINE]} if ssh is None else ssh,
                    "accounts": [{"name": "deploy", "password": {"file": "ro"}, **account}],
                }
            )
            document["policies"][0]["accounts"].append("web-01/*")

        return apply(change)

    return do


@pytest.fixture
def alice(fleet, person):
    return person("alice")


def connect(alice):
    response = alice.connect("web-01", "deploy")
    assert response.status_code == 200, response.content
    return response.json()


class AgentKeys:
    def __init__(self):
        self.host, self.user = SigningKey.generate(), SigningKey.generate()

    def body(self):
        return {"ssh_keys": {"host": b64encode(self.host.public), "user": b64encode(self.user.public)}}


def opened(fleet, session, sent=None):
    sent = sent or AgentKeys()
    response = fleet["dc1-a"].call("POST", f"/agent/sessions/{session}/open", sent.body())
    assert response.status_code == 200, response.content
    return response.json()


def test_nobody_gets_in_before_a_host_key_is_known(alice, change_access, audit_trail):
    change_access(ssh={})
    response = alice.connect("web-01", "deploy")
    assert response.status_code == 409
    assert "no host key of web-01 is known" in response.json()["detail"]
    assert "pam-platform resource scan web-01" in response.json()["hint"]
    assert audit_trail()[-1][3] == "refused"
    Resource.objects.filter(name="web-01").update(scanned_keys=[HOST_LINE])
    connect(alice)


def test_who_may_not_use_it_is_not_told_about_its_keys(change_access, person):
    change_access(ssh={})
    assert person("bob").connect("web-01", "deploy").status_code == 403


def test_a_host_key_that_is_withdrawn_meanwhile_opens_nothing(alice, change_access, fleet):
    change_access(ssh={})
    Resource.objects.filter(name="web-01").update(scanned_keys=[HOST_LINE])
    session = connect(alice)["session"]
    Resource.objects.filter(name="web-01").update(scanned_keys=[])
    path = f"/agent/sessions/{session}/open"
    assert fleet["dc1-a"].call("POST", path, AgentKeys().body()).status_code == 409


def test_connect_says_who_vouches_for_the_gateways_servers(alice, change_access):
    change_access()
    answer = connect(alice)
    assert answer["interceptor_host_ca"] == keys.public_entries(keys.INTERCEPTOR_HOST_CA)
    assert answer["protocol"] == "ssh"
    assert answer["hints"] == {"port": 22, "database": None, "user": "deploy"}


def test_the_agents_host_key_is_certified_as_the_gateway_for_this_session(alice, change_access, fleet):
    change_access()
    session, sent = connect(alice), AgentKeys()
    answer = opened(fleet, session["session"], sent)
    assert answer["ssh"]["user_certificate"] is None
    verified = verify_host_certificate(
        answer["ssh"]["host_certificate"],
        keys.verify_keys(keys.INTERCEPTOR_HOST_CA),
        hostname="dc1.pam",
        now=time.time(),
    )
    assert verified.public_key == sent.host.public
    assert (verified.key_id, verified.principals) == (session["session"], ("dc1.pam",))
    assert verified.valid_before == session["session_end"]


def test_the_agents_user_key_is_certified_for_the_principals(alice, change_access, fleet):
    change_access(certificate={"principals": ["deploy", "web"]})
    session, sent = connect(alice), AgentKeys()
    line = opened(fleet, session["session"], sent)["ssh"]["user_certificate"]
    verified = verify_user_certificate(
        line, keys.verify_keys(keys.target_user_ca("dc1")), now=time.time(), principal="deploy"
    )
    assert verified.public_key == sent.user.public
    assert verified.key_id == f"alice/{session['session']}"
    assert verified.principals == ("deploy", "web")
    assert verified.valid_before == session["session_end"]
    parsed = load_ssh_public_identity(line.encode())
    assert set(parsed.extensions) == {b"permit-pty", b"permit-user-rc"}
    assert parsed.critical_options == {}


def test_each_gateway_has_a_ca_of_its_own(fleet):
    assert keys.public_entries(keys.target_user_ca("dc1")) != keys.public_entries(keys.target_user_ca("dc2"))


@pytest.mark.parametrize(
    ("allow", "extensions"),
    [
        (["sftp"], {b"permit-user-rc"}),
        (["exec", "local-forward"], {b"permit-user-rc", b"permit-pty", b"permit-port-forwarding"}),
    ],
)
def test_a_certificate_grants_no_more_than_the_account(alice, change_access, fleet, allow, extensions):
    may = {"allow": allow, **({"forward_to": ["10.0.0.1:1"]} if "local-forward" in allow else {})}
    change_access(certificate={"principals": ["deploy"]}, ssh=None)
    Resource.objects.get(name="web-01").accounts.update(
        options={**may, "certificate": {"principals": ["deploy"]}}
    )
    line = opened(fleet, connect(alice)["session"])["ssh"]["user_certificate"]
    assert set(load_ssh_public_identity(line.encode()).extensions) == extensions


def test_a_certificate_is_valid_for_a_day_at_most(alice, change_access, fleet, apply):
    from pam_platform.access.models import Policy

    change_access(certificate={"principals": ["deploy"]})
    Policy.objects.update(max_duration=7 * 86400)
    line = opened(fleet, connect(alice)["session"])["ssh"]["user_certificate"]
    assert load_ssh_public_identity(line.encode()).valid_before <= time.time() + 86400


def test_the_opening_carries_options_and_sealed_secrets(alice, change_access, fleet):
    jump = {"host": "10.0.0.2", "user": "hop", "host_keys": [HOST_LINE], "password": {"file": "rw"}}
    change_access(ssh={"jump": jump})
    Resource.objects.filter(name="web-01").update(scanned_keys=[HOST_LINE])
    answer = opened(fleet, connect(alice)["session"])
    options = answer["target"]["options"]
    assert options["host_keys"] == [HOST_LINE]
    assert options["jump"] == {"host": "10.0.0.2", "port": 22, "user": "hop", "host_keys": [HOST_LINE]}
    assert options["account"]["allow"] == ["exec", "sftp", "shell"]
    assert "password-of" not in json.dumps(answer)
    box = SealedBox(PrivateKey(fleet["dc1-a"].sealing)).decrypt(b64decode(answer["credential"]))
    secret = json.loads(box)
    assert secret["password"] == "password-of-ro"
    assert secret["secrets"] == {"jump_password": "password-of-rw"}


def test_keys_belong_to_ssh_sessions_and_only_to_them(alice, change_access, fleet, audit_trail):
    change_access()
    session = connect(alice)["session"]
    answer = fleet["dc1-a"].call("POST", f"/agent/sessions/{session}/open")
    assert answer.status_code == 403
    assert "sent no SSH keys" in answer.json()["detail"]
    other = alice.connect("prod-db", "readonly").json()["session"]
    answer = fleet["dc1-a"].call("POST", f"/agent/sessions/{other}/open", AgentKeys().body())
    assert answer.status_code == 403
    assert audit_trail()[-1][3] == "refused"
    # Neither attempt has bound the session to the agent.
    opened(fleet, session)


@pytest.mark.parametrize("sent", [{}, {"host": "A" * 43}, {"host": "A" * 42, "user": "A" * 43}])
def test_what_is_no_pair_of_keys_is_refused(alice, change_access, fleet, sent):
    change_access()
    path = f"/agent/sessions/{connect(alice)['session']}/open"
    assert fleet["dc1-a"].call("POST", path, {"ssh_keys": sent}).status_code == 422
