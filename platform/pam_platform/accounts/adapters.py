"""Where allauth asks this installation how it wants things done."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

from allauth.account.adapter import DefaultAccountAdapter
from allauth.idp.oidc.adapter import DefaultOIDCAdapter
from allauth.mfa.adapter import DefaultMFAAdapter
from cryptography.fernet import Fernet, MultiFernet
from django.conf import settings
from django.http import HttpRequest, HttpResponse

# Separates this use of SECRET_KEY from every other.
_MFA_PURPOSE = b"pam-mfa-secret-v1"


class AccountAdapter(DefaultAccountAdapter):  # type: ignore[misc]  # allauth is untyped
    """No sign-up, no web login for programs."""

    def is_open_for_signup(self, request: HttpRequest) -> bool:
        return False

    def pre_login(self, request: HttpRequest, user: Any, **kwargs: Any) -> HttpResponse | None:
        # A right password for a user the back-end refuses still arrives here, so that allauth can
        # say "inactive"; a service user gets the same answer and never a session.
        if not user.is_active or user.is_service:
            refusal: HttpResponse = self.respond_user_inactive(request, user)
            return refusal
        response: HttpResponse | None = super().pre_login(request, user, **kwargs)
        return response


class MFAAdapter(DefaultMFAAdapter):  # type: ignore[misc]  # allauth is untyped
    """Second-factor secrets are encrypted at rest: a copy of the database alone yields no codes."""

    def encrypt(self, text: str) -> str:
        return _mfa_cipher().encrypt(text.encode()).decode()

    def decrypt(self, encrypted_text: str) -> str:
        return _mfa_cipher().decrypt(encrypted_text.encode()).decode()


class OIDCAdapter(DefaultOIDCAdapter):  # type: ignore[misc]  # allauth is untyped
    """The issuer is the configured address, whatever the Host header says."""

    def get_issuer(self) -> str:
        return str(settings.PAM_ISSUER)


def _mfa_cipher() -> MultiFernet:
    """Cipher under a key derived from SECRET_KEY; keys being rotated out still decrypt."""
    secrets = [settings.SECRET_KEY, *settings.SECRET_KEY_FALLBACKS]
    digests = [hashlib.blake2b(_MFA_PURPOSE, key=_fit(secret), digest_size=32).digest() for secret in secrets]
    return MultiFernet([Fernet(base64.urlsafe_b64encode(digest)) for digest in digests])


def _fit(secret: str) -> bytes:
    """BLAKE2b keys have at most 64 bytes; hash first, so no byte of a longer one is lost."""
    return hashlib.blake2b(secret.encode()).digest()
