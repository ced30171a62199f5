"""``agent.yml`` as a frozen dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pam_agent.target import TargetRules, parse_rule
from pam_common import config
from pam_common.errors import ConfigError, PamError
from pam_common.platform_client import check_base_url
from pam_common.recording.format import Recipient, RecordingError

#: A recipient as the file names it: the key id, and the raw X25519 key where it is pinned here.
AllowedRecipient = tuple[str, bytes | None]


@dataclass(frozen=True)
class Limits:
    """Caps on what runs at once. A connection costs two threads and some 3 MiB of ssh window."""

    sessions: int = 500
    connections: int = 1000
    #: Above any sensible pool of one user; one user cannot take the whole agent.
    connections_per_session: int = 200


@dataclass(frozen=True)
class AgentConfig:
    """What the agent's administrator decided. The platform can narrow it, never widen it."""

    path: Path
    platform: str
    platform_ca: Path | None
    state_dir: Path
    runtime_dir: Path
    allow_targets: TargetRules
    #: Who may be given a recording's key; None: the platform keys of the signed trust list.
    recipients: tuple[AllowedRecipient, ...] | None
    max_spool: int
    tunnels_per_relay: int
    grace: int
    drain_timeout: int
    limits: Limits
    log_level: str

    @property
    def status_socket(self) -> Path:
        return self.runtime_dir / "status.sock"


def load(path: Path) -> AgentConfig:
    """Read and check ``path``. Raises ConfigError with every problem."""
    return _from_mapping(config.load(path, "agent"), path)


def _from_mapping(document: dict[str, Any], path: Path) -> AgentConfig:
    problems: list[str] = []
    rules = []
    for index, entry in enumerate(document["allow_targets"]):
        try:
            rules.append(parse_rule(entry))
        except ValueError as error:
            problems.append(f"{path.name}: allow_targets[{index}]: {error}")
    try:
        check_base_url(document["platform"])
    except PamError as error:
        problems.append(f"{path.name}: platform: {error}")
    platform_ca = Path(document["platform_ca"]) if "platform_ca" in document else None
    if platform_ca is not None and not platform_ca.is_file():
        problems.append(f"{path.name}: platform_ca: no such file: {platform_ca}")
    recording = document.get("recording", {})
    recipients = _recipients(recording.get("recipients"), path.name, problems)
    if problems:
        raise ConfigError(problems)
    return AgentConfig(
        path=path,
        platform=document["platform"],
        platform_ca=platform_ca,
        state_dir=Path(document["state_dir"]),
        runtime_dir=Path(document["runtime_dir"]),
        allow_targets=TargetRules(rules),
        recipients=recipients,
        max_spool=config.parse_size(recording.get("max_spool", "2GiB")),
        tunnels_per_relay=document.get("tunnels_per_relay", 1),
        grace=config.parse_duration(document.get("grace", "15m")),
        drain_timeout=config.parse_duration(document.get("drain_timeout", "30s")),
        limits=Limits(**document.get("limits", {})),
        log_level=document.get("log_level", "info"),
    )


def _recipients(
    entries: list[str | dict[str, str]] | None, name: str, problems: list[str]
) -> tuple[AllowedRecipient, ...] | None:
    if entries is None:
        return None
    found: list[AllowedRecipient] = []
    for index, entry in enumerate(entries):
        if isinstance(entry, str):
            found.append((entry, None))
            continue
        try:
            recipient = Recipient.from_json(entry)
        except RecordingError as error:
            problems.append(f"{name}: recording.recipients[{index}]: {error}")
        else:
            found.append((recipient.kid, recipient.key))
    return tuple(found)
