"""A real OpenSSH server on loopback, with keys of its own; it lets in whoever runs the tests, by key."""

from __future__ import annotations

import getpass
import os
import subprocess
from pathlib import Path

from processes import Process, free_port, listens

SSHD = "/usr/sbin/sshd"
SFTP_SERVER = "/usr/lib/openssh/sftp-server"


def keygen(path: Path, *options: str, kind: str = "ed25519", passphrase: str = "") -> str:
    """Make a key pair; returns the public line without its comment."""
    command = ["ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-C", "", "-f", str(path), *options]
    subprocess.run(command, check=True)
    return " ".join(path.with_suffix(".pub").read_text().split()[:2])


class SshServer:
    """``sshd`` in ``folder``; ``settings`` are lines of its configuration that come first."""

    def __init__(self, folder: Path, *settings: str, kinds: tuple[str, ...] = ("ed25519",)) -> None:
        self.folder = folder
        self.user = getpass.getuser()
        self.port = free_port()
        folder.mkdir(parents=True, exist_ok=True)
        self.host_keys = [keygen(folder / f"host_{kind}", kind=kind) for kind in kinds]
        self.authorized = folder / "authorized_keys"
        self.key = folder / "user"
        self.authorized.write_text(keygen(self.key) + "\n")
        self.log = folder / "sshd.log"
        lines = [*settings, f"Port {self.port}", "ListenAddress 127.0.0.1"]
        lines += [f"HostKey {folder}/host_{kind}" for kind in kinds]
        lines += [
            f"AuthorizedKeysFile {self.authorized}",
            f"Subsystem sftp {SFTP_SERVER}",
            "PidFile none",
            "StrictModes no",
            "UsePAM no",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "PermitRootLogin prohibit-password",
            "MaxSessions 100",
            "MaxStartups 100",
            "AcceptEnv LANG LC_* DEMO_*",
        ]
        config = folder / "sshd_config"
        config.write_text("\n".join(lines) + "\n")
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # sshd's privilege separation wants it
        self.process = Process("sshd", [SSHD, "-D", "-e", "-f", config], self.log)
        self.process.ready_when(lambda: listens(self.port))

    def authorize(self, line: str) -> None:
        """Let one more key, or a line of authorized_keys, in."""
        with self.authorized.open("a") as file:
            file.write(line + "\n")

    def stop(self) -> None:
        self.process.stop()
