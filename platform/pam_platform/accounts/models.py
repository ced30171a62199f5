"""Users and groups.

Django's own user model carries permissions, names and staff flags nobody here uses; what decides
access are policies (by user and group) and three roles, so that is all this model has.
"""

from __future__ import annotations

from typing import ClassVar

from django.contrib.auth.base_user import AbstractBaseUser, BaseUserManager
from django.core.validators import RegexValidator
from django.db import models

# ASCII and lower case only: no two names may look alike or differ by case, and none can alter
# a path, a log line or a connection string.
USERNAME_PATTERN = r"^[a-z0-9][a-z0-9._@-]{0,63}\Z"
GROUP_PATTERN = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z"

username_validator = RegexValidator(
    USERNAME_PATTERN, "expected 1-64 of a-z 0-9 . _ @ - starting with a letter or digit"
)
group_validator = RegexValidator(GROUP_PATTERN, "expected a lower-case DNS label")


class Group(models.Model):
    """A set of users that policies name."""

    name = models.CharField(max_length=63, unique=True, validators=[group_validator])

    class Meta:
        ordering: ClassVar = ["name"]

    def __str__(self) -> str:
        return self.name


class UserManager(BaseUserManager["User"]):
    """Creates users; the name is validated here since Django validates only in forms."""

    def create_user(self, username: str, password: str | None = None, **fields: object) -> User:
        """Store a new user; without ``password`` nobody can log in with one.

        Raises ``django.core.exceptions.ValidationError`` on a bad name.
        """
        username_validator(username)
        user = self.model(username=username, **fields)
        user.set_password(password)
        user.save(using=self._db)
        return user


class User(AbstractBaseUser):
    """A person, or (``is_service``) a program that logs in with client credentials."""

    username = models.CharField(max_length=64, unique=True, validators=[username_validator])
    email = models.EmailField(blank=True, default="")
    is_active = models.BooleanField(default=True)
    is_auditor = models.BooleanField(default=False)
    is_admin = models.BooleanField(default=False)
    is_service = models.BooleanField(default=False)
    created = models.DateTimeField(auto_now_add=True)
    groups = models.ManyToManyField(Group, blank=True, related_name="users")

    USERNAME_FIELD = "username"
    EMAIL_FIELD = "email"
    REQUIRED_FIELDS: ClassVar[list[str]] = []

    objects: ClassVar[UserManager] = UserManager()

    class Meta:
        ordering: ClassVar = ["username"]

    @property
    def roles(self) -> list[str]:
        """Role names as the API shows them; everyone active is at least ``user``."""
        named = (("auditor", self.is_auditor), ("admin", self.is_admin))
        return ["user", *(name for name, held in named if held)]

    def group_names(self) -> set[str]:
        """Names of the groups this user is in."""
        return set(self.groups.values_list("name", flat=True))
