"""What can be reached, who may reach it, and the sessions that did."""

from __future__ import annotations

from datetime import datetime
from typing import ClassVar

from django.conf import settings
from django.db import models
from django.utils import timezone

from pam_platform.fleet.models import Agent, Gateway
from pam_platform.vault.models import VaultEntry


class Resource(models.Model):
    """A target and how it is reached."""

    name = models.CharField(max_length=63, unique=True)
    protocol = models.CharField(max_length=63)
    gateway = models.ForeignKey(Gateway, on_delete=models.CASCADE, related_name="resources")
    host = models.CharField(max_length=253)
    port = models.PositiveIntegerField()
    tls_mode = models.CharField(max_length=11)
    server_name = models.CharField(max_length=253, blank=True, default="")
    tls_ca = models.TextField(blank=True, default="")
    client_cert = models.TextField(blank=True, default="")
    # Bytes of result rows (SSH: of a command's streams) that a recording keeps per statement.
    rows_budget = models.PositiveIntegerField()
    # What only its protocol knows, as the agent gets it.
    options = models.JSONField(default=dict)
    # SSH: the host keys that an administrator accepted from a scan, as lines.
    scanned_keys = models.JSONField(default=list)

    class Meta:
        ordering: ClassVar = ["name"]

    def __str__(self) -> str:
        return self.name


class Account(models.Model):
    """A credential on a resource; ``name`` is its label, ``user`` what the target calls it."""

    resource = models.ForeignKey(Resource, on_delete=models.CASCADE, related_name="accounts")
    name = models.CharField(max_length=63)
    user = models.CharField(max_length=128)
    password = models.OneToOneField(VaultEntry, null=True, on_delete=models.PROTECT, related_name="+")
    client_key = models.OneToOneField(VaultEntry, null=True, on_delete=models.PROTECT, related_name="+")
    # The only databases it may open; empty: whatever the target lets it.
    databases = models.JSONField(default=list)
    allow_replication = models.BooleanField(default=False)
    options = models.JSONField(default=dict)

    class Meta:
        ordering: ClassVar = ["resource__name", "name"]
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["resource", "name"], name="one_account_per_label")
        ]

    def __str__(self) -> str:
        return self.path

    @property
    def path(self) -> str:
        """``prod-db/readonly``."""
        return f"{self.resource.name}/{self.name}"


class ResourceSecret(models.Model):
    """A secret of a resource by its name, such as ``jump_password``."""

    resource = models.ForeignKey(Resource, on_delete=models.CASCADE, related_name="secrets")
    name = models.CharField(max_length=30)
    entry = models.OneToOneField(VaultEntry, on_delete=models.PROTECT, related_name="+")

    class Meta:
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["resource", "name"], name="one_resource_secret_per_name")
        ]

    def __str__(self) -> str:
        return f"{self.resource} {self.name}"


class AccountSecret(models.Model):
    """A secret of an account by its name, such as ``private_key``."""

    account = models.ForeignKey(Account, on_delete=models.CASCADE, related_name="secrets")
    name = models.CharField(max_length=30)
    entry = models.OneToOneField(VaultEntry, on_delete=models.PROTECT, related_name="+")

    class Meta:
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["account", "name"], name="one_account_secret_per_name")
        ]

    def __str__(self) -> str:
        return f"{self.account} {self.name}"


class HostKeyScan(models.Model):
    """An administrator's question to one agent: which host keys does this resource's server show?

    Where it asks is copied: an answer about another place than the resource's is accepted by nobody.
    """

    id = models.CharField(primary_key=True, max_length=28)
    resource = models.ForeignKey(Resource, on_delete=models.CASCADE, related_name="scans")
    agent = models.ForeignKey(Agent, on_delete=models.CASCADE, related_name="+")
    host = models.CharField(max_length=253)
    port = models.PositiveIntegerField()
    requested = models.DateTimeField()
    answered = models.DateTimeField(null=True)
    # The answer: keys as lines, or why there are none.
    keys = models.JSONField(default=list)
    error = models.CharField(max_length=300, blank=True, default="")

    def __str__(self) -> str:
        return f"{self.id} {self.resource}"


class Policy(models.Model):
    """Who may use which accounts, how long. Durations in seconds; ``idle_limit`` 0 is none."""

    name = models.CharField(max_length=63, unique=True)
    users = models.JSONField(default=list)
    groups = models.JSONField(default=list)
    accounts = models.JSONField(default=list)
    max_duration = models.PositiveIntegerField()
    idle_limit = models.PositiveIntegerField(default=0)
    # Auditors must be in one of these groups to see the recordings; empty: every auditor.
    review_groups = models.JSONField(default=list)

    class Meta:
        ordering: ClassVar = ["name"]

    def __str__(self) -> str:
        return self.name


class Session(models.Model):
    """What one grant opened. Names are copied: they stay true when the rows they came from go."""

    class State(models.TextChoices):
        GRANTED = "granted"
        ACTIVE = "active"
        ENDED = "ended"

    id = models.CharField(primary_key=True, max_length=28)
    user = models.ForeignKey(
        settings.AUTH_USER_MODEL, null=True, on_delete=models.SET_NULL, related_name="sessions"
    )
    user_name = models.CharField(max_length=64)
    account = models.ForeignKey(Account, null=True, on_delete=models.SET_NULL, related_name="sessions")
    account_name = models.CharField(max_length=127)
    protocol = models.CharField(max_length=63)
    gateway_name = models.CharField(max_length=63)
    agent = models.ForeignKey(Agent, null=True, on_delete=models.SET_NULL, related_name="sessions")
    agent_name = models.CharField(max_length=63, blank=True, default="")
    policy_name = models.CharField(max_length=63)
    review_groups = models.JSONField(default=list)
    client_key = models.CharField(max_length=43)
    state = models.CharField(max_length=7, choices=State.choices, default=State.GRANTED)
    granted = models.DateTimeField()
    grant_expires = models.DateTimeField()
    opened = models.DateTimeField(null=True)
    ended = models.DateTimeField(null=True)
    session_end = models.DateTimeField()
    idle_limit = models.PositiveIntegerField()
    end_reason = models.CharField(max_length=200, blank=True, default="")
    # Ended from outside (kill, lost authorisation), not by its own client: relays must cut it.
    killed = models.BooleanField(default=False)
    # When its agent said that nothing of it runs any more.
    closed = models.DateTimeField(null=True)
    part = models.PositiveIntegerField(default=0)
    connections = models.BigIntegerField(default=0)
    bytes_up = models.BigIntegerField(default=0)
    bytes_down = models.BigIntegerField(default=0)

    class Meta:
        ordering: ClassVar = ["-granted", "-id"]
        indexes: ClassVar = [
            models.Index(fields=["-granted", "-id"], name="session_newest"),
            models.Index(fields=["state", "session_end"], name="session_running"),
        ]

    def __str__(self) -> str:
        return self.id

    def shown_state(self, now: datetime | None = None) -> str:
        """``granted``, ``active``, ``ended``, or ``expired`` for a grant that was never used."""
        now = now or timezone.now()
        if self.state == self.State.GRANTED and self.grant_expires <= now:
            return "expired"
        if self.state == self.State.ACTIVE and self.session_end <= now:
            return "ended"
        return self.state

    @property
    def is_running(self) -> bool:
        """Whether it is granted or active and its time is not over."""
        return self.shown_state() in (self.State.GRANTED, self.State.ACTIVE)
