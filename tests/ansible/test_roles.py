"""The roles against themselves: what a role accepts is what its defaults say, and secrets are marked so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ANSIBLE = Path(__file__).parents[2] / "ansible"
ROLES = sorted(path.name for path in (ANSIBLE / "roles").iterdir())
SECRET = re.compile(r"(password|secret|tokens?|key)$")
#: What only sounds so: names of files and modes, and the names of who logs in.
NO_SECRETS = {"pam_common_token_source"}


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def options(role: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = load(ANSIBLE / f"roles/{role}/meta/argument_specs.yml")[
        "argument_specs"
    ]["main"]["options"]
    return found


def defaults(role: str) -> dict[str, Any]:
    found: dict[str, Any] = load(ANSIBLE / f"roles/{role}/defaults/main.yml") or {}
    return found


@pytest.mark.parametrize("role", ROLES)
def test_argument_specs_equal_the_defaults(role: str) -> None:
    assert options(role).keys() == defaults(role).keys()
    for name, option in options(role).items():
        if option.get("required"):
            assert not defaults(role)[name], f"{name}: what is required has no default"
        else:
            assert option["default"] == defaults(role)[name], name


@pytest.mark.parametrize("role", ROLES)
def test_every_default_says_what_it_is(role: str) -> None:
    lines = (ANSIBLE / f"roles/{role}/defaults/main.yml").read_text().splitlines()
    assert lines[0] == "---"
    explained = False
    for line in lines[1:]:
        if line.startswith("#"):
            explained = True
        elif not line:
            explained = False
        elif line.startswith("pam_"):
            assert explained, line


@pytest.mark.parametrize("role", ROLES)
def test_secrets_are_never_printed(role: str) -> None:
    for name, option in options(role).items():
        if SECRET.search(name) and name not in NO_SECRETS and option["type"] != "bool":
            assert option.get("no_log") is True, name


@pytest.mark.parametrize("role", ROLES)
def test_every_role_has_the_same_skeleton(role: str) -> None:
    folder = ANSIBLE / "roles" / role
    wanted = {"README.md", "defaults/main.yml", "meta/main.yml", "meta/argument_specs.yml", "tasks/main.yml"}
    if role != "pam_common":
        wanted |= {"handlers/main.yml", "tasks/preflight.yml", "tasks/install.yml", "tasks/configure.yml"}
        wanted |= {"tasks/remove.yml"}
    assert {name for name in wanted if not (folder / name).is_file()} == set()
    readme = (folder / "README.md").read_text()
    assert {name for name in options(role) if f"`{name}`" not in readme} == set()


def test_a_task_that_holds_a_secret_says_nothing() -> None:
    """Whatever names a variable that is secret, in a module's arguments, has no_log."""
    secret = {name for role in ROLES for name, option in options(role).items() if option.get("no_log")} | {
        "pam_common_token_of",
        "pam_common_login.json",
    }
    for path in ANSIBLE.glob("roles/*/tasks/*.yml"):
        for task in _tasks(load(path)):
            modules = {name: value for name, value in task.items() if name.startswith("ansible.builtin.")}
            if "ansible.builtin.assert" in modules or not any(name in str(modules) for name in secret):
                continue
            assert task.get("no_log") is True, f"{path}: {task['name']}"


def _tasks(tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for task in tasks or []:
        found.append(task)
        for part in ("block", "rescue", "always"):
            found += _tasks(task.get(part, []))
    return found


def test_the_example_inventory_names_only_what_there_is() -> None:
    known = {name for role in ROLES for name in options(role)}
    text = (ANSIBLE / "inventory.example.yml").read_text()
    used = set(re.findall(r"^\s*(?:# )?(pam_\w+):", text, re.MULTILINE))
    groups = {"pam_platform", "pam_relays", "pam_gateways", "pam_clients"}
    assert used - known - groups == set()
    assert set(load(ANSIBLE / "inventory.example.yml")) == groups | {"all"}
