"""The access app."""

from django.apps import AppConfig


class AccessConfig(AppConfig):
    name = "pam_platform.access"
    default_auto_field = "django.db.models.BigAutoField"
