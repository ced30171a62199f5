"""The WSGI application; ``serve`` loads it in each worker."""

from __future__ import annotations

import os

from django.core.wsgi import get_wsgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "pam_platform.settings")
application = get_wsgi_application()
