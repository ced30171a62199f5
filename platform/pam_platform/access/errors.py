"""Refusals that are not about rights."""

from pam_common.errors import PamError


class ConflictError(PamError):
    """What was asked does not fit the state of things; the API answers 409."""


class NotFoundError(PamError):
    """There is no such thing, or the caller may not know of it; the API answers 404."""
