"""Sealed secrets and the platform's own keys. The master key is never in the database."""

from __future__ import annotations

from typing import ClassVar

from django.db import models


class VaultEntry(models.Model):
    """One secret: sealed under a key of its own, which is sealed under a master key.

    Both seals are bound to the entry's id and version, so that no row's content can stand in for
    another's or for its own older one.
    """

    id = models.CharField(primary_key=True, max_length=30)
    version = models.PositiveIntegerField(default=1)
    master_kid = models.CharField(max_length=16)
    wrapped_key = models.BinaryField()
    ciphertext = models.BinaryField()
    updated = models.DateTimeField(auto_now=True)

    def __str__(self) -> str:
        return f"{self.id} v{self.version}"


class PlatformKey(models.Model):
    """One of the platform's signing or recording keys."""

    class State(models.TextChoices):
        NEXT = "next"
        CURRENT = "current"
        RETIRED = "retired"

    purpose = models.CharField(max_length=90)
    kid = models.CharField(max_length=16, unique=True)
    # 32 raw bytes in base64url.
    public = models.CharField(max_length=43)
    private = models.OneToOneField(VaultEntry, on_delete=models.PROTECT, related_name="+")
    state = models.CharField(max_length=7, choices=State.choices)
    created = models.DateTimeField(auto_now_add=True)
    activated = models.DateTimeField(null=True)
    retired = models.DateTimeField(null=True)

    class Meta:
        ordering: ClassVar = ["purpose", "created", "id"]
        constraints: ClassVar = [
            models.UniqueConstraint(
                fields=["purpose", "state"],
                condition=models.Q(state__in=["next", "current"]),
                name="one_current_and_one_next_key",
            )
        ]

    def __str__(self) -> str:
        return f"{self.purpose} {self.kid} ({self.state})"
