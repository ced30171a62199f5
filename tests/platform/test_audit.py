"""The audit trail is appended to and never changed."""

import pytest
from django.db import DatabaseError, connection

from pam_platform import audit
from pam_platform.accounts.models import User
from pam_platform.audit.models import AuditEvent

pytestmark = pytest.mark.usefixtures("db")


@pytest.fixture
def event():
    audit.record("alice", "connect", "prod-db/readonly", "ok", policy="dba", reason="", nothing=None)
    return AuditEvent.objects.get()


def test_an_event_keeps_what_was_said(event):
    assert (event.actor, event.action, event.object, event.outcome) == (
        "alice",
        "connect",
        "prod-db/readonly",
        "ok",
    )
    assert event.details == {"policy": "dba"}


def test_a_user_acts_by_name():
    audit.record(User(username="bob"), "kill", "s", "ok")
    assert AuditEvent.objects.get().actor == "bob"


def test_the_model_refuses_to_change_or_delete(event):
    event.outcome = "refused"
    with pytest.raises(TypeError):
        event.save()
    with pytest.raises(TypeError):
        event.delete()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit_auditevent SET outcome = 'x'",
        "DELETE FROM audit_auditevent",
        "INSERT OR REPLACE INTO audit_auditevent SELECT id, time, 'eve', action, object, outcome, details"
        " FROM audit_auditevent",
    ],
)
def test_the_database_refuses_too(event, statement):
    with pytest.raises(DatabaseError), connection.cursor() as cursor:
        cursor.execute(statement)
    assert AuditEvent.objects.get().actor == "alice"


def test_queries_are_refused_like_statements(event):
    with pytest.raises(DatabaseError):
        AuditEvent.objects.update(outcome="x")
    with pytest.raises(DatabaseError):
        AuditEvent.objects.all().delete()
