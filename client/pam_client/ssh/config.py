"""Host entries for ``~/.ssh/config``: one per account, and what holds for all of them.

Names come from the platform and end in a file that ``ssh`` obeys and a shell runs words of: each must be a
label, and each word is quoted for the shell and for ssh.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pam_client.ssh import options
from pam_client.ssh.known_hosts import DOMAIN
from pam_common.errors import ProtocolError
from pam_common.keys import is_label

_HEAD = """\
# Made by: pam-client ssh-config. Run it again when servers are added; what is changed here is lost.
"""
_ADVICE = f"""\
# Each call of ssh opens a session of its own. To let many calls share one (Ansible, git), put this into your
# own configuration, below the Include:
#     Host *.{DOMAIN}
#         ControlMaster auto
#         ControlPath ~/.ssh/pam-%C
#         ControlPersist 60
"""


def render(resources: Sequence[dict[str, Any]], trust: Path, program: Sequence[str]) -> str:
    """The file's text. ``program`` calls pam-client. Raises ProtocolError for names that are none."""
    entries = ["\n".join(entry) for resource in resources for entry in _entries(resource, program)]
    common = [f"Host *.{DOMAIN}", *options.lines(options.fixed(trust))]
    return "\n\n".join([_HEAD.rstrip(), *entries, "\n".join(common), _ADVICE])


def own_command(platform: str | None) -> list[str]:
    """The words that call this pam-client again from anywhere, for the same home and platform."""
    script = Path(sys.argv[0]).absolute()
    beside = Path(sys.executable).with_name("pam-client")
    found = [str(path) for path in (script, beside) if path.name == "pam-client" and os.access(path, os.X_OK)]
    words = found[:1] or [shutil.which("pam-client") or ""]
    if not words[0]:
        words = [sys.executable, "-m", "pam_client"]
    chosen = os.environ.get("PAM_CLIENT_HOME")
    # Editors are started without the shell's environment.
    before = ["env", f"PAM_CLIENT_HOME={Path(chosen).absolute()}"] if chosen else []
    return [*before, *words, *(["--platform", platform] if platform else [])]


def include_line(file: Path) -> str:
    """What ``~/.ssh/config`` must hold."""
    return f"Include {options.quoted(file)}"


def is_included(config: Path, file: Path) -> bool:
    """Whether a line of ``config`` is the one that :func:`include_line` gives, quoted or not."""
    try:
        lines = config.read_text(errors="replace").splitlines()
    except OSError:
        return False
    return any(line.split() in ([["Include", str(file)], include_line(file).split()]) for line in lines)


def _entries(resource: dict[str, Any], program: Sequence[str]) -> Iterator[list[str]]:
    name, gateway = _label(resource.get("name")), _label(resource.get("gateway"))
    accounts = [_label(account.get("name")) for account in resource.get("accounts") or []]
    for label in accounts:
        account = f"{name}/{label}"
        names = [options.host(account), *([f"{name}.{DOMAIN}"] if len(accounts) == 1 else [])]
        # ssh expands % and the person's shell reads the words.
        proxy = shlex.join([*program, "ssh-proxy", account]).replace("%", "%%")
        yield [
            f"Host {' '.join(names)}",
            f"    HostKeyAlias {options.alias(gateway)}",
            f"    User {label}",
            f"    ProxyCommand {proxy}",
        ]


def _label(value: object) -> str:
    if not isinstance(value, str) or not is_label(value):
        raise ProtocolError("the platform's list has a name that is none")
    return value
