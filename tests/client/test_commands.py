"""The command line: lists, JSON, errors, exit codes, completion, help."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from pam_client.__main__ import cli
from pam_client.commands import examples
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
    assert paths == [
        "/api/v1/sessions?mine=1&limit=50",
        "/api/v1/sessions?mine=0&limit=50&state=granted",
        "/api/v1/sessions?mine=0&limit=50&state=active",
    ]
    assert json.loads(call("sessions", "ls", "--json").stdout) == [entry]
    platform.answers["GET", f"/api/v1/sessions/{SESSION}"] = (200, entry)
    shown = call("sessions", "show", SESSION).stdout
    assert f"id:      {SESSION}" in shown
    assert "ended" not in shown


def test_active_sessions_are_those_that_count(call: Any, home: Home, platform: Any) -> None:
    """Also those that wait for their first connection: they count towards the limit of open sessions."""
    granted = [{"id": "s-new", "state": "granted", "started": 30}, {"id": "s-used", "started": 10}]
    # Opened between the two questions, so it is in both answers.
    active = [{"id": "s-run", "state": "active", "started": 20}, {"id": "s-used", "started": 10}]
    answers: Iterator[Any] = iter([granted, active] * 2)
    platform.answers["GET", "/api/v1/sessions"] = lambda _form: (200, {"sessions": next(answers)})
    found = json.loads(call("sessions", "ls", "--active", "--json").stdout)
    assert [entry["id"] for entry in found] == ["s-new", "s-run", "s-used"]
    assert len(json.loads(call("sessions", "ls", "--active", "--limit", "2", "--json").stdout)) == 2


def completed(run: Any, *words: str) -> list[str]:
    """What a Tab after these words offers."""
    asked = {"_PAM_CLIENT_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(("pam-client", *words))}
    done = run(**asked, COMP_CWORD=str(len(words)))
    return [line.partition(",")[2] for line in done.stdout.splitlines() if line]


def test_completion_of_subcommands(run: Any, home: Home) -> None:
    assert completed(run, "sessions", "") == ["kill", "ls", "show"]
    assert completed(run, "sessions", "k") == ["kill"]
    assert "--active" in completed(run, "sessions", "--all", "--")


@pytest.mark.parametrize("words", [("replay",), ("sessions", "show"), ("sessions", "kill")], ids=" ".join)
def test_completion_of_sessions_needs_no_network(
    run: Any, call: Any, home: Home, platform: Any, words: tuple[str, ...]
) -> None:
    other = "s-" + "b" * 26
    found = [{"id": SESSION, "account": "a/b"}, {"id": other, "account": "a/c"}, {"id": None}]
    platform.answers["GET", "/api/v1/sessions"] = (200, {"sessions": found})
    assert completed(run, *words, "s-") == []
    call("sessions")
    platform.close()
    assert completed(run, *words, "s-") == [SESSION, other]
    assert completed(run, *words, "s-b") == [other]


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


@pytest.mark.parametrize("words", [("replay",), ("sessions", "show"), ("sessions", "kill")])
@pytest.mark.parametrize("name", ["nope", SESSION[:-1], SESSION.upper(), "../me", SESSION + "\n", ""])
def test_what_is_no_session_is_not_asked_for(
    call: Any, home: Home, platform: Any, words: tuple[str, ...], name: str
) -> None:
    done = call(*words, name)
    assert (done.returncode, done.stdout) == (2, "")
    shown = name.replace("\n", "\\n")
    assert done.stderr == f'error: "{shown}" is not a session\nHINT: pam-client sessions ls lists them\n'
    assert not platform.requests


@pytest.mark.parametrize("command", ["connect", "ssh-proxy"])
@pytest.mark.parametrize("name", ["Demo-DB/readonly", "demo-db/readonly/x", "demo-db/", "/x", "a b", ""])
def test_what_is_no_account_is_not_asked_for(
    call: Any, home: Home, platform: Any, command: str, name: str
) -> None:
    done = call(command, name)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f'error: "{name}" is not an account\n'
        "HINT: pam-client ls shows yours; names are lower case, RESOURCE/ACCOUNT\n"
    )
    assert not platform.requests


def test_a_name_that_is_none_cannot_act_on_the_terminal(call: Any, home: Home) -> None:
    said = call("connect", "\x1b[2J" + "x" * 500).stderr
    assert said.startswith('error: "\\x1b[2Jxxx')
    assert len(said.splitlines()[0]) < 150


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


NOTHING = "nothing was recorded in this session so far"


def test_replay_of_a_session_in_which_nothing_was_recorded(
    call: Any, home: Home, recorded: Any, tmp_path: Path
) -> None:
    recorded.answers["GET", f"/api/v1/sessions/{SESSION}"] = (200, {"id": SESSION, "protocol": "http"})
    recorded.answers["GET", f"/api/v1/sessions/{SESSION}/events"] = (200, b"")
    recorded.answers["GET", f"/api/v1/sessions/{SESSION}/verify"] = (200, {"ok": True, "parts": []})
    done = call("replay", SESSION)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{NOTHING}\n", "")
    done = call("replay", SESSION, "--json")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", f"{NOTHING}\n")
    file = tmp_path / "file"
    for form in ("ndjson", "har"):
        done = call("replay", SESSION, "--export", form, "-o", str(file))
        assert done.returncode == 1
        assert f"error: there is nothing to write: {file} was not made" in done.stderr
        assert NOTHING in done.stdout
    assert "VERIFIED" not in done.stdout
    assert not [path for path in tmp_path.iterdir() if "file" in path.name]


@pytest.mark.parametrize(
    ("lines", "report"),
    [
        (b"", {"ok": False, "parts": []}),  # a platform that does not tell "none" from "lost"
        (b"", {"ok": False, "parts": [{"part": 1, "ok": False, "problems": ["the recording is lost"]}]}),
        (b"", {"ok": True, "parts": {}}),
        (b"", {"ok": True}),
        (b'{"kind": "query"}', {"ok": True, "parts": []}),  # of which part?
    ],
)
def test_replay_of_a_recording_that_is_lost(
    call: Any, home: Home, recorded: Any, tmp_path: Path, lines: bytes, report: Any
) -> None:
    recorded.answers["GET", f"/api/v1/sessions/{SESSION}"] = (200, {"id": SESSION})
    recorded.answers["GET", f"/api/v1/sessions/{SESSION}/events"] = (200, lines)
    recorded.answers["GET", f"/api/v1/sessions/{SESSION}/verify"] = (200, report)
    for words in ([], ["--export", "ndjson", "-o", str(tmp_path / "file")]):
        done = call("replay", SESSION, *words)
        assert done.returncode == 4
        assert "THE RECORDING IS NOT VERIFIED" in done.stdout
        assert NOTHING not in done.stdout


PROBLEM = {
    "part": 1,
    "kind": "problem",
    "problem": "the recording is not \x1b sealed to it",
    "hint": "a key.",
}


@pytest.mark.parametrize("words", [(), ("--json",), ("--lines",)], ids=str)
def test_replay_of_what_cannot_be_read(call: Any, home: Home, recorded: Any, words: tuple[str, ...]) -> None:
    lines = "".join(json.dumps(event) + "\n" for event in (PROBLEM, *EVENTS, PROBLEM | {"part": 2}))
    recorded.answers["GET", f"/api/v1/sessions/{SESSION}/events"] = (200, lines.encode())
    done = call("replay", SESSION, *words)
    assert done.returncode == 1
    assert "the recording is verified" in done.stdout + done.stderr
    assert "error: part 1: the recording is not \\x1b sealed to it\nHINT: a key.\n" in done.stderr
    assert "error: part 2: the recording is not" in done.stderr
    assert "query" in done.stdout
    recorded.answers["GET", f"/api/v1/sessions/{SESSION}/verify"] = (200, {"ok": False})
    assert call("replay", SESSION, *words).returncode == 4, "an altered recording is told from an unread one"


@pytest.mark.parametrize("form", ["har", "ndjson", "asciicast"])
def test_an_export_of_what_cannot_be_read(
    call: Any, home: Home, recorded: Any, tmp_path: Path, form: str
) -> None:
    recorded.answers["GET", f"/api/v1/sessions/{SESSION}"] = (200, {"id": SESSION, "protocol": "http"})
    recorded.answers["GET", f"/api/v1/sessions/{SESSION}/events"] = (200, json.dumps(PROBLEM).encode())
    file = tmp_path / "file"
    done = call("replay", SESSION, "--export", form, "-o", str(file))
    assert done.returncode == 1
    assert done.stderr.startswith("error: part 1: the recording is not \\x1b sealed to it\nHINT: a key.\n")
    assert done.stderr.count("error: ") == 2  # and that there is no file
    assert not [path for path in tmp_path.iterdir() if "file" in path.name]


def test_an_export_of_what_can_be_read_in_part(call: Any, home: Home, recorded: Any, tmp_path: Path) -> None:
    lines = "".join(json.dumps(event) + "\n" for event in (*EVENTS, PROBLEM))
    recorded.answers["GET", f"/api/v1/sessions/{SESSION}"] = (200, {"id": SESSION})
    recorded.answers["GET", f"/api/v1/sessions/{SESSION}/events"] = (200, lines.encode())
    file = tmp_path / "file"
    done = call("replay", SESSION, "--export", "ndjson", "-o", str(file))
    assert done.returncode == 1
    assert "is written" in done.stderr
    assert "error: part 1: the recording is not" in done.stderr
    assert len(file.read_text().splitlines()) == 3


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


def test_comments_of_examples_stand_above_where_they_do_not_fit_beside() -> None:
    assert examples("ls", "ls -l    # long") == "\b\nExamples:\n  ls\n  ls -l    # long"
    long = "ls " + "a" * 70
    assert examples("ls", f"{long}    # all", "ls -l  # long").splitlines()[2:] == [
        "  ls",
        "  # all",
        f"  {long}",
        "  # long",
        "  ls -l",
    ]


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
