"""The commands as a person runs them."""

import json

import pytest
from click.testing import CliRunner

from pam_common.cli import run
from pam_platform.__main__ import main as program
from pam_platform.commands.root import main


def walk(command, path=("pam-platform",)):
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from walk(child, (*path, name))


@pytest.mark.parametrize(("path", "command"), list(walk(main)), ids=lambda value: str(value)[:40])
def test_every_command_explains_itself(path, command):
    shown = CliRunner().invoke(main, [*path[1:], "--help"]).output
    assert "Usage:" in shown
    assert command.help
    if not getattr(command, "commands", None):
        assert f"pam-platform {' '.join(path[1:])}" in shown or "pam-platform --config" in shown, "no example"


def test_a_missing_configuration_is_named(tmp_path, capsys):
    assert run(main, ["--config", str(tmp_path / "none.yml"), "check-config"]) == 78
    assert "none.yml" in capsys.readouterr().err


def test_before_init_the_next_step_is_told(tmp_path, capsys):
    config = tmp_path / "platform.yml"
    config.write_text(f"public_url: http://127.0.0.1\nstate_dir: {tmp_path}/state\n")
    assert run(main, ["--config", str(config), "serve"]) == 1
    told = capsys.readouterr().err
    assert "holds no platform yet" in told
    assert "HINT: pam-platform --config" in told


def test_init_takes_no_admin_without_a_password(tmp_path, capsys):
    config = tmp_path / "platform.yml"
    config.write_text(f"public_url: http://127.0.0.1\nstate_dir: {tmp_path}/state\n")
    assert run(main, ["--config", str(config), "init", "--admin", "root"]) == 2
    assert not (tmp_path / "state").exists()


@pytest.fixture
def command(platform, monkeypatch):
    """Runs a command inside this process, against the test's platform: (exit code, stdout)."""
    from pam_platform.commands import access, ending, fleet, keys
    from pam_platform.config import current

    for module in (access, ending, fleet, keys):
        monkeypatch.setattr(module, "start", current)

    def do(*words):
        result = CliRunner().invoke(main, list(words))
        return result.exit_code, result.output, result.exception

    return do


def test_apply_shows_the_difference_and_json(command, access_file):
    path = str(access_file())
    code, shown, _ = command("apply", "-f", path, "--dry-run")
    assert code == 0
    assert shown.endswith("would change\n")
    code, shown, _ = command("apply", "-f", path, "--json")
    assert {change["action"] for change in json.loads(shown)["changes"]} == {"add"}
    assert "password-of" not in shown
    assert command("apply", "-f", path)[1] == "nothing to change\n"


def test_enrol_token_prints_for_people_and_programs(command, access_file):
    command("apply", "-f", str(access_file()))
    shown = command("enrol-token", "agent", "dc1-a", "--gateway", "dc1", "--quiet")[1]
    assert len(shown) == 44
    assert json.loads(command("enrol-token", "relay", "r1", "--json")[1])["name"] == "r1"
    assert "valid until" in command("enrol-token", "agent", "dc1-a", "--gateway", "dc1")[1]
    assert command("enrol-token", "agent", "dc1-a")[0] == 2
    assert "no gateway" in str(command("enrol-token", "agent", "dc1-a", "--gateway", "dc9")[2])


def test_keys_are_listed_and_rotated_without_private_ones(command):
    from pam_platform.vault import keys, store
    from pam_platform.vault.models import PlatformKey

    listed = json.loads(command("keys", "list", "--json")[1])["keys"]
    assert {row["purpose"] for row in listed} == set(keys.PURPOSES)
    assert "is published" in command("keys", "rotate", "grant")[1]
    assert "not yet everywhere" in str(command("keys", "rotate", "grant")[2])
    assert "signs from now on" in command("keys", "rotate", "grant", "--now")[1]
    shown = command("keys", "list")[1]
    private = [store.reveal(row.private) for row in PlatformKey.objects.all()]
    assert not any(secret.hex() in shown for secret in private)


def test_users_are_disabled_by_name(command, person):
    person("alice")
    assert command("user", "disable", "alice")[1] == "user alice is disabled; 0 sessions were ended\n"
    assert command("user", "enable", "alice")[0] == 0
    assert "no user nobody" in str(command("user", "disable", "nobody")[2])


def test_a_leaked_key_is_withdrawn_once_another_signs(command, audit_trail):
    from pam_platform.vault import keys

    old = keys.signing_key(keys.GRANT).kid
    assert "is the current grant key" in str(command("keys", "distrust", old)[2])
    command("keys", "rotate", "grant")
    command("keys", "rotate", "grant", "--now")
    assert old in {entry["kid"] for entry in keys.public_entries(keys.GRANT)}
    assert command("keys", "distrust", old)[1] == f"grant key {old} is no longer trusted\n"
    assert [entry["kid"] for entry in keys.public_entries(keys.GRANT)] == [keys.signing_key(keys.GRANT).kid]
    assert f"{old}  retired  no longer trusted" in command("keys", "list")[1]
    assert audit_trail()[-1][1:3] == ("keys.distrust", "grant")
    assert "no key 00" in str(command("keys", "distrust", "00")[2])


def test_agents_relays_and_gateways_are_shut_out_by_name(command, fleet, person, audit_trail):
    names = {row["name"] for row in json.loads(command("agent", "ls", "--json")[1])["agents"]}
    assert names == {"dc1-a", "dc1-b", "dc2-a"}
    assert "relay.example.com:2222" in command("relay", "ls")[1]
    for kind in ("agent", "relay"):
        lines = command(kind, "ls")[1].splitlines()
        assert max(map(len, lines)) < 80, "it wraps on an ordinary terminal"
        assert len({line.index("active") for line in lines}) == 1
    session = person("alice", groups=["dba"]).connect().json()["session"]
    assert fleet["dc1-a"].call("POST", f"/agent/sessions/{session}/open").status_code == 200

    assert command("agent", "revoke", "dc1-a")[1] == "agent dc1-a is revoked; 1 session was ended\n"
    assert fleet["dc1-a"].call("GET", "/agent/inbox").status_code == 401
    assert command("relay", "revoke", "r1")[1] == "relay r1 is revoked\n"
    assert fleet["r1"].call("GET", "/relay/bundle").status_code == 401
    assert command("gateway", "delete", "dc2")[1] == "gateway dc2 is deleted; 0 sessions were ended\n"
    assert fleet["dc2-a"].call("GET", "/agent/inbox").status_code == 401
    for words in (("agent", "revoke"), ("relay", "revoke"), ("gateway", "delete")):
        assert "no " + words[0] + " dc9" in str(command(*words, "dc9")[2])

    done = [row[1:3] for row in audit_trail() if row[0] == "operator"]
    assert done == [
        ("agent.revoke", "dc1-a"),
        ("relay.revoke", "r1"),
        ("agent.revoke", "dc2-a"),
        ("gateway.delete", "dc2"),
    ]


def test_a_session_is_killed_by_its_id(command, new_session, audit_trail):
    session = new_session()
    assert command("session", "kill", session.pk, "--reason", "two\nlines")[0] == 1
    assert command("session", "kill", session.pk, "--reason", "maintenance")[0] == 0
    session.refresh_from_db()
    assert session.end_reason == "killed by operator: maintenance"
    assert audit_trail()[-1][:4] == ("operator", "session.kill", session.pk, "ok")
    assert "over already" in str(command("session", "kill", session.pk)[2])
    assert "no session nothing" in str(command("session", "kill", "nothing")[2])


def test_recordings_verify_without_recordings(command):
    assert command("recordings", "verify")[1] == "0 parts, 0 not as they must be\n"


def test_the_vault_is_rekeyed(command):
    assert "secrets are under master key" in command("vault", "rekey")[1]


@pytest.mark.parametrize("words", ["init", "keys rotate grant", "vault rekey", "apply -f FILE"])
def test_commands_that_seal_secrets_run_one_at_a_time(command, access_file, monkeypatch, words):
    from pam_common.errors import UnavailableError
    from pam_platform.commands import init
    from pam_platform.vault import master

    monkeypatch.setattr(init, "start", lambda **_: None)
    monkeypatch.setattr(master, "LOCK_TIMEOUT", 0)
    words = words.replace("FILE", str(access_file())).split()
    with master.locked():
        refused = command(*words)[2]
    assert isinstance(refused, UnavailableError)
    assert command(*words)[0] == 0


def test_the_program_is_the_group():
    assert callable(program)


def test_files_of_keys_are_rotated_and_the_old_secret_key_is_still_believed(command):
    from pam_platform import keyfiles
    from pam_platform.config import current

    keyfiles.ensure(current())
    old = current().secret_key_file.read_text().split()
    pem = current().oidc_key_file.read_bytes()
    assert "restart the server" in command("keys", "rotate", "secret-key")[1]
    assert "restart the server" in command("keys", "rotate", "oidc")[1]
    new = current().secret_key_file.read_text().split()
    assert new[1:] == old[: keyfiles.MAX_SECRET_KEYS - 1]
    assert new[0] not in old
    assert current().oidc_key_file.read_bytes() != pem


def test_an_older_version_refuses_a_newer_database(db):
    from django.db import connection
    from django.db.migrations.recorder import MigrationRecorder

    from pam_common.errors import PamError
    from pam_platform.commands import init, root

    root._require_current_tables()
    MigrationRecorder(connection).record_applied("access", "9999_of_the_next_version")
    for look in (root._require_current_tables, lambda: init._migrate(None)):
        with pytest.raises(PamError, match=r"newer version of pam-platform \(access.9999") as refused:
            look()
        assert "install that version again" in refused.value.hint


def test_migrations_of_what_is_no_longer_used_are_no_newer_version(db):
    from django.db import connection
    from django.db.migrations.recorder import MigrationRecorder

    from pam_platform.commands import root

    MigrationRecorder(connection).record_applied("gone", "0001_initial")
    root._require_current_tables()
