"""Who calls the API: authentication and role checks for people and programs, and ``/me``."""

from __future__ import annotations

from typing import Any

from django.contrib.auth import SESSION_KEY
from django.http import HttpRequest
from ninja import Router, Schema
from ninja.errors import HttpError
from ninja.security.base import AuthBase
from ninja.utils import check_csrf

from pam_platform import audit
from pam_platform.accounts.models import User
from pam_platform.accounts.oauth import user_of_token

_ROLE_FIELDS = {"auditor": "is_auditor", "admin": "is_admin"}


class UserAuth(AuthBase):
    """A bearer access token or, without any Authorization header, the web session with CSRF.

    ``request.auth`` and ``request.user`` are the :class:`User`. A request that carries an
    Authorization header is judged by that alone, so a browser's cookie never lends it rights.
    """

    openapi_type = "http"
    openapi_scheme = "bearer"

    def __call__(self, request: HttpRequest) -> User | None:
        header = request.headers.get("Authorization")
        user = self._from_session(request) if header is None else self._from_header(header)
        if user is not None:
            request.user = user
        return user

    @staticmethod
    def _from_header(header: str) -> User | None:
        scheme, _, value = header.partition(" ")
        return user_of_token(value.strip()) if scheme.lower() == "bearer" else None

    @staticmethod
    def _from_session(request: HttpRequest) -> User | None:
        if SESSION_KEY not in request.session or not request.user.is_authenticated:
            return None
        if check_csrf(request) is not None:
            raise HttpError(403, "csrf check failed")
        return request.user


def caller(request: HttpRequest) -> User:
    """The user who was authenticated by :class:`UserAuth`."""
    user = getattr(request, "auth", None)
    if not isinstance(user, User):
        raise HttpError(401, "not logged in")
    return user


def require_role(request: HttpRequest, *roles: str) -> User:
    """The caller, if they hold one of ``roles`` (``auditor``, ``admin``); 403 otherwise, on record."""
    user = caller(request)
    if not any(getattr(user, _ROLE_FIELDS[role]) for role in roles):
        reason = f"needs the role {' or '.join(roles)}"
        audit.record(user, "role", f"{request.method} {request.path}", "refused", reason=reason)
        raise HttpError(403, reason)
    return user


class Me(Schema):
    name: str
    roles: list[str]


router = Router(auth=UserAuth(), tags=["people"])


@router.get("/me", response=Me)
def me(request: HttpRequest) -> dict[str, Any]:
    """Who the caller is."""
    user = caller(request)
    return {"name": user.username, "roles": user.roles}
