"""Relay bundles with what is revoked now."""

from __future__ import annotations

import time
from datetime import timedelta

from django.db import transaction
from django.utils import timezone

from pam_platform.access.models import Session
from pam_platform.fleet import statements
from pam_platform.fleet.enrolment import NAME_REST
from pam_platform.fleet.models import Agent, Relay

_SEEN_INTERVAL = timedelta(seconds=10)


def make_bundle(relay: Relay) -> str:
    """A signed bundle with a higher serial than any before, also after the clock was set back."""
    with transaction.atomic():
        locked = Relay.objects.select_for_update().get(pk=relay.pk)
        locked.serial = max(locked.serial + 1, int(time.time() * 1000))
        locked.last_seen = timezone.now()
        locked.save(update_fields=["serial", "last_seen"])
    return statements.bundle(locked, _revoked_agents(), _revoked_sessions(), locked.serial)


def bundle_tag(relay: Relay) -> str:
    """The ETag of what :func:`make_bundle` would give now; notes that the relay was here."""
    now = timezone.now()
    if relay.last_seen is None or relay.last_seen < now - _SEEN_INTERVAL:
        Relay.objects.filter(pk=relay.pk).update(last_seen=now)
    return statements.bundle_tag(relay, _revoked_agents(), _revoked_sessions())


def _revoked_agents() -> list[str]:
    """Agents whose certificates could still be valid."""
    since = timezone.now() - NAME_REST
    rows = Agent.objects.filter(state=Agent.State.REVOKED, revoked__gt=since)
    return list(rows.values_list("name", flat=True))


def _revoked_sessions() -> list[str]:
    """Sessions cut before their time, newest first: a link of theirs could still be up."""
    # A killed one has always ended; saying so lets the index find those few among all that ever were.
    rows = Session.objects.filter(state=Session.State.ENDED, killed=True, session_end__gt=timezone.now())
    newest = rows.order_by("-ended", "pk")[: statements.MAX_REVOKED_SESSIONS]
    return list(newest.values_list("pk", flat=True))
