"""The audit trail: every decision, by whom, about what, with which outcome."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from pam_common.logging import get_logger, kv

if TYPE_CHECKING:
    from pam_platform.accounts.models import User

log = get_logger("platform.audit")

# What this thread recorded in the request it serves.
_request = threading.local()


def record(actor: User | str, action: str, object: str, outcome: str, **details: Any) -> None:
    """Append an event, and log it. Never pass a secret.

    ``actor``: a user, or the name of who acted: ``agent dc1-a``, ``operator`` for the command line.
    ``outcome``: ``ok``, ``refused`` (say why in ``reason``) or another word. Inside a transaction that is
    rolled back the event goes, too: record a refusal after it. ``details`` are JSON values.
    """
    from pam_platform.audit.models import AuditEvent

    name = actor if isinstance(actor, str) else actor.username
    kept = {key: value for key, value in details.items() if value not in (None, "")}
    AuditEvent.objects.create(
        actor=name[:100], action=action[:40], object=object[:200], outcome=outcome[:40], details=kept
    )
    if outcome == "refused":
        _request.refused = True
    log.info(action, extra=kv(actor=name, object=object, outcome=outcome, **kept))


def begin_request(**_: Any) -> None:
    """Forget what the thread's last request recorded; connected to Django's ``request_started``."""
    _request.refused = False


def refusal_recorded() -> bool:
    """Whether this request recorded a refusal already, with more to say than its path."""
    return getattr(_request, "refused", False)
