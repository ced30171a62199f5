"""The system's ``ssh`` on a listener of ours."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pam_client import child
from pam_client.ssh import options

if TYPE_CHECKING:
    from pam_client.launch.base import Place


def run(place: Place, command: Sequence[str], terminal: bool) -> int:
    """A shell, or ``command`` on the server; returns its exit code. ``terminal``: also with a COMMAND."""
    if shutil.which("ssh"):
        return child.run(child.find(call(place, command, terminal=terminal)), os.environ)
    # Imported only where there is no ssh: paramiko's client takes its time to load.
    from pam_client.ssh.terminal import run as run_own

    return run_own(place, command, terminal)


def call(place: Place, command: Sequence[str] = (), *, terminal: bool = False) -> list[str]:
    """The words that call ``ssh``."""
    assert place.trust is not None
    chosen = [("HostKeyAlias", options.alias(place.gateway)), *options.fixed(place.trust)]
    if place.host.startswith("/"):
        chosen.append(("ProxyCommand", _splice(place)))
    else:
        chosen += [("HostName", place.host), ("Port", str(place.port))]
    # Of the person's own files nothing is read: a ProxyJump or RemoteCommand for "*" would lead elsewhere.
    tty = ["-t"] if terminal else []
    # As Debian's own configuration has it; what reaches the server is the account's to allow.
    sent = ["-o", "SendEnv=LANG", "-o", "SendEnv=LC_*", "-l", place.user]
    return [
        "ssh",
        "-F",
        "none",
        *options.words(chosen),
        *sent,
        *tty,
        "--",
        options.host(place.account),
        *command,
    ]


def _splice(place: Place) -> str:
    """Where only UNIX sockets are safe: a program that joins stdin and stdout to one."""
    path = f"{place.host}/.s.SSH.{place.port}"
    return shlex.join([sys.executable, "-I", "-m", "pam_client.ssh.splice", path]).replace("%", "%%")
