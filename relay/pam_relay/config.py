"""``relay.yml`` as a frozen dataclass."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pam_common import config
from pam_common.errors import ConfigError, PamError
from pam_common.platform_client import check_base_url
from pam_relay.metrics import parse_loopback

#: In place of an address: the port is opened by pam-relay.socket.
SYSTEMD = "systemd"


@dataclass(frozen=True)
class Limits:
    """Caps on what runs at once, all of them in ``limits:`` of relay.yml."""

    #: Connections that have not logged in: each costs a thread and 128 KiB, and comes from anybody.
    unauthenticated: int = 100
    #: Of these, from one address: an office behind one NAT logs in within milliseconds each.
    unauthenticated_per_address: int = 20
    #: Seconds from the first byte to a proven login; a slow link needs two or three.
    login_timeout: int = 20
    #: Connections in all, one thread each.
    transports: int = 2000
    #: Channels in all: no thread, and when a side is slow a window of 2 MiB each.
    channels: int = 1000
    #: A large pool of one program.
    channels_per_session: int = 200
    #: What an agent takes by its own default.
    channels_per_agent: int = 1000


@dataclass(frozen=True)
class RelayConfig:
    """What the relay's administrator decided."""

    path: Path
    platform: str
    platform_ca: Path | None
    state_dir: Path
    runtime_dir: Path
    #: Address and port; None: the sockets that systemd passes.
    listen: tuple[str, int] | None
    metrics: str | None
    #: Seconds between two looks at the platform's bundle: how long a revocation takes to arrive here.
    poll_interval: int
    #: Seconds that open channels are given after SIGTERM.
    drain_timeout: int
    limits: Limits = field(default_factory=Limits)
    log_level: str = "info"

    @property
    def status_socket(self) -> Path:
        return self.runtime_dir / "status.sock"


def load(path: Path) -> RelayConfig:
    """Read and check ``path``. Raises ConfigError with every problem."""
    return _from_mapping(config.load(path, "relay"), path)


def _from_mapping(document: dict[str, Any], path: Path) -> RelayConfig:
    problems: list[str] = []

    def check(key: str, convert: Any) -> Any:
        try:
            return convert(document[key]) if key in document else None
        except (ValueError, PamError) as error:
            problems.append(f"{path.name}: {key}: {error}")
            return None

    check("platform", check_base_url)
    listen = check("listen", parse_listen)
    check("metrics", parse_loopback)
    platform_ca = Path(document["platform_ca"]) if "platform_ca" in document else None
    if platform_ca is not None and not platform_ca.is_file():
        problems.append(f"{path.name}: platform_ca: no such file: {platform_ca}")
    if problems:
        raise ConfigError(problems)
    return RelayConfig(
        path=path,
        platform=document["platform"],
        platform_ca=platform_ca,
        state_dir=Path(document["state_dir"]),
        runtime_dir=Path(document["runtime_dir"]),
        listen=listen,
        metrics=document.get("metrics"),
        poll_interval=config.parse_duration(document.get("poll_interval", 10)),
        drain_timeout=config.parse_duration(document.get("drain_timeout", "5m")),
        limits=Limits(**document.get("limits", {})),
        log_level=document.get("log_level", "info"),
    )


def parse_listen(address: str) -> tuple[str, int] | None:
    """Host and port of ``0.0.0.0:2222`` or ``[::]:2222``; None for ``systemd``. Raises ValueError."""
    if address == SYSTEMD:
        return None
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not port.isdigit() or not 0 <= int(port) <= 65535:
        raise ValueError(f'expected an address and port such as 0.0.0.0:2222, got "{address}"')
    return str(ipaddress.ip_address(host)), int(port)
