"""The audit trail: who decided what, when; appended to and never changed."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

from django.db import models


class AuditEvent(models.Model):
    """One decision. The database itself refuses to change or delete it (triggers in the migration)."""

    time = models.DateTimeField(auto_now_add=True)
    actor = models.CharField(max_length=100)
    action = models.CharField(max_length=40)
    object = models.CharField(max_length=200)
    outcome = models.CharField(max_length=40)
    details = models.JSONField(default=dict)

    class Meta:
        ordering: ClassVar = ["-id"]

    def __str__(self) -> str:
        return f"{self.actor} {self.action} {self.object}: {self.outcome}"

    def save(self, *args: Any, **kwargs: Any) -> None:
        if not self._state.adding:
            self._refuse()
        super().save(*args, **kwargs)

    def delete(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse()

    @staticmethod
    def _refuse() -> NoReturn:
        raise TypeError("the audit trail is append-only")
