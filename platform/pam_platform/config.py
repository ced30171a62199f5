"""platform.yml as a frozen dataclass, and the folders and files that follow from it."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from pam_common import config
from pam_common.errors import ConfigError, PamError
from pam_common.files import read_private
from pam_common.recording.format import Recipient, RecordingError

#: Names the configuration for whatever imports Django's settings: the commands set it from --config.
CONFIG_VARIABLE = "PAM_PLATFORM_CONFIG"
DEFAULT_CONFIG = Path("/etc/pam-platform/platform.yml")

#: One long-polling agent holds one thread and half of them may be held so; 32 serve 16 agents at once,
#: and more agents are answered without waiting.
DEFAULT_THREADS = 32
DEFAULT_WORKERS = 1


@dataclass(frozen=True)
class Tls:
    """Certificate chain and key that the platform itself serves HTTPS with."""

    cert: Path
    key: Path


@dataclass(frozen=True)
class Database:
    """A PostgreSQL to use instead of the SQLite file in ``state_dir``."""

    host: str
    port: str
    name: str
    user: str
    password_file: Path | None = None
    options: dict[str, str] = field(default_factory=dict)

    def django(self) -> dict[str, Any]:
        """The entry of Django's DATABASES; reads the password file."""
        password = ""
        if self.password_file is not None:
            try:
                password = read_private(self.password_file).decode().rstrip("\r\n")
            except FileNotFoundError:
                raise ConfigError([f"database.password_file: {self.password_file} does not exist"]) from None
        return {
            "ENGINE": "django.db.backends.postgresql",
            "HOST": self.host,
            "PORT": self.port,
            "NAME": self.name,
            "USER": self.user,
            "PASSWORD": password,
            "OPTIONS": {"connect_timeout": 10, **self.options},
            # Kept per thread; longer saves nothing and holds the server's connections.
            "CONN_MAX_AGE": 60,
            "CONN_HEALTH_CHECKS": True,
        }


@dataclass(frozen=True)
class PlatformConfig:
    """The checked platform.yml. ``public_url`` is also the issuer of everything the platform signs."""

    public_url: str
    state_dir: Path
    listen_host: str
    listen_port: int
    recordings: Path
    #: Auditors whose keys recordings are sealed to, beside the platform's own (or instead of it).
    recording_recipients: tuple[Recipient, ...] = ()
    recording_platform_key: bool = True
    tls: Tls | None = None
    database: Database | None = None
    vault_key: Path | None = None
    behind_proxy: bool = False
    workers: int = DEFAULT_WORKERS
    threads: int = DEFAULT_THREADS
    log_level: str = "info"

    @property
    def keys_dir(self) -> Path:
        return self.state_dir / "keys"

    @property
    def secret_key_file(self) -> Path:
        return self.keys_dir / "secret-key"

    @property
    def oidc_key_file(self) -> Path:
        return self.keys_dir / "oidc.pem"

    @property
    def sqlite_file(self) -> Path:
        return self.state_dir / "platform.sqlite3"

    @property
    def host(self) -> str:
        """The host name people use."""
        return urlsplit(self.public_url).hostname or ""


def load(path: Path) -> PlatformConfig:
    """Read and check ``path``. Raises ConfigError with every problem."""
    values = config.load(path, "platform")
    problems: list[str] = []
    public_url = values["public_url"].rstrip("/")
    _check_url(public_url, problems)
    host, port = _listen(values.get("listen", "127.0.0.1:8443"), problems)
    tls = values.get("tls")
    behind_proxy = values.get("behind_proxy", False)
    if tls is None and not behind_proxy and not _is_loopback(host):
        problems.append("listen: plain http on an address that others reach; set tls, or behind_proxy: true")
    if tls is not None and behind_proxy:
        problems.append("behind_proxy: not together with tls: the proxy ends TLS, or the platform does")
    recipients = _recipients(values.get("recording_recipients", []), problems)
    platform_key = values.get("recording_platform_key", True)
    if not platform_key and not recipients:
        problems.append(
            "recording_platform_key: false needs recording_recipients: somebody must be able to read"
        )
    database = _database(values["database"], problems) if "database" in values else None
    if problems:
        raise ConfigError([f"{path.name}: {problem}" for problem in problems])
    state_dir = Path(values["state_dir"])
    return PlatformConfig(
        public_url=public_url,
        state_dir=state_dir,
        listen_host=host,
        listen_port=port,
        recordings=Path(values["recordings"]) if "recordings" in values else state_dir / "recordings",
        recording_recipients=recipients,
        recording_platform_key=platform_key,
        tls=Tls(Path(tls["cert"]), Path(tls["key"])) if tls else None,
        database=database,
        vault_key=Path(values["vault_key"]) if "vault_key" in values else None,
        behind_proxy=behind_proxy,
        workers=values.get("workers", DEFAULT_WORKERS),
        threads=values.get("threads", DEFAULT_THREADS),
        log_level=values.get("log_level", "info"),
    )


def from_environment() -> PlatformConfig | None:
    """The configuration that ``PAM_PLATFORM_CONFIG`` names, or None when nothing does."""
    name = os.environ.get(CONFIG_VARIABLE)
    return load(Path(name)) if name else None


def current() -> PlatformConfig:
    """The configuration this process runs with, as Django's settings have it."""
    from django.conf import settings

    found = settings.PAM_CONFIG
    if not isinstance(found, PlatformConfig):
        raise PamError("no configuration is loaded", hint=f"give --config, or set {CONFIG_VARIABLE}.")
    return found


def _check_url(url: str, problems: list[str]) -> None:
    parts = urlsplit(url)
    if not parts.hostname or parts.path or parts.query or parts.fragment or parts.username:
        problems.append(f'public_url: expected https://host[:port] and nothing else, got "{url}"')
    elif parts.scheme == "http" and not _is_loopback(parts.hostname):
        problems.append("public_url: http is for loopback only; use https")


def _listen(text: str, problems: list[str]) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        ipaddress.ip_address(host)
        number = int(port)
    except ValueError:
        number = 0
    if not 0 < number < 65536:
        problems.append(f'listen: expected address:port, such as 127.0.0.1:8443 or [::]:443, got "{text}"')
    return host, number


def _recipients(entries: list[dict[str, str]], problems: list[str]) -> tuple[Recipient, ...]:
    found: dict[str, Recipient] = {}
    for index, entry in enumerate(entries):
        try:
            recipient = Recipient.from_json(entry)
        except RecordingError as error:
            problems.append(f"recording_recipients[{index}]: {error}")
            continue
        if recipient.kid in found:
            problems.append(f"recording_recipients[{index}]: {recipient.kid} is there twice")
        found[recipient.kid] = recipient
    return tuple(found.values())


def _database(values: dict[str, str], problems: list[str]) -> Database | None:
    """Take ``postgresql://user@host:port/name?sslmode=verify-full`` apart."""
    parts = urlsplit(values["url"])
    options = dict(parse_qsl(parts.query))
    if parts.password is not None:
        # A URL ends up in process lists, logs and back-ups of configuration.
        problems.append("database.url: no password here; put it into a file and name that in password_file")
    unknown = options.keys() - {"host", "sslmode", "sslrootcert", "sslcert", "sslkey"}
    if unknown:
        problems.append(f"database.url: unknown parameter {', '.join(sorted(unknown))}")
    name = unquote(parts.path.removeprefix("/"))
    if parts.scheme not in ("postgresql", "postgres") or not name or "/" in name:
        problems.append("database.url: expected postgresql://user@host:port/name")
        return None
    try:
        port = str(parts.port or "")
    except ValueError:
        problems.append("database.url: the port is not a number from 1 to 65535")
        return None
    host = options.pop("host", "") or parts.hostname or ""
    password_file = values.get("password_file")
    return Database(
        host=host,
        port=port,
        name=name,
        user=unquote(parts.username or ""),
        password_file=Path(password_file) if password_file else None,
        options=options,
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
