"""YAML configuration, checked against a JSON schema before anything runs.

Unknown keys, wrong values and duplicate keys are refused, all at once, each with file and line:
``agent.yml:12: relay.port: expected at most 65535, got 99999``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml

from pam_common.errors import ConfigError

if TYPE_CHECKING:
    from jsonschema.exceptions import ValidationError

#: A configuration of thousands of resources is far below it; a larger file is a mistake.
MAX_CONFIG = 8 << 20
#: Aliases can make more of a file than it holds; ten thousand resources have fewer.
MAX_VALUES = 200_000
#: Lists and mappings inside each other; the deepest of ours have eight. YAML's reader takes the square of it
#: in time.
MAX_DEPTH = 20
#: Characters of a number; no reasonable one comes near.
_NUMBER = 40

_TAG = "tag:yaml.org,2002:"
_TOO_DEEP = f"nested more than {MAX_DEPTH} levels deep"

Key = str | int
Lines = dict[tuple[Key, ...], int]


def load(path: Path, schema: str) -> dict[str, Any]:
    """Return the mapping in ``path``, valid under ``pam_common/schemas/<schema>.json``.

    Raises ConfigError with every problem found. An empty file is an empty mapping.
    """
    return parse(_read(path), schema, name=path.name)


def parse(text: str, schema: str, *, name: str) -> dict[str, Any]:
    """Like :func:`load` for text; ``name`` stands for the file in messages."""
    try:
        document, lines = _document(text, name)
    except yaml.YAMLError as error:
        raise ConfigError([_yaml_problem(name, error)]) from None
    problems = [_problem(name, error, lines) for error in _errors(document, schema)]
    if problems:
        raise ConfigError(problems)
    assert isinstance(document, dict)
    return document


def parse_duration(value: str | int) -> int:
    """Seconds of ``30``, ``"30s"``, ``"15m"``, ``"8h"`` or ``"7d"``. Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = re.fullmatch(r"([0-9]{1,9})([smhd]?)", str(value))
    if not match:
        raise ValueError(f'expected a duration such as 30s, 15m, 8h or 7d, got "{value}"')
    return int(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


def parse_size(value: str | int) -> int:
    """Bytes of ``1024``, ``"16KiB"``, ``"512MiB"`` or ``"2GiB"``. Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = re.fullmatch(r"([0-9]{1,12}) ?(B|KiB|MiB|GiB|TiB)?", str(value))
    if not match:
        raise ValueError(f'expected a size such as 16KiB, 512MiB or 2GiB, got "{value}"')
    factor = {None: 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
    return int(match[1]) * factor[match[2]]


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG + 1)
        if len(data) > MAX_CONFIG:
            raise ConfigError([f"{path}: larger than {MAX_CONFIG} bytes"])
        return data.decode()
    except OSError as error:
        raise ConfigError([f"{path}: {error.strerror or error}"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: not UTF-8 at byte {error.start}"]) from None


def _document(text: str, name: str) -> tuple[Any, Lines]:
    """Return the YAML document and the lines of its values."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return {}, {(): 1}
        lines: Lines = {}
        problems = [f"{name}:{line}: {problem}" for line, problem in _survey(node, (), lines, [])]
        if problems:
            raise ConfigError(problems)
        return loader.construct_document(node), lines
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    """A SafeLoader that gives up at ``MAX_DEPTH``, not at Python's own much later end."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self._depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=_TOO_DEEP, problem_mark=self.get_mark())
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


def _survey(
    node: yaml.Node, at: tuple[Key, ...], lines: Lines, above: list[yaml.Node]
) -> Iterator[tuple[int, str]]:
    """Note the line of every value; yield duplicate keys, which YAML itself would swallow.

    ``above`` are the lists and mappings around ``node``: an alias can put one into itself, or make them many.
    """
    line = node.start_mark.line + 1
    lines.setdefault(at, line)
    if len(lines) > MAX_VALUES:
        raise yaml.MarkedYAMLError(problem=f"more than {MAX_VALUES} values", problem_mark=node.start_mark)
    if len(above) > MAX_DEPTH:
        yield line, _TOO_DEEP
    elif any(node is one for one in above):
        yield line, f"{_dotted(at)}contains itself"
    elif not _is_plain(node):
        yield line, f"{_dotted(at)}not a text, number, list or mapping; a text may need quotes"
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            name = str(key.value)
            if key.tag not in (_TAG + "str", _TAG + "merge"):
                yield key.start_mark.line + 1, f"{_dotted(at)}a key is a text; it may need quotes"
            if name in seen:
                yield key.start_mark.line + 1, f'{_dotted((*at, name))}"{name}" is given twice'
            seen.add(name)
            lines[(*at, name)] = key.start_mark.line + 1
            yield from _survey(value, (*at, name), lines, [*above, node])
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _survey(value, (*at, index), lines, [*above, node])


def _is_plain(node: yaml.Node) -> bool:
    """Whether it is what JSON has too: no date or set, no number that YAML itself trips over."""
    kind = node.tag.removeprefix(_TAG)
    if not isinstance(node, yaml.ScalarNode):
        return kind == ("map" if isinstance(node, yaml.MappingNode) else "seq")
    if kind not in ("int", "float", "bool", "null"):
        return kind == "str"
    try:
        yaml.constructor.SafeConstructor().construct_object(node)
    except (ValueError, KeyError, IndexError):
        return False  # `!!int abc`, `!!bool x`, `0x_`
    return len(node.value) <= _NUMBER


def _errors(document: Any, schema: str) -> list[ValidationError]:
    # Here, as it takes long to import and a pam-client without a configuration file needs none of it.
    import jsonschema

    source = resources.files("pam_common").joinpath("schemas", f"{schema}.json").read_text()
    validator = jsonschema.Draft202012Validator(
        json.loads(source), format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    return sorted(validator.iter_errors(document), key=lambda error: [str(part) for part in error.path])


def _problem(name: str, error: ValidationError, lines: Lines) -> str:
    where: tuple[Key, ...] = tuple(error.absolute_path)
    schema: dict[str, Any] = error.schema if isinstance(error.schema, dict) else {}
    # The error about an unknown key is the mapping's; its line is the key's.
    if error.validator == "additionalProperties":
        known = set(schema.get("properties", {}))
        unknown = [key for key in cast("dict[str, Any]", error.instance) if key not in known]
        line = min((lines.get((*where, key), 1) for key in unknown), default=1)
        names = ", ".join(f'"{key}"' for key in unknown)
        allowed = ", ".join(sorted(known))
        return f"{name}:{line}: {_dotted(where)}unknown key {names} (known: {allowed})"
    prefix = f"{name}:{_line(where, lines)}: {_dotted(where)}"
    return prefix + _words(error, schema)


def _words(error: ValidationError, schema: dict[str, Any]) -> str:
    got = json.dumps(error.instance, default=str)
    got = got if len(got) <= 80 else got[:77] + "…"
    expected: Any = error.validator_value
    match error.validator:
        case "required":
            return str(error.message).replace("'", '"')
        case "type":
            return f"expected {expected if isinstance(expected, str) else ' or '.join(expected)}, got {got}"
        case "enum":
            return f"expected one of {', '.join(map(str, expected))}, got {got}"
        case "minimum":
            return f"expected at least {expected}, got {got}"
        case "maximum":
            return f"expected at most {expected}, got {got}"
        case "pattern":
            meant = schema.get("description")
            return f"expected {meant}, got {got}" if meant else f"does not match {expected}: {got}"
        case _:
            return str(schema.get("description") or error.message)


def _line(where: tuple[Key, ...], lines: Lines) -> int:
    while where and where not in lines:
        where = where[:-1]
    return lines.get(where, 1)


def _dotted(where: tuple[Key, ...]) -> str:
    if not where:
        return ""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where)
    return text.removeprefix(".") + ": "


def _yaml_problem(name: str, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    line = mark.line + 1 if mark else 1
    return f"{name}:{line}: not valid YAML: {getattr(error, 'problem', None) or error}"
