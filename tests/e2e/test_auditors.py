"""Recordings that only an auditor can open: sealed to their key, and not to the platform's."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator

import pytest
from processes import wait_for
from stack import BIN, Stack


@pytest.fixture(scope="module")
def key_file(tmp_path_factory):
    return tmp_path_factory.mktemp("auditor") / "auditor.key"


@pytest.fixture(scope="module")
def stack(tmp_path_factory, postgres, key_file) -> Iterator[Stack]:
    made = subprocess.run(
        [BIN / "pam-client", "recording-key", key_file, "--json"], capture_output=True, text=True, check=True
    )
    config = {"recording_recipients": [json.loads(made.stdout)], "recording_platform_key": False}
    with Stack(tmp_path_factory.mktemp("stack"), platform_config=config) as running:
        running.add_database(postgres)
        running.start()
        yield running


def test_only_the_auditor_with_the_key_reads_the_recording(stack, alice, key_file, tmp_path) -> None:
    alice.run("connect", "demo-db/owner", "--", "psql", "-Xc", "select 'for the auditor'")
    session = json.loads(alice.run("sessions", "ls", "--json").stdout)[0]["id"]

    def complete() -> bool:
        return json.loads(alice.run("sessions", "show", session, "--json").stdout)["recording"] == "complete"

    wait_for(complete, "the recording")
    auditor = stack.person("auditor")
    auditor.login()
    shown = auditor.run("replay", session, "--key-file", str(key_file))
    assert "select 'for the auditor'" in shown.stdout
    assert "the recording is verified" in shown.stdout, "by public keys, so by the platform"

    for person in (alice, auditor):
        closed = person.run("replay", session, check=False)
        assert closed.returncode == 1
        assert "for the auditor" not in closed.stdout
        assert "sealed to auditors only, and the platform cannot open it" in closed.stderr
        assert "HINT: pam-client replay --key-file opens it" in closed.stderr
    page = auditor.web().get(f"{stack.url}/sessions/{session}/parts/1", timeout=90).text
    assert "sealed to auditors only" in page

    other = tmp_path / "other.key"
    auditor.run("recording-key", str(other))
    file = tmp_path / "exported"
    for words in ([], ["--export", "ndjson", "-o", str(file)], ["--export", "asciicast", "-o", str(file)]):
        wrong = auditor.run("replay", session, "--key-file", str(other), *words, check=False)
        assert wrong.returncode == 1
        assert "error: part 1: the recording is not sealed to any of the keys given" in wrong.stderr
        assert not file.exists()
    refused = auditor.run(
        "replay", session, "--key-file", str(key_file), "--export", "har", "-o", str(file), check=False
    )
    assert refused.returncode == 1
    assert "har is for web applications, and this session's protocol is postgres" in refused.stderr
    assert not file.exists()
    auditor.run("replay", session, "--key-file", str(key_file), "--export", "ndjson", "-o", str(file))
    assert "select 'for the auditor'" in file.read_text()
    assert auditor.run("recording-key", str(other), check=False).returncode == 1, "no key is overwritten"


def test_the_agents_own_list_of_recipients_comes_first(stack, alice, key_file) -> None:
    made = subprocess.run(
        [BIN / "pam-client", "recording-key", key_file.with_name("pinned.key"), "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    public = json.loads(made.stdout)
    stack.agent_config = {"recording": {"recipients": [public]}}
    stack.agents = ("dc1-b",)
    stack.processes["dc1-a"].stop()
    stack.start_agent("dc1-b")

    def routed() -> list[str]:
        return [route["agent"] for route in stack.status("pam-relay", "relay")["routes"]]

    # By name: the relay may know the other one's route a moment longer.
    wait_for(lambda: routed() == ["dc1-b"], "the pinned agent's route alone")
    done = alice.run("connect", "demo-db/owner", "--", "psql", "-Xc", "select 1", check=False)
    assert done.returncode != 0
    assert "which this agent does not allow" in done.stderr
