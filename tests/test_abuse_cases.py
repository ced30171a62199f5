"""docs/security.md names, for each abuse case, tests that exist; and every test named after one is listed."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEADING = "## Abuse cases and the tests that cover them"


def listed() -> set[str]:
    text = (ROOT / "docs/security.md").read_text().partition(HEADING)[2].partition("\n## ")[0]
    return set(re.findall(r"`(tests/[\w/]+\.py::\w+)`", text))


def functions(path: Path) -> set[str]:
    """The names of the test functions in a file, those of classes too."""
    tree = ast.parse(path.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_test_that_is_listed_exists() -> None:
    names = listed()
    assert len(names) > 80
    missing = []
    for name in sorted(names):
        file, _, function = name.partition("::")
        path = ROOT / file
        if not path.is_file() or function not in functions(path):
            missing.append(name)
    assert missing == []


def test_every_test_named_after_a_case_is_listed() -> None:
    named = {
        f"{path.relative_to(ROOT)}::{function}"
        for path in (ROOT / "tests").rglob("test_*.py")
        for function in functions(path)
        if function.startswith("test_abuse_")
    }
    assert named - listed() == set()
