"""The rival: an OpenSSH double tunnel, `ssh -R` and `ssh -L` through an sshd of its own on loopback."""

from __future__ import annotations

import getpass
import os
import subprocess
from pathlib import Path

from processes import Process, free_port, listens, wait_for

SSHD = Path("/usr/sbin/sshd")
CIPHER = "aes128-gcm@openssh.com"


class DoubleTunnel:
    """``port`` leads through two OpenSSH connections to the loopback ``target_port``."""

    def __init__(self, folder: Path, target_port: int) -> None:
        self.folder = folder
        folder.mkdir(mode=0o700, parents=True)
        self._sshd_port, self._middle, self.port = free_port(), free_port(), free_port()
        for name in ("host", "user"):
            self._keygen(folder / name)
        self.processes = {"sshd": self._sshd()}
        self._ssh("agent ssh -R", "-R", f"127.0.0.1:{self._middle}:127.0.0.1:{target_port}", self._middle)
        self._ssh("client ssh -L", "-L", f"127.0.0.1:{self.port}:127.0.0.1:{self._middle}", self.port)

    def stop(self) -> None:
        for process in reversed(self.processes.values()):
            process.stop()

    def _sshd(self) -> Process:
        config = self.folder / "sshd_config"
        config.write_text(
            f"""Port {self._sshd_port}
ListenAddress 127.0.0.1
HostKey {self.folder}/host
AuthorizedKeysFile {self.folder}/user.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
AllowTcpForwarding yes
"""
        )
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # sshd's privilege separation wants it
        server = Process("sshd", [SSHD, "-D", "-e", "-f", config], self.folder / "sshd.log")
        server.ready_when(lambda: listens(self._sshd_port))
        return server

    def _ssh(self, name: str, kind: str, forward: str, port: int) -> None:
        options = [
            "BatchMode=yes",
            "StrictHostKeyChecking=no",
            f"UserKnownHostsFile={self.folder}/known_hosts",
            "IdentitiesOnly=yes",
            "ExitOnForwardFailure=yes",
            f"Ciphers={CIPHER}",
        ]
        command: list[str | Path] = ["ssh", "-F", "none", "-N", "-i", self.folder / "user", kind, forward]
        for option in options:
            command += ["-o", option]
        command += ["-p", str(self._sshd_port), f"{getpass.getuser()}@127.0.0.1"]
        process = Process(name, command, self.folder / f"{kind}.log")
        self.processes[name] = process
        wait_for(lambda: listens(port) or not process.running(), name)
        if not process.running():
            raise RuntimeError(process.tail())

    @staticmethod
    def _keygen(path: Path) -> None:
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)]
        subprocess.run(command, check=True)
