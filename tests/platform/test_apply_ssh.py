"""access.yml about SSH: what is told to the agent, what goes to the vault, what is refused."""

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from pam_common.errors import ConfigError
from pam_platform.access.apply.changes import SECRET
from pam_platform.access.apply.document import load
from pam_platform.access.ending import delete_resource
from pam_platform.access.hostkeys import MAX_LINE, fingerprint, public_line
from pam_platform.access.models import Account, Resource
from pam_platform.vault import store
from pam_platform.vault.models import VaultEntry


def line(key, comment=""):
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode() + comment


# Fixed: they are in the names of tests.
HOST = Ed25519PrivateKey.from_private_bytes(b"h" * 32)
USER = Ed25519PrivateKey.from_private_bytes(b"u" * 32)


def pem(key, passphrase=None):
    hidden = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, hidden)


KEY = pem(USER)


@pytest.fixture
def keys(access_file):
    """Files with private keys beside access.yml."""
    folder = access_file().parent
    for name, content in (
        ("key", KEY),
        ("locked", pem(USER, b"open sesame")),
        ("sesame", b"open sesame\n"),
        ("nonsense", b"-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n"),
    ):
        (folder / name).touch(mode=0o600)
        (folder / name).write_bytes(content)


def web(document, *, ssh=None, **account):
    """Adds the SSH resource web-01 with the account deploy."""
    document["resources"].append(
        {
            "name": "web-01",
            "protocol": "ssh",
            "gateway": "dc1",
            "host": "10.0.0.7",
            "port": 22,
            "ssh": {"host_keys": [line(HOST, " root@web-01")]} if ssh is None else ssh,
            "accounts": [{"name": "deploy", "private_key": {"file": "key"}, **account}],
        }
    )


def text(changes):
    return "\n".join(shown for change in changes for _, shown in change.lines())


def test_a_server_becomes_options_and_secrets(keys, apply):
    shown = text(apply(web))
    resource = Resource.objects.get(name="web-01")
    assert resource.options == {"host_keys": [line(HOST)], "host_ca": [], "legacy_algorithms": False}
    assert resource.tls_mode == "disable"
    account = resource.accounts.get()
    assert account.options == {
        "allow": ["exec", "sftp", "shell"],
        "env": [],
        "forward_to": [],
        "remote_bind": [],
        "transfer_budget": 0,
    }
    assert store.reveal(account.secrets.get(name="private_key").entry) == KEY.rstrip(b"\n")
    assert "private_key: set" in shown
    assert "options.allow: [exec, sftp, shell]" in shown
    assert apply(web) == []


def test_every_option_arrives(keys, apply):
    jump = {
        "host": "10.0.0.2",
        "user": "hop",
        "host_keys": [line(HOST)],
        "private_key": {"file": "key"},
        "password": {"file": "ro"},
    }
    may = {
        "allow": ["remote-forward", "exec", "local-forward"],
        "forward_to": ["10.0.0.0/8:443", "[fd00::/8]:*", "db.internal:8000-8100"],
        "remote_bind": ["127.0.0.1:8000-8100"],
        "env": ["LANG", "LC_*"],
        "transfer_budget": "64KiB",
    }
    more = {"private_key": {"file": "locked"}, "passphrase": {"file": "sesame"}, "password": {"file": "ro"}}

    def change(document):
        server = {"host_ca": [line(HOST)], "legacy_algorithms": True, "jump": jump}
        web(document, ssh=server, **more, certificate={"principals": ["deploy", "web"]})
        document["resources"][-1]["accounts"][0]["ssh"] = may

    apply(change)
    resource = Resource.objects.get(name="web-01")
    assert resource.options == {
        "host_keys": [],
        "host_ca": [line(HOST)],
        "legacy_algorithms": True,
        "jump": {"host": "10.0.0.2", "port": 22, "user": "hop", "host_keys": [line(HOST)]},
    }
    secrets = {row.name: store.reveal(row.entry) for row in resource.secrets.all()}
    assert secrets == {"jump_password": b"password-of-ro", "jump_private_key": KEY.rstrip(b"\n")}
    account = resource.accounts.get()
    assert account.options == {
        **may,
        "allow": sorted(may["allow"]),
        "transfer_budget": 65536,
        "certificate": {"principals": ["deploy", "web"]},
    }
    assert {row.name for row in account.secrets.all()} == {"private_key", "passphrase"}
    assert store.reveal(account.password) == b"password-of-ro"


def test_a_changed_or_dropped_secret_shows_that_and_not_what(keys, apply):
    apply(web)
    entry = Account.objects.get(name="deploy").secrets.get().entry
    locked = {"private_key": {"file": "locked"}, "passphrase": {"file": "sesame"}}
    shown = text(apply(lambda document: web(document, **locked)))
    assert "private_key: changed" in shown
    assert "passphrase: set" in shown
    entry.refresh_from_db()
    assert entry.version == 2

    def with_password(document):
        web(document, password={"file": "ro"})
        document["resources"][-1]["accounts"][0].pop("private_key")

    changes = apply(with_password)
    assert f"private_key: {SECRET} -> None" in text(changes)
    assert "sesame" not in text(changes)
    assert not VaultEntry.objects.filter(pk=entry.pk).exists()


def test_with_the_resource_its_secrets_go(keys, apply):
    apply()
    before = VaultEntry.objects.count()
    jump = {"host": "10.0.0.2", "user": "hop", "host_keys": [line(HOST)], "password": {"file": "ro"}}
    apply(lambda document: web(document, ssh={"host_ca": [line(HOST)], "jump": jump}))
    assert VaultEntry.objects.count() == before + 2
    delete_resource(Resource.objects.get(name="web-01"))
    assert VaultEntry.objects.count() == before


def test_scanned_keys_stay_with_their_place(keys, apply):
    apply(lambda document: web(document, ssh={}))
    Resource.objects.filter(name="web-01").update(scanned_keys=[line(HOST)])
    assert apply(lambda document: web(document, ssh={})) == []

    def moved(document):
        web(document, ssh={})
        document["resources"][-1]["port"] = 2222

    assert "scanned_keys: [ssh-ed25519" in text(apply(moved))
    assert Resource.objects.get(name="web-01").scanned_keys == []


@pytest.mark.parametrize(
    ("change", "needle"),
    [
        (
            lambda d: web(d, ssh={"host_keys": ["ssh-ed25519 AAAA"]}),
            "host_keys[0]: the public key is damaged",
        ),
        (lambda d: web(d, ssh={"host_keys": ["ssh-dss AAAA"]}), "ssh.host_keys[0]"),
        (lambda d: web(d, ssh={"host_keys": [line(HOST)] * 2}), "ssh.host_keys"),
        (lambda d: web(d, ssh={"host_keys": [line(HOST)], "host_ca": [line(HOST)]}), "not both"),
        (lambda d: web(d, ssh={"jump": {"host": "a", "user": "b", "password": {"file": "ro"}}}), "host_keys"),
        (
            lambda d: web(d, ssh={"jump": {"host": "a", "user": "b", "host_keys": [line(HOST)]}}),
            "ssh.jump: needs a password or a private_key",
        ),
        (lambda d: web(d, private_key={"file": "nonsense"}), "private_key: cannot be read"),
        (lambda d: web(d, private_key={"file": "locked"}), "private_key: it needs its passphrase"),
        (lambda d: web(d, passphrase={"file": "sesame"}), "a passphrase is given, but the key has none"),
        (
            lambda d: web(d, private_key={"file": "locked"}, passphrase={"file": "ro"}),
            "passphrase is another",
        ),
        (
            lambda d: web(d) or d["resources"][-1]["accounts"][0].pop("private_key"),
            "needs a password, a private_key or a certificate",
        ),
        (lambda d: web(d, databases=["app"]), "databases: has no meaning for the protocol ssh"),
        (lambda d: web(d) or d["resources"][-1].update(tls={"mode": "require"}), "tls: has no meaning"),
        (lambda d: d["resources"][0].update(ssh={}), "ssh: has no meaning for the protocol postgres"),
        (lambda d: d["resources"][0]["accounts"][0].update(passphrase={"file": "ro"}), "has no meaning"),
        (lambda d: web(d, certificate={"principals": []}), "principals"),
        (lambda d: web(d, certificate={"principals": ["a,b"]}), "principals[0]"),
    ],
)
def test_a_wrong_file_is_refused(keys, access_file, change, needle):
    with pytest.raises(ConfigError) as caught:
        load(access_file(change))
    told = "\n".join(caught.value.problems)
    assert needle in told
    assert "sesame" not in told


@pytest.mark.parametrize(
    ("may", "needle"),
    [
        ({"allow": []}, "ssh.allow"),
        ({"allow": ["agent-forward"]}, "ssh.allow[0]"),
        ({"allow": ["local-forward"]}, "forward_to: goes together with local-forward"),
        ({"forward_to": ["10.0.0.1:1"]}, "forward_to: goes together with local-forward"),
        ({"remote_bind": ["127.0.0.1:1"]}, "remote_bind: goes together with remote-forward"),
        ({"allow": ["local-forward"], "forward_to": ["10.0.0.1"]}, "forward_to[0]"),
        ({"allow": ["local-forward"], "forward_to": ["10.0.0.1/8:1"]}, "host bits"),
        ({"allow": ["local-forward"], "forward_to": ["10.0.0.1:0"]}, "ports within 1-65535"),
        ({"allow": ["local-forward"], "forward_to": ["10.0.0.1:9-8"]}, "the lower one first"),
        ({"env": ["A=B"]}, "ssh.env[0]"),
        ({"env": ["*"]}, "ssh.env[0]"),
        ({"transfer_budget": "17MiB"}, "transfer_budget: expected at most 16MiB"),
    ],
)
def test_what_an_account_may_do_is_checked(keys, access_file, may, needle):
    def change(document):
        web(document)
        document["resources"][-1]["accounts"][0]["ssh"] = may

    with pytest.raises(ConfigError) as caught:
        load(access_file(change))
    assert needle in "\n".join(caught.value.problems)


def test_what_was_read_does_not_show_its_secrets(keys, access_file):
    assert "BEGIN" not in repr(load(access_file(web)))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ssh-ed25519",
        "ssh-ed25519 !!!!",
        "ssh-dss AAAAB3NzaC1kc3MAAACBAA==",
        "ssh-rsa " + line(HOST).split()[1],
        line(HOST) + " " + "c" * MAX_LINE,
        "command=x " + line(HOST),
    ],
)
def test_what_is_no_host_key_is_refused(text):
    with pytest.raises(ValueError, match="public key"):
        public_line(text)


def test_a_fingerprint_is_that_of_openssh():
    known = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl"
    assert public_line(known + " github.com") == known
    assert fingerprint(known) == "SHA256:+DiY3wvvV6TuJJhbpZisF/zLDA0zPMSvHdkr4UvCOqU"
