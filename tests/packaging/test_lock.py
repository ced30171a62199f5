"""The lock says what pyproject.toml asks for, and the packages' descriptions say what they carry."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pam_packages import documents, manual
from pam_packages.locking import read_lock
from pam_packages.parts import COMMON, COMPONENTS, PACKAGING, PARTS, ROOT, requirements


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_the_lock_holds_what_pyproject_asks_for(part) -> None:
    locked = {release.name: release.version for each in (COMMON, part) for release in read_lock(each)}
    for text in requirements(part):
        wanted = Requirement(text)
        version = locked.get(canonicalize_name(wanted.name))
        assert version, f"{wanted.name} is not locked; run `make lock`"
        assert wanted.specifier.contains(version, prereleases=True), f"{text}: run `make lock`"


def test_nothing_is_carried_twice_by_a_host() -> None:
    common = {release.name for release in read_lock(COMMON)}
    for part in COMPONENTS:
        assert not common & {release.name for release in read_lock(part)}


def test_every_locked_release_has_hashes() -> None:
    for part in PARTS:
        for release in read_lock(part):
            assert release.hashes, release
            assert all(len(digest) == 64 for digest in release.hashes)


@pytest.mark.parametrize("part", COMPONENTS, ids=lambda part: part.name)
def test_the_manual_page_tells_every_command_and_key(part) -> None:
    page = manual.page(part, documents.command_of(part), "1.2.3", datetime(2026, 1, 31, tzinfo=UTC))
    plain = page.replace("\\-", "-").replace("\\e", "\\")
    for words in documented_commands(part):
        assert f".SS {words}" in plain
    schema = json.loads((ROOT / f"common/pam_common/schemas/{part.name}.json").read_text())
    for key in schema["properties"]:
        assert key in plain, key
    assert not [line for line in page.splitlines() if line.startswith("'")]


def documented_commands(part) -> list[str]:
    command = documents.command_of(part)
    return [f"{part.package} {name}" for name in command.commands]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_asks_the_program(shell) -> None:
    for part in COMPONENTS:
        script = documents.completion(part, documents.command_of(part), shell)
        assert part.package in script
        assert f"_{part.package.upper().replace('-', '_')}_COMPLETE" in script


@pytest.mark.parametrize("path", sorted((PACKAGING / "files/etc").iterdir()), ids=lambda path: path.stem)
def test_a_packaged_configuration_is_complete_but_for_what_only_the_site_knows(path: Path) -> None:
    from pam_common import config
    from pam_common.errors import ConfigError

    text = path.read_text()
    if path.stem == "agent":
        with pytest.raises(ConfigError, match="allow_targets"):
            config.parse(text, "agent", name="agent.yml")
        text = text.replace("allow_targets: []", 'allow_targets: ["10.0.0.0/24:5432"]')
    config.parse(text, path.stem, name=path.name)
