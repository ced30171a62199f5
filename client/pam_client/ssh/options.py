"""How OpenSSH is told whom to believe and what not to try.

https://man.openbsd.org/ssh_config.5
"""

from __future__ import annotations

from pathlib import Path

from pam_client.ssh.known_hosts import DOMAIN
from pam_common.errors import PamError

#: What holds for every server behind a platform. Each says why it is not left to ssh's own choice.
_FIXED = (
    # Unknown to ssh before 8.5, which must not fail for them.
    ("IgnoreUnknown", "KnownHostsCommand,UpdateHostKeys"),
    # The CA's word and nothing else makes a host key good; there is no question to answer.
    ("StrictHostKeyChecking", "yes"),
    ("HostKeyAlgorithms", "ssh-ed25519-cert-v01@openssh.com"),
    ("GlobalKnownHostsFile", "/dev/null"),
    ("KnownHostsCommand", "none"),
    ("VerifyHostKeyDNS", "no"),
    ("CheckHostIP", "no"),
    # The key is another one in every session.
    ("UpdateHostKeys", "no"),
    # Nothing of the person's own is shown or lent: the channel says who they are.
    ("PubkeyAuthentication", "no"),
    ("PasswordAuthentication", "no"),
    ("KbdInteractiveAuthentication", "no"),
    ("GSSAPIAuthentication", "no"),
    ("HostbasedAuthentication", "no"),
    ("IdentityAgent", "none"),
    ("ForwardAgent", "no"),
    ("ForwardX11", "no"),
)


def alias(gateway: str) -> str:
    """The name that the host certificates of a gateway's servers carry."""
    return f"{gateway}.{DOMAIN}"


def host(account: str) -> str:
    """``deploy.web-01.pam`` for ``web-01/deploy``."""
    resource, _, label = account.partition("/")
    return f"{label}.{resource}.{DOMAIN}"


def fixed(trust: Path) -> list[tuple[str, str]]:
    """Options for every server, with the known_hosts file ``trust``."""
    return [("UserKnownHostsFile", quoted(trust)), *_FIXED]


def quoted(path: Path) -> str:
    """A path as one word of an option: in quotes, with ``%`` not begun as a token. Raises PamError."""
    text = str(path)
    # ssh_config has no escape for these within quotes (and none at all before 8.7).
    if not text.isprintable() or '"' in text or "\\" in text or "$" in text:
        raise PamError(
            f"ssh cannot be told of a file in {text!r}", hint="PAM_CLIENT_HOME=dir names another folder."
        )
    return '"' + text.replace("%", "%%") + '"'


def words(options: list[tuple[str, str]]) -> list[str]:
    """The options on ``ssh``'s command line."""
    return [word for name, value in options for word in ("-o", f"{name}={value}")]


def lines(options: list[tuple[str, str]]) -> list[str]:
    """The options in a configuration file."""
    return [f"    {name} {value}" for name, value in options]
