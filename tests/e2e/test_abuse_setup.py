"""Abuse and mistakes before anything runs: enrolment tokens used twice, configurations not understood."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from stack import BIN, Stack


@pytest.fixture(scope="module")
def stack(tmp_path_factory) -> Iterator[Stack]:
    """A platform alone."""
    with Stack(tmp_path_factory.mktemp("stack")) as running:
        running.start_platform()
        yield running


@pytest.fixture
def run() -> Callable[..., Any]:
    def run(program: str, *words: object, **options: Any) -> Any:
        command = [str(BIN / program), *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)

    return run


@pytest.fixture
def written(tmp_path) -> Callable[..., Path]:
    """Write a 0600 file; a mapping as YAML."""

    def write(name: str, content: Any) -> Path:
        path = tmp_path / name
        path.touch(mode=0o600)
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return write


@pytest.fixture
def daemon(stack, tmp_path, written) -> Callable[[str, str], Path]:
    """The configuration of one more agent or relay."""

    def configure(kind: str, name: str) -> Path:
        state = tmp_path / name
        state.mkdir(mode=0o700)
        document = {"platform": stack.url, "state_dir": str(state), "runtime_dir": str(state)}
        document |= {"allow_targets": ["127.0.0.1:5432"]} if kind == "agent" else {"listen": "127.0.0.1:0"}
        return written(f"{name}.yml", document)

    return configure


@pytest.mark.parametrize(("kind", "options"), [("agent", ["--gateway", "dc1"]), ("relay", [])])
def test_abuse_13_replay_an_enrolment_token_works_once(stack, run, daemon, written, kind, options) -> None:
    name = "dc1-z" if kind == "agent" else "r1"
    token = stack.platform("enrol-token", kind, name, *options, "--quiet")
    enrol = ("enrol", "--token-file", written("token", token), "--name", name)
    honest, thief = daemon(kind, "honest"), daemon(kind, "thief")
    done = run(f"pam-{kind}", "--config", honest, *enrol)
    assert done.returncode == 0, done.stderr

    done = run(f"pam-{kind}", "--config", thief, *enrol)
    assert done.returncode == 1
    assert "error: " in done.stderr
    assert "used" in done.stderr
    assert token.strip() not in done.stdout + done.stderr
    assert token.strip() not in stack.logs()
    assert "Traceback" not in done.stderr
    # The one who was first is not disturbed.
    assert run(f"pam-{kind}", "--config", honest, "check-config").returncode == 0


def test_abuse_12_an_enrolment_token_is_for_one_name_and_kind(stack, run, daemon, written) -> None:
    token = stack.platform("enrol-token", "agent", "dc1-y", "--gateway", "dc1", "--quiet")
    file = written("token", token)
    for kind, name in (("agent", "dc1-x"), ("relay", "dc1-y")):
        config = daemon(kind, f"{kind}-other")
        done = run(f"pam-{kind}", "--config", config, "enrol", "--token-file", file, "--name", name)
        assert done.returncode == 1, done.stderr
        assert "error: " in done.stderr


#: The least that each program's configuration needs.
LEAST: dict[str, dict[str, Any]] = {
    "agent": {"allow_targets": ["127.0.0.1:5432"]},
    "relay": {"listen": "127.0.0.1:2222"},
    "platform": {"public_url": "http://127.0.0.1:8443"},
    "client": {},
}


@pytest.mark.parametrize("program", list(LEAST))
def test_abuse_20_a_configuration_that_is_not_understood_is_refused(run, written, tmp_path, program) -> None:
    """A key that is misspelt must not silently leave a limit out."""
    document = {**LEAST[program], "allow_everything": True, "log_levle": "debug"}
    if program != "platform":
        document["platform"] = "http://127.0.0.1:1"
    if program != "client":
        document["state_dir"] = str(tmp_path)
    if program in ("agent", "relay"):
        document["runtime_dir"] = str(tmp_path)
    if program == "client":
        written("client.yml", document)
        done = run("pam-client", "ls", env={"PAM_CLIENT_HOME": str(tmp_path)})
    else:
        config = written(f"{program}.yml", document)
        done = run(f"pam-{program}", "--config", config, "check-config")
    assert done.returncode == 78, done.stdout + done.stderr
    for key in ("allow_everything", "log_levle"):
        (line,) = [line for line in done.stderr.splitlines() if key in line]
        assert f"{program}.yml:" in line
    assert "Traceback" not in done.stderr


def test_abuse_21_a_configuration_cannot_be_a_bomb(run, written, tmp_path) -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    config = written("agent.yml", "\n".join(levels))
    done = run("pam-agent", "--config", config, "check-config")
    assert done.returncode == 78
    assert len(done.stderr) < 100_000
    assert json.dumps("Traceback") not in done.stderr
