"""The HTTP API: one NinjaAPI under ``/api/v1``, built from each part's router."""

from pam_platform.api.root import api

__all__ = ["api"]
