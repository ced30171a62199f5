"""Password login: people only, active ones only."""

from __future__ import annotations

from typing import Any

from allauth.account.auth_backends import AuthenticationBackend


class PasswordBackend(AuthenticationBackend):  # type: ignore[misc]  # allauth is untyped
    """allauth's back-end that also refuses service users.

    ``get_user`` asks ``user_can_authenticate`` on every request, so the web sessions of a disabled
    user end at once.
    """

    def user_can_authenticate(self, user: Any) -> bool:
        return bool(user.is_active and not user.is_service)
