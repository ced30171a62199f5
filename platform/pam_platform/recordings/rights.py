"""Who may know of a session, and who may see what it recorded."""

from __future__ import annotations

from django.db.models import Q, QuerySet

from pam_platform.access.models import Session
from pam_platform.accounts.models import User


def may_know(user: User, session: Session) -> bool:
    """See who, where and when: the owner, admins, and whom policy lets review the recording."""
    return user.is_active and (user.is_admin or may_view(user, session))


def may_view(user: User, session: Session) -> bool:
    """See the content: the owner, and auditors to whom the session's policy opens it.

    An admin sees that a session happened; its content only as an auditor like any other.
    """
    if not user.is_active:
        return False
    if session.user_id is not None and session.user_id == user.pk:
        return True
    return user.is_auditor and _reviewed_by(session, user.group_names())


def may_kill(user: User, session: Session) -> bool:
    """End it: the owner and admins, while it runs."""
    owns = session.user_id is not None and session.user_id == user.pk
    return user.is_active and session.is_running and (owns or user.is_admin)


def known_sessions(user: User) -> QuerySet[Session]:
    """The sessions for which :func:`may_know` holds."""
    if not user.is_active:
        return Session.objects.none()
    if user.is_admin:
        return Session.objects.all()
    if not user.is_auditor:
        return Session.objects.filter(user=user)
    # Review groups are a JSON list, which no database here searches alike; there are few distinct ones.
    groups = user.group_names()
    lists = Session.objects.order_by().values_list("review_groups", flat=True).distinct()
    opened = [names for names in lists if not names or groups.intersection(names)]
    opens = Q(user=user)
    for names in opened:
        opens |= Q(review_groups=names)
    return Session.objects.filter(opens)


def _reviewed_by(session: Session, groups: set[str]) -> bool:
    """The policy's review groups, as they were when the grant was made; none named: every auditor."""
    return not session.review_groups or not groups.isdisjoint(session.review_groups)
