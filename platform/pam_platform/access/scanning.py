"""Host keys of SSH servers, learned once and by an explicit act: asked for, compared by a person, accepted.

    administrator            platform               agent                 server
      resource scan ───────▶ scan, inbox message ──▶ dials, key exchange ──▶
                             ◀── POST /agent/scans ─── the keys it showed ◀──
      compares fingerprints
      accepts ─────────────▶ pinned

Nothing else ever pins a key: the first session is no occasion to believe whoever answers.
"""

from __future__ import annotations

import base64
import secrets
from collections.abc import Iterable
from datetime import timedelta

from django.db import transaction
from django.utils import timezone

from pam_common.errors import PamError, RefusedError
from pam_platform import audit
from pam_platform.access.errors import ConflictError
from pam_platform.access.granting import AGENT_SILENCE
from pam_platform.access.hostkeys import fingerprint, public_line
from pam_platform.access.models import HostKeyScan, Resource
from pam_platform.fleet import inbox
from pam_platform.fleet.models import Agent

#: An answer must be compared while the administrator is there; later it may be about another machine.
SCAN_LIFETIME = timedelta(minutes=15)
#: One of each type and size; no server has more.
MAX_SCANNED_KEYS = 16


def begin(resource: Resource, actor: str, agent_name: str | None = None) -> HostKeyScan:
    """Ask an agent of the resource's gateway. Raises PamError when there is nothing to ask, or nobody."""
    if resource.protocol != "ssh":
        raise RefusedError(f"{resource.name} is not an SSH server")
    if resource.options.get("host_keys") or resource.options.get("host_ca"):
        raise RefusedError(
            f"access.yml says which keys {resource.name} has", hint="change ssh.host_keys or host_ca there."
        )
    if resource.options.get("jump"):
        raise RefusedError(
            f"{resource.name} is behind a jump host, where an agent does not get without logging in",
            hint="read its key on the server itself and put it into ssh.host_keys of access.yml.",
        )
    agent = _choose(resource, agent_name)
    with transaction.atomic():
        resource.scans.all().delete()
        scan = HostKeyScan.objects.create(
            id="k-" + base64.b32encode(secrets.token_bytes(16)).decode().rstrip("=").lower(),
            resource=resource,
            agent=agent,
            host=resource.host,
            port=resource.port,
            requested=timezone.now(),
        )
        inbox.post(agent, "scan", details={"scan": scan.pk, "host": scan.host, "port": scan.port})
        audit.record(actor, "resource.scan", resource.name, "ok", scan=scan.pk, agent=agent.name)
    return scan


def answer(scan_id: str, agent: Agent, keys: list[str], error: str) -> None:
    """What the agent found. Raises RefusedError unless this agent was asked, a short while ago."""
    actor = f"agent {agent.name}"
    since = timezone.now() - SCAN_LIFETIME
    if not HostKeyScan.objects.filter(pk=scan_id, agent=agent, requested__gt=since).exists():
        audit.record(actor, "resource.scanned", scan_id, "refused")
        raise RefusedError("this agent was not asked for such a scan")
    with transaction.atomic():
        rows = HostKeyScan.objects.select_for_update(of=("self",)).select_related("resource")
        scan = rows.filter(pk=scan_id, answered=None).first()
        if scan is None:
            return  # repeated, or another scan followed
        scan.answered = timezone.now()
        try:
            scan.keys = sorted({public_line(line) for line in keys})
            scan.error = error
        except ValueError as problem:
            scan.error = f"the agent sent what is no key: {problem}"
        scan.save()
        facts = {"scan": scan.pk, "keys": len(scan.keys)}
        audit.record(actor, "resource.scanned", scan.resource.name, "ok", **facts)


def accept(scan: HostKeyScan, fingerprints: Iterable[str], actor: str) -> list[str]:
    """Pin those keys of an answered scan that have these fingerprints; returns their lines.

    Raises PamError when the server did not show one of them, or has moved since.
    """
    shown = {fingerprint(line): line for line in scan.keys}
    wanted = sorted(set(fingerprints))
    missing = [one for one in wanted if one not in shown]
    if missing or not wanted:
        raise PamError(
            f"the server does not show {', '.join(missing) or 'any key'}",
            hint="compare with: ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub on the server.",
        )
    with transaction.atomic():
        resource = Resource.objects.select_for_update(of=("self",)).get(pk=scan.resource_id)
        age = timezone.now() - scan.requested
        if (resource.host, resource.port) != (scan.host, scan.port) or age > SCAN_LIFETIME:
            raise ConflictError("the scan is about another place or too old", hint="scan again.")
        resource.scanned_keys = sorted(shown[one] for one in wanted)
        resource.save(update_fields=["scanned_keys"])
        audit.record(actor, "resource.pin", resource.name, "ok", fingerprints=wanted, scan=scan.pk)
    return list(resource.scanned_keys)


def _choose(resource: Resource, name: str | None) -> Agent:
    agents = resource.gateway.agents.filter(
        state=Agent.State.ACTIVE, last_seen__gt=timezone.now() - AGENT_SILENCE
    )
    found = (agents if name is None else agents.filter(name=name)).first()
    if found is None:
        raise ConflictError(
            f"no agent of gateway {resource.gateway.name} is running to ask"
            if name is None
            else f"agent {name} of gateway {resource.gateway.name} is not running"
        )
    return found
