"""What the database knows of recordings; the bytes are in the store."""

from __future__ import annotations

from typing import ClassVar

from django.db import models


class RecordingPart(models.Model):
    """What one agent wrote of one session."""

    class State(models.TextChoices):
        RECEIVING = "receiving"
        COMPLETE = "complete"
        FAILED = "failed"

    session = models.ForeignKey("access.Session", on_delete=models.PROTECT, related_name="parts")
    number = models.PositiveIntegerField()
    # Copied, so that a recording can be verified after its agent was revoked or removed.
    agent = models.CharField(max_length=63)
    identity_key = models.CharField(max_length=43)
    state = models.CharField(max_length=9, choices=State.choices, default=State.RECEIVING)
    received = models.BigIntegerField(default=0)
    head = models.JSONField(null=True, default=None)
    problem = models.CharField(max_length=500, blank=True, default="")
    started = models.DateTimeField(auto_now_add=True)
    updated = models.DateTimeField(auto_now=True)
    completed = models.DateTimeField(null=True)

    class Meta:
        ordering: ClassVar = ["session", "number"]
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["session", "number"], name="one_row_per_part")
        ]

    def __str__(self) -> str:
        return f"{self.session_id}.{self.number}"


class Witness(models.Model):
    """A chain head the agent signed and the platform saw at that time; the file must extend it."""

    part = models.ForeignKey(RecordingPart, on_delete=models.PROTECT, related_name="witnesses")
    count = models.BigIntegerField()
    length = models.BigIntegerField()
    hash = models.CharField(max_length=43)
    time = models.BigIntegerField()
    signature = models.CharField(max_length=86)
    seen = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering: ClassVar = ["part", "count", "id"]

    def __str__(self) -> str:
        return f"{self.part}: {self.count} chunks"
