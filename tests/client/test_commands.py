"""The command line: lists, JSON, errors, exit codes, completion, help."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from pam_client.__main__ import cli
from pam_client.home import Home
from pam_common.errors import ConfigError, PamError

RESOURCES = [
    {
        "name": "prod-db",
        "protocol": "postgres",
        "gateway": "dc1",
        "database": "app",
        "accounts": [
            {"name": "readonly", "max_duration": 28800, "idle_limit": 1800, "policy": "dba \x1b[31m"},
            {"name": "owner", "max_duration": 3600, "idle_limit": 0, "policy": "dba"},
        ],
    },
    {"name": "crm", "protocol": "postgres", "gateway": "dc1", "accounts": [{"name": "app"}]},
]
SESSION = "s-" + "a" * 26


@pytest.fixture
def listed(platform: Any) -> None:
    platform.answers["GET", "/api/v1/resources"] = (200, {"resources": RESOURCES})


def test_ls_is_plain_in_a_pipe(call: Any, home: Home, listed: None) -> None:
    done = call("ls")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["ACCOUNT", "prod-db/readonly", "prod-db/owner", "crm/app"]
    assert "8h 00m" in lines[1]
    assert "30m 00s" in lines[1]
    assert "\x1b" not in done.stdout
    assert json.loads(call("ls", "--json").stdout) == RESOURCES


def test_completion_of_names_needs_no_network(
    run: Any, call: Any, home: Home, listed: None, platform: Any
) -> None:
    call("ls")
    platform.close()
    words = {
        "_PAM_CLIENT_COMPLETE": "bash_complete",
        "COMP_WORDS": "pam-client connect pr",
        "COMP_CWORD": "2",
    }
    done = run(**words)
    assert done.stdout.split() == ["plain,prod-db/owner", "plain,prod-db/readonly"], done.stderr
    words["COMP_WORDS"] = "pam-client connect c"
    assert run(**words).stdout.split() == ["plain,crm", "plain,crm/app"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(call: Any, home: Home, shell: str) -> None:
    done = call("completion", shell)
    assert done.returncode == 0, done.stderr
    assert f"{shell}_complete" in done.stdout
    assert "pam-client" in done.stdout


def test_sessions(call: Any, home: Home, platform: Any) -> None:
    entry = {"id": SESSION, "user": "alice", "account": "a/b", "state": "active", "started": 0, "ended": None}
    platform.answers["GET", "/api/v1/sessions"] = (200, {"sessions": [entry]})
    assert SESSION in call("sessions").stdout
    assert SESSION in call("sessions", "--all", "--active").stdout
    paths = [path for _, path, *_ in platform.requests if path.startswith("/api/v1/sessions")]
    assert paths == ["/api/v1/sessions?mine=1&limit=50", "/api/v1/sessions?mine=0&limit=50&state=active"]
    assert json.loads(call("sessions", "ls", "--json").stdout) == [entry]
    platform.answers["GET", f"/api/v1/sessions/{SESSION}"] = (200, entry)
    shown = call("sessions", "show", SESSION).stdout
    assert f"id:      {SESSION}" in shown
    assert "ended" not in shown


def test_sessions_follows_pages(call: Any, home: Home, platform: Any) -> None:
    pages = iter([[{"id": f"s-{number}"} for number in range(start, start + 200)] for start in (0, 200, 400)])
    platform.answers["GET", "/api/v1/sessions"] = lambda _form: (200, {"sessions": next(pages)})
    found = json.loads(call("sessions", "ls", "--limit", "450", "--json").stdout)
    assert len(found) == 450
    assert [path.partition("&")[2] for _, path, *_ in platform.requests if "before" in path] == [
        "limit=200&before=s-199",
        "limit=50&before=s-399",
    ]


def test_kill(call: Any, home: Home, platform: Any) -> None:
    platform.answers["POST", f"/api/v1/sessions/{SESSION}/kill"] = (200, {})
    assert call("sessions", "kill", SESSION, "--reason", "left the desk").returncode == 0
    assert platform.last("POST", f"/api/v1/sessions/{SESSION}/kill")[0] == {"reason": "left the desk"}
    done = call("sessions", "kill", "../me")
    assert done.returncode == 1  # a path is not walked: ids are quoted
    assert platform.count("POST", "/api/v1/sessions/..%2Fme/kill") == 1


EVENTS = [{"t": 0.5, "c": 1, "kind": "query", "sql": "select '\x1b[2J'"}, {"t": 0.6, "c": 1, "kind": "end"}]


@pytest.fixture
def recorded(platform: Any) -> Any:
    lines = "".join(json.dumps(event) + "\n" for event in EVENTS).encode()
    platform.answers["GET", f"/api/v1/sessions/{SESSION}/events"] = (200, lines)
    part = {"part": 1, "ok": True, "problems": [], "end": "closed", "chunks": 2, "bytes": 300}
    platform.answers["GET", f"/api/v1/sessions/{SESSION}/verify"] = (200, {"ok": True, "parts": [part]})
    return platform


def test_replay(call: Any, home: Home, recorded: Any) -> None:
    done = call("replay", SESSION)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "0:00:00.500  #1   query     select '\\x1b[2J'",
        "0:00:00.600  #1   end",
        "part 1: verified, 2 chunks, 300 bytes, end: closed",
        "the recording is verified",
    ]
    done = call("replay", SESSION, "--json", "--speed", "100")
    assert [json.loads(line) for line in done.stdout.splitlines()] == EVENTS
    assert "the recording is verified" in done.stderr


@pytest.mark.parametrize(
    "answer",
    [(200, {"ok": False, "parts": []}), (200, {"ok": "yes"}), (200, {}), (403, {"detail": "not for you"})],
)
def test_replay_of_what_is_not_verified(call: Any, home: Home, recorded: Any, answer: Any) -> None:
    recorded.answers["GET", f"/api/v1/sessions/{SESSION}/verify"] = answer
    done = call("replay", SESSION)
    assert done.returncode == 4
    assert "NOT VERIFIED" in done.stdout
    assert "query" in done.stdout
    assert call("replay", SESSION, "--no-verify").returncode == 0


def test_replay_of_what_is_no_event(call: Any, home: Home, recorded: Any) -> None:
    recorded.answers["GET", f"/api/v1/sessions/{SESSION}/events"] = (200, b"[1]\n")
    done = call("replay", SESSION)
    assert done.returncode == 1
    assert "error: the platform sent what is not an event" in done.stderr


def test_replay_refuses_an_endless_line(call: Any, home: Home, recorded: Any) -> None:
    """Abuse case 21: oversize fields."""
    recorded.answers["GET", f"/api/v1/sessions/{SESSION}/events"] = (200, b"x" * (2 << 20))
    assert "an event of more than 1048576 bytes" in call("replay", SESSION).stderr


def test_gets_are_tried_again(call: Any, home: Home, platform: Any) -> None:
    answers: Iterator[Any] = iter([(503, {}), (200, {"resources": []})])
    platform.answers["GET", "/api/v1/resources"] = lambda _form: next(answers)
    assert call("ls").returncode == 0


def test_unreachable_platform(call: Any, home: Home, platform: Any) -> None:
    platform.close()
    done = call("ls")
    assert done.returncode == 69
    assert done.stderr.startswith(f"error: the platform at {platform.url} does not answer")


def test_connect_refused_by_policy(call: Any, home: Home, platform: Any) -> None:
    answer = {"detail": "no policy lets alice use prod-db/owner", "hint": "ask the dba group"}
    platform.answers["POST", "/api/v1/connect"] = (403, answer)
    done = call("connect", "prod-db/owner")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: no policy lets alice use prod-db/owner\nHINT: ask the dba group\n"


def test_connect_to_what_this_client_does_not_know(call: Any, connecting: Any, agency: Any) -> None:
    def connect(form: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        status, body = agency.connect(form)
        return status, body | {"protocol": "gopher"}

    connecting.answers["POST", "/api/v1/connect"] = connect
    done = call("connect", "prod-db/readonly")
    assert done.returncode == 1
    assert 'does not know the protocol "gopher"' in done.stderr
    assert agency.ended == agency.sessions


@pytest.mark.parametrize(
    "change",
    [
        {"session": "../../x"},
        {"gateway": "DC1"},
        {"relays": [{"name": "r1", "host": "h", "port": 0}]},
        {"relays": [{"name": "r1", "host": "-oProxyCommand=x", "port": 22}]},
        {"agents": [{"id": "a", "noise_key": "AA"}]},
        {"hints": {"user": "a\x1b[2J"}},
        {"hints": {"user": "me", "database": "-cdrop"}},
        {"grant_keys": [{"kid": "0" * 16, "key": "A" * 43}]},
        {"session_end": "soon"},
        {"certificate": "ssh-rsa AAAA"},
    ],
)
def test_connect_answer_that_is_not_one(call: Any, connecting: Any, agency: Any, change: Any) -> None:
    """Abuse cases 4, 8 and 25: names and addresses in an answer are checked before anything uses them."""

    def connect(form: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        status, body = agency.connect(form)
        return status, body | change

    connecting.answers["POST", "/api/v1/connect"] = connect
    done = call("connect", "prod-db/readonly", "--", "true")
    assert done.returncode == 1
    assert done.stderr.startswith("error: the platform's answer cannot be used: ")
    assert "\x1b" not in done.stderr


def test_usage_errors(call: Any, home: Home) -> None:
    assert call("connect").returncode == 2
    assert call("connect", "a", "--port", "1", "--socket", "x").returncode == 2
    assert call("no-such-command").returncode == 2


def commands(group: click.Group, *path: str) -> list[tuple[tuple[str, ...], click.Command]]:
    found: list[tuple[tuple[str, ...], click.Command]] = [(path, group)]
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            found += commands(command, *path, name)
        else:
            found.append(((*path, name), command))
    return found


@pytest.mark.parametrize(
    ("path", "command"), commands(cli), ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_every_help_has_examples(path: tuple[str, ...], command: click.Command) -> None:
    assert command.help
    assert "Examples:\n  " in (command.epilog or "")
    options = [option for option in command.params if isinstance(option, click.Option)]
    assert all(option.help for option in options)
    if path and path[-1] in ("ls", "show", "status"):
        assert any("--json" in option.opts for option in options)


class TestSettings:
    def test_option_beats_file(self, tmp_path: Path) -> None:
        home = Home(tmp_path)
        (tmp_path / "client.yml").write_text("platform: https://pam.test\nplatform_ca: ca.pem\n")
        assert home.settings().platform_ca == tmp_path / "ca.pem"
        other = home.settings("https://other.test/")
        # Another platform's certificate is not vouched for by this one's CA.
        assert (other.platform, other.platform_ca) == ("https://other.test", None)

    def test_mistakes_name_file_and_line(self, tmp_path: Path) -> None:
        (tmp_path / "client.yml").write_text("platform: pam.test\nplatfrom_ca: x\n")
        with pytest.raises(ConfigError) as caught:
            Home(tmp_path).settings()
        text = "\n".join(caught.value.problems)
        assert "client.yml:1: platform: expected the platform's address" in text
        assert 'client.yml:2: unknown key "platfrom_ca"' in text

    def test_plain_http_elsewhere_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "client.yml").write_text("platform: http://pam.test\n")
        with pytest.raises(PamError, match="not encrypted"):
            Home(tmp_path).settings()

    def test_saved_settings_are_read_back(self, tmp_path: Path) -> None:
        home = Home(tmp_path / "home")
        (tmp_path / "ca.pem").touch()
        from pam_client.home import Settings

        settings = Settings("https://pam.test", tmp_path / "ca.pem")
        home.save_settings(settings)
        assert home.settings() == settings
