"""Gateways, the agents that serve them, relays, and what they are told."""

from __future__ import annotations

from typing import ClassVar

from django.db import models


class Gateway(models.Model):
    """A named way into one private network."""

    name = models.CharField(max_length=63, unique=True)
    created = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering: ClassVar = ["name"]

    def __str__(self) -> str:
        return self.name


class Agent(models.Model):
    """One enrolled pam-agent; its id everywhere else is its name."""

    class State(models.TextChoices):
        ACTIVE = "active"
        REVOKED = "revoked"

    name = models.CharField(max_length=63, unique=True)
    # A revoked agent outlives its gateway: relays must go on refusing its certificate.
    gateway = models.ForeignKey(Gateway, null=True, on_delete=models.SET_NULL, related_name="agents")
    gateway_name = models.CharField(max_length=63)
    # Public keys: 32 raw bytes in base64url.
    identity_key = models.CharField(max_length=43)
    identity_kid = models.CharField(max_length=16, unique=True)
    noise_key = models.CharField(max_length=43)
    sealing_key = models.CharField(max_length=43)
    version = models.CharField(max_length=40, blank=True, default="")
    state = models.CharField(max_length=7, choices=State.choices, default=State.ACTIVE)
    enrolled = models.DateTimeField()
    revoked = models.DateTimeField(null=True)
    last_seen = models.DateTimeField()
    # The number of the last message in its inbox.
    inbox_number = models.BigIntegerField(default=0)

    class Meta:
        ordering: ClassVar = ["name"]

    def __str__(self) -> str:
        return self.name


class Relay(models.Model):
    """A relay as clients and agents are told of it; keys are empty until it enrols."""

    class State(models.TextChoices):
        DECLARED = "declared"
        ACTIVE = "active"
        REVOKED = "revoked"

    name = models.CharField(max_length=63, unique=True)
    host = models.CharField(max_length=253)
    port = models.PositiveIntegerField()
    state = models.CharField(max_length=8, choices=State.choices, default=State.DECLARED)
    identity_key = models.CharField(max_length=43, blank=True, default="")
    identity_kid = models.CharField(max_length=16, unique=True, null=True, default=None)
    host_key = models.CharField(max_length=43, blank=True, default="")
    version = models.CharField(max_length=40, blank=True, default="")
    enrolled = models.DateTimeField(null=True)
    revoked = models.DateTimeField(null=True)
    last_seen = models.DateTimeField(null=True)
    # Of the last bundle: a relay refuses an older one.
    serial = models.BigIntegerField(default=0)

    class Meta:
        ordering: ClassVar = ["name"]

    def __str__(self) -> str:
        return self.name


class EnrolToken(models.Model):
    """A one-time token for one agent or relay; only its hash is stored."""

    class Kind(models.TextChoices):
        AGENT = "agent"
        RELAY = "relay"

    kind = models.CharField(max_length=5, choices=Kind.choices)
    name = models.CharField(max_length=63)
    gateway = models.ForeignKey(Gateway, null=True, on_delete=models.CASCADE, related_name="+")
    hash = models.CharField(max_length=64, unique=True)
    created = models.DateTimeField(auto_now_add=True)
    expires = models.DateTimeField()
    used = models.DateTimeField(null=True)
    # Hash of the keys it enrolled: the same keys may ask again, no others.
    used_keys = models.CharField(max_length=64, blank=True, default="")

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


class InboxMessage(models.Model):
    """Something an agent must be told; numbered per agent without gaps."""

    agent = models.ForeignKey(Agent, on_delete=models.CASCADE, related_name="messages")
    number = models.BigIntegerField()
    kind = models.CharField(max_length=10)
    session = models.CharField(max_length=28, blank=True, default="")
    reason = models.CharField(max_length=200, blank=True, default="")
    # What else the kind needs; goes into the message as it is.
    details = models.JSONField(default=dict)
    created = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering: ClassVar = ["agent", "number"]
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["agent", "number"], name="one_message_per_number")
        ]

    def __str__(self) -> str:
        return f"{self.agent} #{self.number} {self.kind}"
