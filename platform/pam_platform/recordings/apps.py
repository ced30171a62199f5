"""The recordings app."""

from django.apps import AppConfig


class RecordingsConfig(AppConfig):
    name = "pam_platform.recordings"
    default_auto_field = "django.db.models.BigAutoField"
