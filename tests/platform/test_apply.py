"""access.yml into the database: declarative, repeatable, all or nothing, and without showing a secret."""

import json

import pytest
from django.contrib.auth.hashers import MD5PasswordHasher
from django.db import connection

from pam_common.errors import ConfigError, RefusedError
from pam_platform.access.apply import run
from pam_platform.access.apply.changes import SECRET, Change
from pam_platform.access.apply.document import load
from pam_platform.access.models import Account, Policy, Resource
from pam_platform.accounts.models import Group, User
from pam_platform.audit.models import AuditEvent
from pam_platform.fleet.models import Agent, Gateway, Relay
from pam_platform.vault import store
from pam_platform.vault.models import PlatformKey, VaultEntry


def summary(changes):
    return [f"{change.action} {change.kind} {change.name}" for change in changes]


def text(changes):
    return "\n".join(line for change in changes for _, line in change.lines())


def test_an_empty_platform_becomes_what_the_file_says(apply):
    changes = apply()
    assert {change.action for change in changes} == {"add"}
    assert Resource.objects.get(name="prod-db").tls_mode == "require"
    account = Account.objects.get(resource__name="prod-db", name="readonly")
    assert (account.user, account.databases) == ("app_ro", ["app", "stats"])
    assert store.reveal(account.password) == b"password-of-ro"
    policy = Policy.objects.get()
    assert (policy.max_duration, policy.idle_limit, policy.review_groups) == (28800, 1800, ["audit"])


@pytest.mark.parametrize(("written", "kept"), [(None, 3600), ("none", 0), ("2h", 7200), ("9h", 28800)])
def test_a_session_is_not_idle_forever_unless_the_policy_says_so(apply, written, kept):
    def change(document):
        policy = document["policies"][0]
        policy.pop("idle_limit")
        policy |= {"idle_limit": written} if written else {}

    apply(change)
    assert Policy.objects.get().idle_limit == kept
    assert User.objects.get(username="alice").group_names() == {"dba"}
    assert User.objects.get(username="root").is_admin
    assert PlatformKey.objects.filter(purpose="target-user-ca:dc1").exists()


def test_applying_again_changes_nothing(apply):
    apply()
    entries = list(VaultEntry.objects.values_list("pk", "version", "ciphertext"))
    events = AuditEvent.objects.count()
    assert apply() == []
    assert list(VaultEntry.objects.values_list("pk", "version", "ciphertext")) == entries
    assert AuditEvent.objects.count() == events


def test_a_dry_run_says_the_same_and_does_nothing(apply):
    assert summary(apply(dry_run=True)) == summary(apply(dry_run=True))
    assert not User.objects.exists()
    assert not VaultEntry.objects.filter(pk__in=Account.objects.values("password")).exists()
    assert not AuditEvent.objects.exists()


def test_a_change_shows_what_it_was_and_becomes(apply):
    apply()

    def change(file):
        file["resources"][0]["port"] = 5433
        file["policies"][0]["max_duration"] = "1h"
        file["users"][1]["groups"] = ["dba"]

    shown = text(apply(change))
    assert "~ resource prod-db\n    port: 5432 -> 5433" in shown
    assert "max_duration: 28800 -> 3600" in shown
    assert "~ user bob\n    groups: [] -> [dba]" in shown
    assert User.objects.get(username="bob").group_names() == {"dba"}


def test_a_changed_secret_shows_that_and_not_what(apply, access_file):
    apply()
    secret = access_file().parent / "ro"
    secret.write_text("brand-new-secret\n")
    changes = apply()
    assert "~ account prod-db/readonly\n    password: changed" in text(changes)
    everything = text(changes) + json.dumps([change.to_json() for change in changes])
    everything += str(list(AuditEvent.objects.values()))
    assert "secret" not in everything.replace(SECRET, "")
    assert "password-of" not in everything
    assert store.reveal(Account.objects.get(resource__name="prod-db", name="readonly").password) == (
        b"brand-new-secret"
    )


def test_a_secret_that_is_left_out_is_forgotten(apply):
    apply()
    before = VaultEntry.objects.count()
    apply(lambda file: file["resources"][0]["accounts"][0].pop("password"))
    assert Account.objects.get(resource__name="prod-db", name="readonly").password is None
    assert VaultEntry.objects.count() == before - 1


def test_passwords_and_client_secrets_of_users(apply, access_file, monkeypatch):
    monkeypatch.setenv("ROBOT", "r" * 40)

    def change(file):
        file["users"][0]["password"] = {"file": "ro"}
        file["users"].append({"name": "robot", "service": True, "client_secret": {"env": "ROBOT"}})

    shown = text(apply(change))
    assert "+ user robot\n    client_secret: set" in shown
    assert "password: set" in shown
    assert User.objects.get(username="alice").check_password("password-of-ro")
    assert not User.objects.get(username="bob").has_usable_password()
    assert apply(change) == []
    monkeypatch.setenv("ROBOT", "q" * 40)
    (access_file().parent / "ro").write_text("another-password\n")
    shown = text(apply(change))
    assert "~ user robot\n    client_secret: changed" in shown
    assert "~ user alice\n    password: changed" in shown


@pytest.fixture
def with_secrets(access_file, monkeypatch):
    """A change that gives alice a password, and a robot its secret; ``with_secrets.write`` another word."""
    monkeypatch.setenv("ROBOT", "r" * 40)
    word = access_file().parent / "word"
    word.touch(mode=0o600)

    def change(file):
        file["users"][0]["password"] = {"file": "word"}
        file["users"].append({"name": "robot", "service": True, "client_secret": {"env": "ROBOT"}})

    change.write = word.write_text
    change.write("a first password")
    return change


@pytest.fixture
def hashed_while_locked(monkeypatch):
    """For each slow hash that is compared or made: whether the database was locked meanwhile."""
    seen = []

    def watched(real):
        def watch(*words):
            seen.append(connection.in_atomic_block)
            return real(*words)

        return watch

    for name in ("verify", "encode"):
        monkeypatch.setattr(MD5PasswordHasher, name, watched(getattr(MD5PasswordHasher, name)))
    return seen


@pytest.mark.parametrize("dry_run", [False, True])
def test_nothing_waits_while_passwords_are_hashed(apply, with_secrets, hashed_while_locked, dry_run):
    """With SQLite that would be every writer: 0.3 s for each user, also when nothing has changed."""
    apply(with_secrets)
    for word in ("a first password", "another password"):
        with_secrets.write(word)
        hashed_while_locked.clear()
        apply(with_secrets, dry_run=dry_run)
        assert hashed_while_locked
        assert not any(hashed_while_locked)
    assert User.objects.get(username="alice").check_password("another password") is not dry_run


def test_a_password_that_changed_since_it_was_compared_is_compared_again(apply, with_secrets, monkeypatch):
    apply(with_secrets)
    real = run._check_references

    def change_meanwhile(*words, **options):
        alice = User.objects.get(username="alice")
        alice.set_password("her own password")
        alice.save()
        real(*words, **options)

    monkeypatch.setattr(run, "_check_references", change_meanwhile)
    assert summary(apply(with_secrets)) == ["change user alice"]
    assert User.objects.get(username="alice").check_password("a first password")


def test_a_changed_password_ends_the_logins_made_with_the_old_one(apply, with_secrets, person):
    apply(with_secrets)
    alice = person("alice")
    apply(with_secrets)
    assert alice.call("GET", "/me").status_code == 200, "nothing has changed"
    with_secrets.write("another password")
    apply(with_secrets)
    assert alice.call("GET", "/me").status_code == 401


def test_what_the_file_does_not_name_is_kept_and_said(apply):
    apply()
    changes = apply(lambda file: file["users"].pop(1))
    assert summary(changes) == ["keep user bob"]
    assert User.objects.get(username="bob").is_active


def test_prune_removes_it(apply, enrolled):
    apply()
    enrolled("agent", "dc2-a", "dc2")

    def change(file):
        file["users"].pop(1)
        file["groups"].append({"name": "new"})
        file["resources"].pop(1)
        file["gateways"].pop(1)
        file["relays"].pop()
        file["resources"][0]["accounts"].pop(1)

    assert (
        summary(apply(change, prune=True))
        == [
            "add group new",
            "remove account prod-db/owner",
            "remove account other-db/readonly",
            "remove resource other-db",
            "remove relay r1",
            "remove gateway dc2",
            "disable user bob",
        ]
        or sorted(summary(apply(change, prune=True))) == []
    )
    assert not User.objects.get(username="bob").is_active
    assert not Gateway.objects.filter(name="dc2").exists()
    assert Agent.objects.get(name="dc2-a").state == "revoked"
    assert not Relay.objects.exists()
    assert apply(change, prune=True) == []
    used = Account.objects.values("password")
    platform_keys = PlatformKey.objects.values("private")
    assert not VaultEntry.objects.exclude(pk__in=used).exclude(pk__in=platform_keys).exists()


def test_prune_leaves_an_admin(apply):
    apply()
    with pytest.raises(RefusedError, match="nobody would be left"):
        apply(lambda file: file["users"].pop(2), prune=True)
    assert User.objects.get(username="root").is_active


def test_a_disabled_user_stays_disabled(apply):
    apply()
    User.objects.filter(username="alice").update(is_active=False)
    assert apply() == []
    assert not User.objects.get(username="alice").is_active


def test_all_or_nothing(apply):
    def change(file):
        file["users"].append({"name": "robot", "service": True})

    apply()
    User.objects.create_user("robot2")
    with pytest.raises(ConfigError, match="cannot become a service user"):
        apply(lambda file: (change(file), file["users"].append({"name": "robot2", "service": True})))
    assert not User.objects.filter(username="robot").exists()


# --- a file that is wrong ------------------------------------------------------------------------------


def problems(caught):
    return "\n".join(caught.value.problems)


def test_every_problem_is_told_at_once_with_its_line(access_file):
    def change(file):
        file["policies"][0]["max_duration"] = "8d"
        file["users"].append({"name": "alice"})
        file["resources"][0]["rows_budget"] = "2MiB"
        file["resources"][0]["accounts"][0]["password"] = {"file": "missing"}
        file["users"][0]["client_secret"] = {"env": "NOT_SET_ANYWHERE"}

    path = access_file(change)
    with pytest.raises(ConfigError) as caught:
        load(path)
    told = problems(caught)
    lines = path.read_text().splitlines()
    for number, needle in (
        (next(i for i, line in enumerate(lines, 1) if "8d" in line), "max_duration: expected at most 7d"),
        (next(i for i, line in enumerate(lines, 1) if "2MiB" in line), "rows_budget: expected at most 1MiB"),
    ):
        assert f"access.yml:{number}: " in told
        assert needle in told
    assert 'users[3]: "alice" is given twice' in told
    assert "missing does not exist" in told
    assert "only a user with service: true has one" in told


def test_references_to_nothing_are_told_with_their_line(apply):
    def change(file):
        file["users"][0]["groups"] = ["nope"]
        file["resources"][0]["gateway"] = "dc9"
        file["policies"][0]["users"] = ["nobody"]
        file["policies"][0]["review"] = ["unknown"]

    with pytest.raises(ConfigError) as caught:
        apply(change)
    told = problems(caught)
    for needle in (
        'users[0]: alice: there is no group "nope"',
        'resources[0]: prod-db: there is no gateway "dc9"',
        'dba-prod: there is no user "nobody"',
        'dba-prod: there is no group "unknown"',
    ):
        assert needle in told
    assert not Group.objects.exists()


@pytest.mark.parametrize(
    ("change", "needle"),
    [
        (lambda file: file.update(extra=1), "unknown key"),
        (lambda file: file["users"][0].update(name="Alice"), "users[0].name"),
        (lambda file: file["users"][0].update(name="аlice"), "users[0].name"),
        (lambda file: file["users"][0].update(password="plain"), "users[0].password"),
        (lambda file: file["resources"][0].update(host="a b"), "resources[0].host"),
        (lambda file: file["resources"][0].update(host="{{ lookup('env') }}"), "resources[0].host"),
        (lambda file: file["resources"][0].update(port=0), "resources[0].port"),
        (lambda file: file["resources"][0]["accounts"][0].update(user="a\nb"), "accounts[0].user"),
        (lambda file: file["resources"][0]["accounts"][0].update(databases=["a\x00b"]), "databases[0]"),
        (lambda file: file["policies"][0].update(accounts=["*"]), "accounts[0]"),
        (lambda file: file["policies"][0].update(accounts=["[a-z]/*"]), "accounts[0]"),
        (lambda file: file["policies"][0].update(groups=[]), "about nobody"),
        (lambda file: file["policies"][0].update(max_duration="0"), "max_duration"),
        (lambda file: file["resources"][0]["tls"].update(ca={"file": "ro"}), "tls mode require"),
        (lambda file: file["resources"][0].update(tls={"ca": {"file": "ro"}}), "not a PEM certificate"),
        (lambda file: file["users"][0].update(service=True, password={"file": "ro"}), "no password"),
    ],
)
def test_a_wrong_file_is_refused(access_file, change, needle):
    with pytest.raises(ConfigError) as caught:
        load(access_file(change))
    assert needle in problems(caught)
    assert "password-of" not in problems(caught)


def test_a_secret_file_that_others_may_read_is_refused(access_file):
    path = access_file()
    (path.parent / "ro").chmod(0o644)
    with pytest.raises(ConfigError, match="may be read by others"):
        load(path)


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff", b"a\x00b"])
def test_a_secret_that_is_none_is_refused(access_file, content):
    path = access_file()
    (path.parent / "ro").write_bytes(content)
    with pytest.raises(ConfigError):
        load(path)


def test_nothing_in_a_value_steers_the_terminal():
    change = Change("change", "resource", "x", {"host": ("a", "\x1b[2Jb\r\nc")})
    assert "\x1b" not in change.lines()[1][1]
    assert "\n" not in change.lines()[1][1]


def test_what_was_read_does_not_show_its_secrets(access_file):
    assert "password-of" not in repr(load(access_file()))
