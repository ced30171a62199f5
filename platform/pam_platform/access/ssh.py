"""SSH on the platform's side: which host keys are believed, and the certificates of one session.

An agent makes two keys for each session. One answers the user's program as ``<gateway>.pam``: the
interceptor-host CA signs it, and clients know that CA. The other logs in to the target where the account
has a ``certificate``: the gateway's own target-user CA signs it, and targets know that one. So nothing that
could impersonate a server, or log in to one, is longer-lived than a session.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from pam_common.errors import RefusedError
from pam_common.ssh_certs import make_host_certificate, make_user_certificate
from pam_platform.access.errors import ConflictError
from pam_platform.access.models import Account, Resource, Session
from pam_platform.fleet.statements import BACKDATE, DAY
from pam_platform.vault import keys

#: The name under which every SSH target of a gateway is known to clients: ``dc1.pam``.
DOMAIN = "pam"


@dataclass(frozen=True)
class SshKeys:
    """The raw Ed25519 public keys that an agent made for a session."""

    host: bytes
    user: bytes


def host_keys(resource: Resource) -> list[str]:
    """The pinned host keys as lines: those of access.yml, else those of an accepted scan."""
    pinned: list[str] = resource.options.get("host_keys") or []
    if pinned or resource.options.get("host_ca"):
        return pinned
    return list(resource.scanned_keys)


def require_host_keys(resource: Resource) -> None:
    """Raise ConflictError for an SSH resource of which nobody has said how its server is known."""
    if resource.protocol == "ssh" and not (host_keys(resource) or resource.options.get("host_ca")):
        raise ConflictError(
            f"no host key of {resource.name} is known",
            hint=f"an administrator reads it once with pam-platform resource scan {resource.name}.",
        )


def certificates(session: Session, account: Account, ssh_keys: SshKeys | None) -> dict[str, Any]:
    """The certificates on an agent's keys for this session. Raises RefusedError without keys."""
    if ssh_keys is None:
        raise RefusedError("the agent sent no SSH keys for the session", hint="it may need an update.")
    require_host_keys(account.resource)
    return {
        "host_certificate": _host_certificate(session, ssh_keys.host),
        "user_certificate": _user_certificate(session, account, ssh_keys.user),
    }


def _host_certificate(session: Session, key: bytes) -> str:
    return make_host_certificate(
        keys.signing_key(keys.INTERCEPTOR_HOST_CA),
        key,
        key_id=session.pk,
        principals=[f"{session.gateway_name}.{DOMAIN}"],
        valid_after=int(time.time()) - BACKDATE,
        valid_before=int(session.session_end.timestamp()),
    )


def _user_certificate(session: Session, account: Account, key: bytes) -> str | None:
    if "certificate" not in account.options:
        return None
    # What the target's own log will show: the person, and the session whose recording tells the rest.
    name = f"{session.user_name}/{session.pk}"
    now = int(time.time())
    return make_user_certificate(
        keys.signing_key(keys.target_user_ca(session.gateway_name)),
        key,
        key_id=name,
        principals=account.options["certificate"]["principals"],
        valid_after=now - BACKDATE,
        valid_before=min(now + DAY, int(session.session_end.timestamp())),
        extensions=_extensions(account.options["allow"]),
    )


def _extensions(allow: list[str]) -> list[str]:
    """What the target may let the certificate's user do: no more than the account allows."""
    found = ["permit-user-rc"]
    if "shell" in allow or "exec" in allow:
        found.append("permit-pty")
    if "local-forward" in allow or "remote-forward" in allow:
        found.append("permit-port-forwarding")
    return sorted(found)
