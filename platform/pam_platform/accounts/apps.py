"""The accounts app: loads the audit of logins once all models exist."""

from django.apps import AppConfig


class AccountsConfig(AppConfig):
    name = "pam_platform.accounts"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from pam_platform.accounts import signals

        signals.connect()
