import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pam_common import config
from pam_common.errors import ConfigError

SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["platform"],
    "properties": {
        "platform": {"type": "string"},
        "relay": {
            "type": "object",
            "additionalProperties": False,
            "properties": {"port": {"type": "integer", "minimum": 1, "maximum": 65535}},
        },
        "level": {"enum": ["info", "debug"]},
    },
}


@pytest.fixture
def schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "schemas").mkdir()
    (tmp_path / "schemas" / "probe.json").write_text(json.dumps(SCHEMA))
    # Not importlib's own function: other packages find their files by it.
    monkeypatch.setattr(config, "resources", SimpleNamespace(files=lambda _package: tmp_path))
    return "probe"


def problems(text: str, schema: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config.parse(text, schema, name="agent.yml")
    return caught.value.problems


def test_a_valid_file_gives_its_mapping(schema: str, tmp_path: Path) -> None:
    path = tmp_path / "agent.yml"
    path.write_text("platform: https://pam.example.com\nrelay:\n  port: 2222\n")
    assert config.load(path, schema) == {"platform": "https://pam.example.com", "relay": {"port": 2222}}


def test_all_problems_come_at_once_with_their_lines(schema: str) -> None:
    found = problems("platform: 5\nrelay:\n  port: 99999\n  prt: 1\nlevel: loud\n", schema)
    assert sorted(found) == [
        "agent.yml:1: platform: expected string, got 5",
        "agent.yml:3: relay.port: expected at most 65535, got 99999",
        'agent.yml:4: relay: unknown key "prt" (known: port)',
        'agent.yml:5: level: expected one of info, debug, got "loud"',
    ]


def test_a_key_given_twice_is_refused(schema: str) -> None:
    assert problems("platform: a\nplatform: b\n", schema) == [
        'agent.yml:2: platform: "platform" is given twice'
    ]


def test_what_is_required_is_named(schema: str) -> None:
    assert problems("", schema) == ['agent.yml:1: "platform" is a required property']


@pytest.mark.parametrize("text", ["a: [", "\t- x", "- 1\n", "just text", "!!python/object:os.system {}"])
def test_what_is_not_a_mapping_is_refused(schema: str, text: str) -> None:
    assert problems(text, schema)[0].startswith("agent.yml:")


def test_a_missing_file_says_so(schema: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        config.load(tmp_path / "none.yml", schema)


@pytest.mark.parametrize(
    ("text", "seconds"), [("30", 30), (45, 45), ("30s", 30), ("15m", 900), ("8h", 28800), ("7d", 604800)]
)
def test_durations(text: str | int, seconds: int) -> None:
    assert config.parse_duration(text) == seconds


@pytest.mark.parametrize(("text", "size"), [("16KiB", 16384), ("2GiB", 2 << 30), (7, 7), ("5 MiB", 5 << 20)])
def test_sizes(text: str | int, size: int) -> None:
    assert config.parse_size(text) == size


@given(st.text(max_size=12))
def test_other_durations_and_sizes_raise_value_error(text: str) -> None:
    for parse in (config.parse_duration, config.parse_size):
        try:
            number = parse(text)
        except ValueError:
            continue
        assert number >= 0


#: Each list holds the one before.
ALIASES = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 20))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("platform: 2001-99-99", "agent.yml:1: platform: not a text"),
        ("platform: 2001-01-01", "agent.yml:1: platform: not a text"),
        ("relay:\n  port: !!int abc", "agent.yml:2: relay.port: not a text"),
        ("platform: !!bool x", "agent.yml:1: platform: not a text"),
        ("platform: 0x_", "agent.yml:1: platform: not a text"),
        ("platform: !!set {a}", "agent.yml:1: platform: not a text"),
        ("platform: " + "9" * 5000, "agent.yml:1: platform: not a text"),
        ("platform: 1" + ":1" * 3000, "agent.yml:1: platform: not a text"),
        ("platform: x\n2001-01-01: x", "agent.yml:2: a key is a text"),
        ("relay: {1: x}", "agent.yml:1: relay: a key is a text"),
        ("[" * 3000, "agent.yml:1: not valid YAML: nested more than 20 levels deep"),
        ("a: &a [*a]", "agent.yml:1: a[0]: contains itself"),
        (ALIASES, "agent.yml:1: nested more than 20 levels deep"),
    ],
)
def test_what_yaml_has_beyond_json_is_refused(text: str, problem: str, schema: str) -> None:
    (found,) = problems(text, schema)
    assert found.startswith(problem)


def test_aliases_cannot_make_a_file_endless(schema: str) -> None:
    laughs = "a0: &a0 x\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    (found,) = problems(laughs, schema)
    assert "more than 200000 values" in found


def test_an_oversize_file_is_refused(schema: str, tmp_path: Path) -> None:
    path = tmp_path / "agent.yml"
    with path.open("wb") as file:
        file.truncate(config.MAX_CONFIG + 1)
    with pytest.raises(ConfigError, match="larger than 8388608"):
        config.load(path, schema)
