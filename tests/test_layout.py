"""The tree's own rules, each learned by breaking it once."""

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("common", "agent", "relay", "client", "platform")
SOURCES = sorted(path for part in PARTS for path in (ROOT / part / f"pam_{part}").rglob("*.py"))


def test_platform_has_no_init_file() -> None:
    # It would shadow the standard library's `platform` for everything started in the root folder.
    assert not (ROOT / "platform" / "__init__.py").exists()


def test_tests_have_no_init_files() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_jsonschema_comes_without_its_optional_formats() -> None:
    # Its import would take each program that reads a configuration three seconds of CPU instead of a third.
    assert importlib.util.find_spec("rfc3987_syntax") is None, (
        "what brings it belongs into tests/apps.txt; an old .venv: make clean"
    )


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_source_file_is_small_and_says_what_it_is_for(path: Path) -> None:
    text = path.read_text()
    if "/migrations/" in str(path):
        return
    assert text.count("\n") <= 500, "split it by meaning"
    if path.name != "__init__.py" or text.strip():
        assert ast.get_docstring(ast.parse(text)), "begin with a docstring"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_private_names_of_paramiko_stay_in_fast_ssh(path: Path) -> None:
    if path.parts[-2:] == ("pam_common", "fast_ssh.py") or "fast_ssh" in path.parts:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("paramiko"):
            assert not any(alias.name.startswith("_") for alias in node.names)


def test_a_protocol_is_known_to_all_parts() -> None:
    from pam_agent.protocols import PROTOCOLS
    from pam_client.launch import LAUNCHES

    schema = json.loads((ROOT / "common/pam_common/schemas/access.json").read_text())
    declared = re.search(
        r"_DEFAULT_PORTS = (\{.*\})", (ROOT / "platform/pam_platform/access/granting.py").read_text()
    )
    assert declared
    names = set(PROTOCOLS)
    assert names == set(LAUNCHES), "how the client starts a native program"
    assert names == set(ast.literal_eval(declared[1])), "the port a native program expects"
    assert names == set(_protocols_of(schema)), "what access.yml takes"
    headings = re.findall(r"^### Agent: (\w+)$", (ROOT / "docs/operations.md").read_text(), re.MULTILINE)
    assert all(any(heading.lower().startswith(name) for heading in headings) for name in names), "its bounds"


def _protocols_of(schema: object) -> list[str]:
    """The one list of protocols in the schema, wherever it stands."""
    if not isinstance(schema, dict):
        return []
    here = schema.get("protocol", {}).get("enum", []) if isinstance(schema.get("protocol"), dict) else []
    return [*here, *(name for child in schema.values() for name in _protocols_of(child))]


def test_nothing_here_names_a_folder_of_one_machine() -> None:
    home = str(Path.home())
    if home in ("/", "/root"):
        home = "/root/"
    for path in [*ROOT.glob("*.*"), *(ROOT / "docs").rglob("*"), *SOURCES, ROOT / "Makefile"]:
        if path.is_file() and path.suffix not in (".png",):
            assert str(ROOT) + "/" not in path.read_text(errors="replace"), path
            assert home not in path.read_text(errors="replace"), path
