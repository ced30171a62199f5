"""The documentation is true: keys, commands, links, paths, metrics and every bound with its value."""

import ast
import importlib
import json
import os
import re
from collections.abc import Iterator
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

ROOT = Path(__file__).parents[1]
PARTS = ("common", "agent", "relay", "client", "platform")
SKIPPED = {
    ".venv",
    ".git",
    "node_modules",
    ".hypothesis",
    ".pytest_cache",
    ".demo",
    ".bench",
    ".packaging",
    "dist",
    "build",
}


def _documents() -> Iterator[Path]:
    for folder, folders, files in os.walk(ROOT):
        folders[:] = set(folders) - SKIPPED  # not even looked into: what is there comes and goes
        yield from (Path(folder, name) for name in files if name.endswith(".md"))


DOCUMENTS = sorted(_documents())
SCHEMAS = sorted((ROOT / "common/pam_common/schemas").glob("*.json"))
OPERATIONS = ROOT / "docs/operations.md"

CODE_BLOCK = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _section(title: str) -> str:
    """The text below a heading of operations.md, up to the next one of its level or above."""
    text = OPERATIONS.read_text()
    begin = re.search(rf"^(#+) {re.escape(title)}$", text, re.MULTILINE)
    assert begin, f"docs/operations.md has no heading {title}"
    end = re.search(rf"^#{{1,{len(begin[1])}}} ", text[begin.end() :], re.MULTILINE)
    return text[begin.end() : begin.end() + end.start()] if end else text[begin.end() :]


def _rows(text: str) -> Iterator[list[str]]:
    """The cells of every row of every table, without headings and rules."""
    previous = ""
    for line in text.splitlines():
        if line.startswith("|") and not re.fullmatch(r"[|\- ]+", line) and previous.startswith("|"):
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        previous = line


def _words(text: str) -> set[str]:
    """The words within code spans."""
    return {word for span in CODE.findall(text) for word in re.findall(r"[a-z_]+", span)}


# -- configuration ---------------------------------------------------------------------------------------


def _keys(schema: Any) -> set[str]:
    """Every property's name, at any depth."""
    if isinstance(schema, list):
        return set().union(*map(_keys, schema))
    if not isinstance(schema, dict):
        return set()
    named = schema.get("properties", {})
    return set(named).union(*map(_keys, schema.values()), *map(_keys, named.values()))


@pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: path.stem)
def test_every_configuration_key_is_documented(path: Path) -> None:
    missing = _keys(json.loads(path.read_text())) - _words(_section(f"{path.stem}.yml"))
    assert not missing, f"describe {sorted(missing)} of {path.stem}.yml in docs/operations.md"


@pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: path.stem)
def test_every_documented_key_exists(path: Path) -> None:
    known = _keys(json.loads(path.read_text()))
    for cells in _rows(_section(f"{path.stem}.yml")):
        assert _words(cells[0]) <= known, cells[0]


@pytest.mark.parametrize("part", ["agent", "relay"])
def test_the_default_limits_are_the_documented_ones(part: str) -> None:
    limits = importlib.import_module(f"pam_{part}.config").Limits()
    documented = {
        cells[0].strip("`").removeprefix("limits."): cells[1] for cells in _rows(_section(f"{part}.yml"))
    }
    assert {name: documented.get(name) for name in vars(limits)} == {
        name: str(value) for name, value in vars(limits).items()
    }


# -- commands --------------------------------------------------------------------------------------------


PROGRAMS = {
    "pam-agent": ("pam_agent.__main__", "main_command"),
    "pam-relay": ("pam_relay.__main__", "cli"),
    "pam-client": ("pam_client.__main__", "cli"),
    "pam-platform": ("pam_platform.__main__", "group"),
}


def _program(name: str) -> click.Group:
    module, group = PROGRAMS[name]
    found: click.Group = getattr(importlib.import_module(module), group)
    return found


def _commands() -> Iterator[str]:
    for name in PROGRAMS:
        yield from _leaves(name, _program(name))


def _leaves(path: str, command: click.Command) -> Iterator[str]:
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            yield from _leaves(f"{path} {name}", child)
    else:
        yield path


@pytest.mark.parametrize("command", list(_commands()))
def test_every_command_is_documented(command: str) -> None:
    text = OPERATIONS.read_text() + (ROOT / "README.md").read_text()
    assert re.search(rf"{re.escape(command)}\b", text), f"docs/operations.md lacks {command}"


def _groups(path: str, command: click.Command) -> Iterator[str]:
    if isinstance(command, click.Group):
        yield path
        for name, child in command.commands.items():
            yield from _groups(f"{path} {name}", child)


def _help(command: str) -> str:
    """As a terminal of 80 columns shows it."""
    program, *words = command.split()
    runner = CliRunner(env={"COLUMNS": "80"})
    return runner.invoke(_program(program), [*words, "--help"], prog_name=program).output


@pytest.mark.parametrize("command", list(_commands()))
def test_every_command_has_an_example(command: str) -> None:
    _, _, below = _help(command).partition("\n  Example")
    program, _, words = command.partition(" ")
    assert re.search(rf"\b{program}( --config \S+)? {words}\b", below), below


@pytest.mark.parametrize(
    "command", [*_commands(), *(group for name in PROGRAMS for group in _groups(name, _program(name)))]
)
def test_help_fits_a_terminal_of_80_columns(command: str) -> None:
    wide = [line for line in _help(command).splitlines() if len(line) > 80]
    assert not wide, "shorten it, or put its comment above: what is wider wraps in mid-word"


def test_every_documented_command_exists() -> None:
    commands = set(_commands())
    for cells in _rows(_section("Commands")):
        words = cells[0].strip("`").split()
        assert {" ".join(words[:2]), " ".join(words[:3])} & commands, cells[0]


# -- metrics ---------------------------------------------------------------------------------------------


def test_the_documented_metrics_are_those_of_the_relay() -> None:
    from pam_relay.metrics import Metrics

    metrics = Metrics()
    metrics.watch(lambda: {})
    served = {
        f"{family.name}_total" if family.type == "counter" else family.name
        for family in metrics.registry.collect()
    }
    documented = {cells[0].strip("`") for cells in _rows(_section("Metrics"))}
    assert served == documented


# -- messages --------------------------------------------------------------------------------------------


@cache
def _source() -> str:
    """All of the source, with string literals that stand side by side joined."""
    files = [path for part in PARTS for path in sorted((ROOT / part).rglob("*.py"))]
    text = "\n".join(path.read_text() for path in files)
    return re.sub(r"[\"']\s*\n\s*f?[\"']", "", text)


def _messages(section: str, column: int) -> Iterator[str]:
    for cells in _rows(_section(section)):
        yield from CODE.findall(cells[column])


@pytest.mark.parametrize("message", [*_messages("Troubleshooting", 0), *_messages("Logs", 0)])
def test_a_quoted_message_is_one_of_the_source(message: str) -> None:
    """In the documents "…" stands for what varies; capital words stand for the reader's own names."""
    for piece in re.split(r"…|\b[A-Z]{3,}\b", message):
        if len(piece.strip()) > 3:
            assert piece.strip(" :()\"',;").lower() in _source().lower(), piece


# -- links and paths -------------------------------------------------------------------------------------


def _anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, made as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", CODE_BLOCK.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=_name)
def test_links_lead_somewhere(path: Path) -> None:
    text = CODE.sub("", CODE_BLOCK.sub("", path.read_text()))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        if anchor:
            assert anchor in _anchors(target), link


@pytest.mark.parametrize("path", DOCUMENTS, ids=_name)
def test_paths_exist(path: Path) -> None:
    spans = CODE.findall(CODE_BLOCK.sub("", path.read_text()))
    named = {span for span in spans if re.match(rf"(tests|docs|{'|'.join(PARTS)})/\S*$", span)}
    assert {span for span in named if not _is_there(span.partition("::")[0])} == set()


def _is_there(pattern: str) -> bool:
    # git keeps no empty folder: what holds no file is not there after a checkout.
    matches = ROOT.glob(pattern.rstrip("/"))
    return any(file.is_file() for match in matches for file in (match, *match.rglob("*")))


# -- bounds ----------------------------------------------------------------------------------------------

UNITS = {
    "": 1,
    "ms": 1,  # the constant is in milliseconds, too
    "s": 1,
    "min": 60,
    "h": 3600,
    "d": 86400,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
}
#: What bounds a buffer, a queue, a count or a time is named so.
BOUND = re.compile(
    r"(^|_)(MAX|LIMIT|TIMEOUT|INTERVAL|LIFETIME|SECONDS|DEADLINE|WAIT|SILENCE|RETENTION|PERIOD)(_|$)"
)
#: Numbers of wire and file formats: docs/secure-channel.md and docs/recording-format.md.
FORMATS = {"pam_common.frames", "pam_common.handshake", "pam_common.noise", "pam_common.recording.format"}
#: Not bounds of anything that runs: the end of time in a date check, and the width of a shown line.
NO_BOUNDS = {
    "pam_common.tokens._MAX_TIME",
    "pam_platform.access.apply.changes._MAX_SHOWN",
    "pam_platform.recordings.uploads._MAX_TIME",
    "pam_platform.recordings.uploads._MAX_TRIES",
    "pam_platform.vault.master._MAX_FILE",
}


@cache
def _constants() -> dict[str, float]:
    """Every numeric constant of the source, by its full name; times in seconds."""
    found: dict[str, float] = {}
    for part in PARTS:
        for path in sorted((ROOT / part / f"pam_{part}").rglob("*.py")):
            module = ".".join(path.relative_to(ROOT / part).with_suffix("").parts).removesuffix(".__init__")
            found |= {f"{module}.{name}": value for name, value in _constants_of(path)}
    return found


def _constants_of(path: Path) -> Iterator[tuple[str, float]]:
    """Read, not imported: some of these modules need a configured Django."""
    scope: dict[str, Any] = {"__builtins__": {}, "timedelta": timedelta}
    for statement in ast.parse(path.read_text()).body:
        scope |= _imported(statement)
        for name, value in _assigned(statement, scope):
            scope[name] = value
            number = value.total_seconds() if isinstance(value, timedelta) else value
            if isinstance(number, int | float) and not isinstance(number, bool):
                yield name, number


def _imported(statement: ast.stmt) -> dict[str, Any]:
    """The numeric constants that ``from pam_… import …`` brings."""
    if not isinstance(statement, ast.ImportFrom) or not (statement.module or "").startswith("pam_"):
        return {}
    module = str(statement.module)
    path = ROOT / module.split("_", 1)[1].split(".")[0] / (module.replace(".", "/") + ".py")
    constants = dict(_constants_of(path)) if path.is_file() else {}
    return {name.name: constants[name.name] for name in statement.names if name.name in constants}


def _assigned(statement: ast.stmt, scope: dict[str, Any]) -> list[tuple[str, Any]]:
    """The names and values of ``NAME = …`` and ``A, B = …, …``; nothing where the value is no constant."""
    target = statement.targets[0] if isinstance(statement, ast.Assign) else getattr(statement, "target", None)
    expression = getattr(statement, "value", None)
    if expression is None or not isinstance(target, ast.Name | ast.Tuple):
        return []
    try:
        value = eval(compile(ast.Expression(expression), "constant", "eval"), scope)
    except Exception:  # noqa: BLE001  # a call, a name from elsewhere: no constant
        return []
    if isinstance(target, ast.Name):
        return [(target.id, value)] if target.id.isupper() else []
    return [
        (name.id, item) for name, item in zip(target.elts, value, strict=True) if isinstance(name, ast.Name)
    ]


def _documented() -> dict[str, str]:
    """The value that the tables give for each constant they name."""
    found: dict[str, str] = {}
    for cells in _rows(_section("Bounds")):
        names = [name for name in CODE.findall(cells[2]) if re.match(r"pam_\w+\.", name)]
        if names:
            values = cells[1].split(" / ")
            assert len(names) == len(values), cells
            found |= dict(zip(names, values, strict=True))
    return found


@pytest.mark.parametrize(("name", "text"), _documented().items(), ids=lambda item: item)
def test_a_documented_bound_is_that_of_the_source(name: str, text: str) -> None:
    number = re.fullmatch(rf"([0-9.]+) ?({'|'.join(UNITS)})", text)
    assert number, text
    assert name in _constants(), "there is no such constant"
    assert float(number[1]) * UNITS[number[2]] == _constants()[name]


def test_every_bound_is_documented() -> None:
    bounds = {
        name
        for name in _constants()
        if BOUND.search(name.rpartition(".")[2]) and name.rpartition(".")[0] not in FORMATS
    }
    missing = bounds - NO_BOUNDS - _documented().keys()
    assert not missing, f"add to the tables of bounds in docs/operations.md: {sorted(missing)}"


#: For each bound the test, or tests, that go past it: by its constant, else by table and first cell.
BOUND_TESTS: dict[str, str | list[str]] = json.loads((ROOT / "tests/bounds.json").read_text())


def _bounds() -> Iterator[str]:
    """How ``bounds.json`` names each bound of the tables."""
    for table in re.findall(r"^### (.+)$", _section("Bounds"), re.MULTILINE):
        for cells in _rows(_section(table)):
            names = [name for name in CODE.findall(cells[2]) if re.match(r"pam_\w+\.", name)]
            yield from names or [f"{table}: {cells[0]}"]


@cache
def _tests_of(file: str) -> set[str]:
    path = ROOT / file
    tree = ast.parse(path.read_text()) if path.is_file() else ast.Module([], [])
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_bound_has_a_test_that_goes_past_it() -> None:
    missing = set(_bounds()) - BOUND_TESTS.keys()
    assert not missing, f"write a test that goes past each, and name it in tests/bounds.json: {missing}"


def test_every_bound_with_a_test_is_documented() -> None:
    stale = BOUND_TESTS.keys() - set(_bounds())
    assert not stale, f"tests/bounds.json names what docs/operations.md does not: {stale}"


@pytest.mark.parametrize("bound", BOUND_TESTS)
def test_the_test_of_a_bound_exists(bound: str) -> None:
    named = BOUND_TESTS[bound]
    for test in [named] if isinstance(named, str) else named:
        file, _, name = test.partition("::")
        assert name in _tests_of(file), test
