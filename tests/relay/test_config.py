"""``relay.yml``: what is accepted, and that every problem is told at once."""

from __future__ import annotations

import dataclasses
import json
from importlib import resources
from pathlib import Path

import pytest

from pam_common.errors import ConfigError
from pam_relay.config import Limits, load

GOOD = {
    "platform": "https://pam.example.com",
    "state_dir": "/var/lib/pam-relay",
    "runtime_dir": "/run/pam-relay",
    "listen": "0.0.0.0:2222",
}


def write(tmp_path: Path, **changes: object) -> Path:
    path = tmp_path / "relay.yml"
    path.write_text(json.dumps({**GOOD, **changes}))
    return path


def test_the_least_configuration_has_the_documented_defaults(tmp_path) -> None:
    config = load(write(tmp_path))
    assert config.listen == ("0.0.0.0", 2222)
    assert config.limits == Limits()
    assert (config.poll_interval, config.drain_timeout, config.metrics) == (10, 300, None)


def test_everything_can_be_set(tmp_path) -> None:
    config = load(
        write(
            tmp_path,
            listen="[::]:2222",
            metrics="[::1]:9102",
            poll_interval="30s",
            drain_timeout="1h",
            limits={"channels": 5},
            log_level="debug",
        )
    )
    assert config.listen == ("::", 2222)
    assert config.limits.channels == 5
    assert config.drain_timeout == 3600


@pytest.mark.parametrize(
    "changes",
    [
        {"metrics": "0.0.0.0:9102"},
        {"metrics": "192.0.2.1:9102"},
        {"listen": "relay.example.com:2222"},
        {"listen": "0.0.0.0:99999"},
        {"listen": "2222"},
        {"platform": "http://pam.example.com"},
        {"platform_ca": "/no/such/file"},
        {"limits": {"channels": 0}},
        {"limits": {"unknown": 1}},
        {"poll_interval": "0s"},
        {"state_dir": "relative"},
        {"unknown": 1},
    ],
)
def test_a_wrong_value_is_refused(tmp_path, changes) -> None:
    with pytest.raises(ConfigError):
        load(write(tmp_path, **changes))


def test_problems_come_all_at_once(tmp_path) -> None:
    with pytest.raises(ConfigError) as refused:
        load(write(tmp_path, metrics="0.0.0.0:1", listen="x:1", platform="http://pam.example.com"))
    assert len(refused.value.problems) == 3


def test_schema_and_limits_name_the_same_keys() -> None:
    schema = json.loads(resources.files("pam_common").joinpath("schemas", "relay.json").read_text())
    assert set(schema["properties"]["limits"]["properties"]) == {
        field.name for field in dataclasses.fields(Limits)
    }
