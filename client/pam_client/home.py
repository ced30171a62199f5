"""The client's private folder: configuration, tokens, remembered ports, notes of running connects.

One folder holds everything, so that ``PAM_CLIENT_HOME=dir`` moves all of it at once. A machine-wide
``/etc/pam-client/client.yml`` stands in for a person's own file where there is none.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
import yaml

from pam_common.config import load
from pam_common.errors import PamError
from pam_common.files import make_private_dir, read_private, write_private
from pam_common.platform_client import check_base_url

SYSTEM_CONFIG = Path("/etc/pam-client/client.yml")


@dataclass(frozen=True)
class Settings:
    """Which platform, and which CA vouches for it (None: the system's)."""

    platform: str
    platform_ca: Path | None = None


class Home:
    """The folder itself; every file in it is 0600."""

    def __init__(self, folder: Path | None = None) -> None:
        chosen = os.environ.get("PAM_CLIENT_HOME", "")
        self.folder = folder or Path(chosen or platformdirs.user_state_dir("pam-client"))
        # A chosen folder is complete in itself: tests and demos must not see the machine's settings.
        self._fallback = None if folder or chosen else SYSTEM_CONFIG

    @property
    def config_file(self) -> Path:
        return self.folder / "client.yml"

    def make(self) -> Path:
        """The folder, existing and private."""
        try:
            return make_private_dir(self.folder)
        except OSError as error:
            raise PamError(
                f"cannot use {self.folder}: {error.strerror or error}",
                hint="PAM_CLIENT_HOME=dir names another folder.",
            ) from None

    def settings(self, platform: str | None = None) -> Settings:
        """The platform to use: ``platform`` if given (--platform, PAM_PLATFORM), else the file's.

        The configured CA goes with the configured platform only. Raises PamError when there is none.
        """
        source = self._source()
        stored = load(source, "client") if source else {}
        ca = stored.get("platform_ca")
        ca_file = (source.parent / ca).resolve() if source and ca else None
        configured = stored.get("platform", "").rstrip("/")
        if platform:
            url = check_base_url(platform)
            return Settings(url, ca_file if configured in ("", url) else None)
        if not configured:
            raise PamError(
                "no platform is configured",
                hint="run: pam-client login --platform https://pam.example.com",
            )
        return Settings(check_base_url(configured), ca_file)

    def save_settings(self, settings: Settings) -> None:
        """Remember ``settings`` for later commands."""
        document = {"platform": settings.platform}
        if settings.platform_ca:
            document["platform_ca"] = str(settings.platform_ca)
        self.make()
        write_private(self.config_file, yaml.safe_dump(document, sort_keys=True).encode())

    def read_json(self, name: str) -> dict[str, Any]:
        """The JSON object in file ``name``; ``{}`` when there is none or it is unusable.

        For what can be made again (remembered ports, completion lists) and for tokens, where
        unusable means "log in again".
        """
        try:
            value = json.loads(read_private(self.folder / name))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return {}
        except OSError as error:
            raise PamError(f"cannot read {self.folder / name}: {error.strerror or error}") from None
        return value if isinstance(value, dict) else {}

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Replace file ``name``, whole or not at all."""
        self.make()
        try:
            write_private(self.folder / name, json.dumps(value, sort_keys=True).encode())
        except OSError as error:
            raise PamError(f"cannot write {self.folder / name}: {error.strerror or error}") from None

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold file lock ``name`` against other processes and threads; freed by the kernel on a crash."""
        self.make()
        fd = os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _source(self) -> Path | None:
        for path in (self.config_file, self._fallback):
            if path is not None and path.exists():
                return path
        return None


def has_peer_check() -> bool:
    """Whether this system tells who is at the other end of a loopback TCP connection (Linux does)."""
    return sys.platform == "linux"
