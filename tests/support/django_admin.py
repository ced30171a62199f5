"""Django's own admin site, as a team would run it: a form login with CSRF, sessions in a database.

python tests/support/django_admin.py FOLDER PORT     (FOLDER/password is that of "keeper")
"""

from __future__ import annotations

import sys
from pathlib import Path
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import django
from django.conf import settings
from django.urls import path


def configure(folder: Path) -> None:
    settings.configure(
        SECRET_KEY="for-a-test-on-this-machine-only-" + "x" * 32,
        ALLOWED_HOSTS=["admin.corp.test"],
        ROOT_URLCONF="django_admin",
        INSTALLED_APPS=[
            f"django.contrib.{name}"
            for name in ("admin", "auth", "contenttypes", "sessions", "messages", "staticfiles")
        ],
        MIDDLEWARE=[
            "django.middleware.security.SecurityMiddleware",
            "django.contrib.sessions.middleware.SessionMiddleware",
            "django.middleware.common.CommonMiddleware",
            "django.middleware.csrf.CsrfViewMiddleware",
            "django.contrib.auth.middleware.AuthenticationMiddleware",
            "django.contrib.messages.middleware.MessageMiddleware",
        ],
        TEMPLATES=[
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
        ],
        DATABASES={
            "default": {"ENGINE": "django.db.backends.sqlite3", "NAME": str(folder / "admin.sqlite3")}
        },
        STATIC_URL="/static/",
        USE_TZ=True,
        DEBUG=False,
        # nginx in front speaks TLS.
        SECURE_PROXY_SSL_HEADER=("HTTP_X_FORWARDED_PROTO", "https"),
        SESSION_COOKIE_SECURE=True,
        CSRF_COOKIE_SECURE=True,
        PASSWORD_HASHERS=["django.contrib.auth.hashers.PBKDF2PasswordHasher"],
    )
    django.setup()


class Quiet(WSGIRequestHandler):
    def log_message(self, *_: object) -> None: ...


class Threaded(ThreadingMixIn, WSGIServer):
    daemon_threads = True


def main(folder: Path, port: int) -> None:
    configure(folder)
    from django.contrib import admin
    from django.contrib.auth import get_user_model
    from django.contrib.staticfiles.views import serve
    from django.core.management import call_command
    from django.core.wsgi import get_wsgi_application

    urlpatterns.extend(
        [
            path("static/<path:path>", serve, {"insecure": True}),
            path("", admin.site.urls),
        ]
    )
    call_command("migrate", verbosity=0)
    get_user_model().objects.create_superuser("keeper", "keeper@corp.test", (folder / "password").read_text())
    make_server("127.0.0.1", port, get_wsgi_application(), Threaded, Quiet).serve_forever()


urlpatterns: list[object] = []

if __name__ == "__main__":
    # The URLs are found by this module's name.
    sys.modules["django_admin"] = sys.modules["__main__"]
    main(Path(sys.argv[1]), int(sys.argv[2]))
