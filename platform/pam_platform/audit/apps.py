"""The audit app."""

from django.apps import AppConfig


class AuditConfig(AppConfig):
    name = "pam_platform.audit"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from django.core.signals import request_started

        from pam_platform import audit

        request_started.connect(audit.begin_request, dispatch_uid="pam.audit.begin_request")
