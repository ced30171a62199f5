"""The fleet app."""

from django.apps import AppConfig


class FleetConfig(AppConfig):
    name = "pam_platform.fleet"
    default_auto_field = "django.db.models.BigAutoField"
