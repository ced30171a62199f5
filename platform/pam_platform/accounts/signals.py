"""What happens to logins goes to the audit trail, and a new password ends what the old one opened."""

from __future__ import annotations

from typing import Any

from allauth.account.signals import password_changed
from allauth.mfa.signals import authenticator_added, authenticator_removed
from django.contrib.auth.signals import user_logged_in, user_logged_out, user_login_failed
from django.http import HttpRequest

from pam_platform import audit
from pam_platform.accounts.models import User
from pam_platform.accounts.oauth import delete_expired, revoke_tokens

# Stands in the audit trail for a name that nobody has.
_UNKNOWN = "(unknown)"


def connect() -> None:
    """Attach the receivers; the uid keeps a second call from attaching them twice."""
    user_logged_in.connect(_logged_in, dispatch_uid="pam.logged_in")
    user_logged_out.connect(_logged_out, dispatch_uid="pam.logged_out")
    user_login_failed.connect(_login_failed, dispatch_uid="pam.login_failed")
    password_changed.connect(_password_changed, dispatch_uid="pam.password_changed")
    authenticator_added.connect(_factor_added, dispatch_uid="pam.factor_added")
    authenticator_removed.connect(_factor_removed, dispatch_uid="pam.factor_removed")


def address_of(request: HttpRequest | None) -> str:
    """Where the request came from, as far as the proxy settings let one trust it; may be empty."""
    if request is None:
        return ""
    from allauth.account.adapter import get_adapter
    from django.core.exceptions import PermissionDenied

    try:
        return str(get_adapter(request).get_client_ip(request))
    except PermissionDenied:
        return ""


def known_name(typed: str) -> str:
    """The user's name that was typed; people type passwords there, and the trail and the log keep them."""
    name = typed.lower()
    return name if User.objects.filter(username=name).exists() else _UNKNOWN


def _logged_in(request: HttpRequest | None, user: Any, **_: Any) -> None:
    delete_expired()
    audit.record(user.get_username(), "login", "web", "ok", address=address_of(request))


def _logged_out(request: HttpRequest | None, user: Any, **_: Any) -> None:
    if user is not None:
        audit.record(user.get_username(), "logout", "web", "ok", address=address_of(request))


def _login_failed(credentials: dict[str, Any], request: HttpRequest | None = None, **_: Any) -> None:
    name = known_name(str(credentials.get("username", "")))
    audit.record(name, "login", "web", "refused", address=address_of(request))


def _password_changed(request: HttpRequest, user: Any, **_: Any) -> None:
    # Web sessions end by themselves: Django binds them to the password's hash.
    revoke_tokens(user)
    audit.record(
        user.get_username(), "password.change", user.get_username(), "ok", address=address_of(request)
    )


def _factor_added(request: HttpRequest, user: Any, authenticator: Any, **_: Any) -> None:
    audit.record(user.get_username(), "mfa.add", authenticator.type, "ok", address=address_of(request))


def _factor_removed(request: HttpRequest, user: Any, authenticator: Any, **_: Any) -> None:
    audit.record(user.get_username(), "mfa.remove", authenticator.type, "ok", address=address_of(request))
