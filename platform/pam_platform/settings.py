"""Django's settings, computed from platform.yml.

``PAM_PLATFORM_CONFIG`` names the file. Without it (type checkers, tools) the settings stand for an empty
installation that keeps nothing: a database in memory and a secret key of its own.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from pam_common.files import read_private
from pam_platform import config
from pam_platform.accounts.auth_settings import AUTH_SETTINGS, site_settings

PAM_CONFIG = config.from_environment()
PAM_ISSUER = PAM_CONFIG.public_url if PAM_CONFIG else "http://127.0.0.1"
PAM_RECORDINGS_DIR = PAM_CONFIG.recordings if PAM_CONFIG else Path("/nonexistent/recordings")

DEBUG = False


def _secret_keys() -> list[str]:
    """The keys in the state folder, the current one first; before ``init`` one that dies with the process."""
    if PAM_CONFIG is not None:
        try:
            return read_private(PAM_CONFIG.secret_key_file).decode().split()
        except FileNotFoundError:
            pass
    return [secrets.token_urlsafe(48)]


def _database() -> dict[str, Any]:
    if PAM_CONFIG is not None and PAM_CONFIG.database is not None:
        return PAM_CONFIG.database.django()
    return {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": PAM_CONFIG.sqlite_file if PAM_CONFIG else ":memory:",
        "OPTIONS": {
            # A transaction takes the write lock at once: one that read first and writes later would
            # fail instead of waiting when another wrote in between.
            "transaction_mode": "IMMEDIATE",
            # Longer than any transaction of ours, shorter than a client's patience.
            "timeout": 20,
            # FULL: a kill or a revocation that was answered survives a power loss.
            "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL",
        },
        "CONN_MAX_AGE": None,
    }


# The first signs and encrypts, the others are still believed.
SECRET_KEY, *SECRET_KEY_FALLBACKS = _secret_keys()
DATABASES = {"default": _database()}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

ALLOWED_HOSTS = [PAM_CONFIG.host] if PAM_CONFIG else []
ROOT_URLCONF = "pam_platform.urls"
WSGI_APPLICATION = "pam_platform.wsgi.application"
USE_TZ = True
TIME_ZONE = "UTC"
LANGUAGE_CODE = "en"
USE_I18N = False
APPEND_SLASH = False

INSTALLED_APPS = [
    *AUTH_SETTINGS["INSTALLED_APPS"],
    "django.contrib.staticfiles",
    "pam_platform.audit",
    "pam_platform.vault",
    "pam_platform.fleet",
    "pam_platform.access",
    "pam_platform.recordings",
]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "pam_platform.limits.RequestLimits",
    *AUTH_SETTINGS["MIDDLEWARE"],
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]

STATIC_URL = "/static/"
# Straight from the installed packages: no copy to collect, none to go stale.
WHITENOISE_USE_FINDERS = True
WHITENOISE_AUTOREFRESH = False

# The largest JSON body is an enrolment, below 2 KiB. Recordings are read as a stream with a cap of their own.
DATA_UPLOAD_MAX_MEMORY_SIZE = 64 * 1024
DATA_UPLOAD_MAX_NUMBER_FIELDS = 50
# No endpoint takes files in forms.
DATA_UPLOAD_MAX_NUMBER_FILES = 1

_HTTPS = PAM_ISSUER.startswith("https:")
SECURE_HSTS_SECONDS = 365 * 24 * 3600 if _HTTPS else 0
SECURE_CONTENT_TYPE_NOSNIFF = True
SECURE_REFERRER_POLICY = "same-origin"
SECURE_CROSS_ORIGIN_OPENER_POLICY = "same-origin"
if PAM_CONFIG is not None and PAM_CONFIG.behind_proxy:
    SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")

# pam_common.logging has set up the root logger; Django's own set-up would add handlers of its own.
LOGGING_CONFIG = None

globals().update(
    {name: value for name, value in AUTH_SETTINGS.items() if name not in ("INSTALLED_APPS", "MIDDLEWARE")},
    **site_settings(
        public_url=PAM_ISSUER,
        oidc_key=PAM_CONFIG.oidc_key_file if PAM_CONFIG else None,
        trusted_proxies=int(PAM_CONFIG.behind_proxy) if PAM_CONFIG else 0,
    ),
)
AUTH_USER_MODEL = AUTH_SETTINGS["AUTH_USER_MODEL"]
# Guessing costs memory as well as time, and one login a third of what Django's default takes of a core. Older
# hashes go on working and are replaced at the next login.
PASSWORD_HASHERS = [f"django.contrib.auth.hashers.{name}PasswordHasher" for name in ("Scrypt", "PBKDF2")]
