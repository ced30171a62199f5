"""Slow hashes of passwords and client secrets, compared and made before an apply locks anything.

Each takes a third of a second, by design. With SQLite the transaction of an apply keeps every other writer
waiting, and with it every opening and every kill.
"""

from __future__ import annotations

from collections.abc import Iterable

from allauth.idp.oidc.models import Client
from django.contrib.auth.hashers import check_password, is_password_usable, make_password

from pam_platform.access.apply import document
from pam_platform.accounts.models import User


class Hashes:
    """What is known of each secret. An answer names the hash it is about: where that has changed since, the
    same question is a new one and takes its time."""

    def __init__(self, users: Iterable[document.User]) -> None:
        self._matches: dict[tuple[str, str], bool] = {}
        self._made: dict[str, str] = {}
        passwords = dict(User.objects.values_list("username", "password"))
        secrets = dict(Client.objects.values_list("id", "secret"))
        for user in users:
            if user.password is not None and not self.match(user.password, passwords.get(user.name, "")):
                self._made[user.name] = make_password(user.password)
            if user.client_secret is not None:
                self.match(user.client_secret, secrets.get(user.name, ""))

    def match(self, secret: str, stored: str) -> bool:
        """Whether ``stored`` is a hash of ``secret``."""
        if not stored or not is_password_usable(stored):
            return False
        if (secret, stored) not in self._matches:
            self._matches[secret, stored] = check_password(secret, stored)
        return self._matches[secret, stored]

    def password(self, user: document.User) -> str:
        """A hash of the user's password."""
        assert user.password is not None
        return self._made.get(user.name) or make_password(user.password)
