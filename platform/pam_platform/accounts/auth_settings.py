"""The part of Django's settings that is about logging in.

``settings.py`` takes ``INSTALLED_APPS`` and ``MIDDLEWARE`` of :data:`AUTH_SETTINGS` into its own
lists and every other key as it is. Keys that depend on platform.yml (the OIDC signing key, secure
cookies, trusted proxies) come from :func:`site_settings`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

# Device codes, rate limits and used MFA codes live in the cache; each gunicorn worker must see the
# same one, so it is a table (`createcachetable`, run by `pam-platform init`).
# When full, a third is dropped without regard to age, and what is dropped may be a rate limit:
# rates per address are limited below, so 100 000 entries are not reached by one attacker.
_CACHE = {
    "BACKEND": "django.core.cache.backends.db.DatabaseCache",
    "LOCATION": "pam_cache",
    "TIMEOUT": 300,
    "OPTIONS": {"MAX_ENTRIES": 100_000},
}

AUTH_SETTINGS: dict[str, Any] = {
    "INSTALLED_APPS": [
        "django.contrib.auth",
        "django.contrib.contenttypes",
        "django.contrib.sessions",
        "django.contrib.messages",
        # ours before allauth: a template of the same name overrides allauth's
        "pam_platform.web",
        "pam_platform.accounts",
        "allauth",
        "allauth.account",
        "allauth.mfa",
        "allauth.idp.oidc",
    ],
    # After SecurityMiddleware and whitenoise.
    "MIDDLEWARE": [
        "django.contrib.sessions.middleware.SessionMiddleware",
        "django.middleware.common.CommonMiddleware",
        "django.middleware.csrf.CsrfViewMiddleware",
        "django.contrib.auth.middleware.AuthenticationMiddleware",
        "django.contrib.messages.middleware.MessageMiddleware",
        "django.middleware.clickjacking.XFrameOptionsMiddleware",
        "allauth.account.middleware.AccountMiddleware",
        "pam_platform.web.middleware.PageHeaders",
    ],
    "AUTH_USER_MODEL": "accounts.User",
    "AUTHENTICATION_BACKENDS": ["pam_platform.accounts.backends.PasswordBackend"],
    "AUTH_PASSWORD_VALIDATORS": [
        {"NAME": "django.contrib.auth.password_validation.UserAttributeSimilarityValidator"},
        # NIST SP 800-63B asks 8 with a second factor and 15 without; 12 is between, MFA is optional.
        {
            "NAME": "django.contrib.auth.password_validation.MinimumLengthValidator",
            "OPTIONS": {"min_length": 12},
        },
        {"NAME": "django.contrib.auth.password_validation.CommonPasswordValidator"},
        {"NAME": "django.contrib.auth.password_validation.NumericPasswordValidator"},
    ],
    "CACHES": {"default": _CACHE},
    "LOGIN_URL": "account_login",
    "LOGIN_REDIRECT_URL": "/",
    "MESSAGE_STORAGE": "django.contrib.messages.storage.session.SessionStorage",
    # A web session ends after a working day and with the browser, whichever is first.
    "SESSION_COOKIE_AGE": 12 * 3600,
    "SESSION_EXPIRE_AT_BROWSER_CLOSE": True,
    "SESSION_COOKIE_HTTPONLY": True,
    "SESSION_COOKIE_SAMESITE": "Lax",
    "CSRF_COOKIE_HTTPONLY": True,
    "CSRF_COOKIE_AGE": None,
    "CSRF_COOKIE_SAMESITE": "Strict",
    "X_FRAME_OPTIONS": "DENY",
    # allauth: names and passwords only. Users come from access.yml, so no sign-up, no e-mail.
    "ACCOUNT_ADAPTER": "pam_platform.accounts.adapters.AccountAdapter",
    "ACCOUNT_LOGIN_METHODS": {"username"},
    "ACCOUNT_SIGNUP_FIELDS": ["username*", "password1*"],
    "ACCOUNT_EMAIL_VERIFICATION": "none",
    "ACCOUNT_SESSION_REMEMBER": False,
    "ACCOUNT_LOGOUT_REDIRECT_URL": "account_login",
    "ACCOUNT_PRESERVE_USERNAME_CASING": False,
    "ACCOUNT_REAUTHENTICATION_REQUIRED": True,
    "ACCOUNT_RATE_LIMITS": {
        "login": "30/m/ip",
        # Five wrong passwords for one name and address stop that name for five minutes.
        "login_failed": "10/m/ip,5/300s/key",
        "reauthenticate": "10/m/user",
        "change_password": "5/m/user",
    },
    # No passkeys yet: their pages need scripts, which the content security policy does not admit.
    "MFA_SUPPORTED_TYPES": ["totp", "recovery_codes"],
    "MFA_ADAPTER": "pam_platform.accounts.adapters.MFAAdapter",
    "MFA_TOTP_ISSUER": "pam-platform",
    "IDP_OIDC_ADAPTER": "pam_platform.accounts.adapters.OIDCAdapter",
    # Opaque, looked up on each request: disabling a user or revoking a token works at once.
    "IDP_OIDC_ACCESS_TOKEN_FORMAT": "opaque",
    "IDP_OIDC_ACCESS_TOKEN_EXPIRES_IN": 900,
    # Each use gives a new one, so this is how long a client may stay unused before logging in again.
    "IDP_OIDC_REFRESH_TOKEN_EXPIRES_IN": 12 * 3600,
    "IDP_OIDC_ROTATE_REFRESH_TOKEN": True,
    # Time to find the browser and a second factor; RFC 8628 asks for short-lived codes.
    "IDP_OIDC_DEVICE_CODE_EXPIRES_IN": 600,
    "IDP_OIDC_DEVICE_CODE_INTERVAL": 2,
    "IDP_OIDC_RATE_LIMITS": {
        "device_user_code": "20/m/ip",
        "device_code": "30/m/ip",
        # A polling client asks 30 times a minute; an office behind one address holds several.
        "token": "600/m/ip",
        # Each costs a password hash.
        "client_credentials": "60/m/ip",
    },
}


def site_settings(
    *, public_url: str, oidc_key: Path | None = None, trusted_proxies: int = 0
) -> dict[str, Any]:
    """Login settings that depend on the installation.

    ``public_url``: the address people use; with https, cookies are sent over TLS only and get the
    ``__Host-`` prefix, so no sibling host can set them. ``oidc_key``: PEM file of the RSA key that
    signs ID tokens, absent before ``init``. ``trusted_proxies``: how many reverse proxies in front
    set ``X-Forwarded-For``; 0 means the header is ignored.
    """
    parts = urlsplit(public_url)
    secure = parts.scheme == "https"
    prefix = "__Host-" if secure else ""
    settings: dict[str, Any] = {
        "SESSION_COOKIE_SECURE": secure,
        "CSRF_COOKIE_SECURE": secure,
        "SESSION_COOKIE_NAME": f"{prefix}sessionid",
        "CSRF_COOKIE_NAME": f"{prefix}csrftoken",
        "CSRF_TRUSTED_ORIGINS": [f"{parts.scheme}://{parts.netloc}"],
        "ACCOUNT_DEFAULT_HTTP_PROTOCOL": parts.scheme,
        "ALLAUTH_TRUSTED_PROXY_COUNT": trusted_proxies,
    }
    if oidc_key is not None and oidc_key.exists():
        settings["IDP_OIDC_PRIVATE_KEY"] = oidc_key.read_text()
    return settings
