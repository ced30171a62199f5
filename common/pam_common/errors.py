"""What goes wrong, in words for the person who reads it.

Every error that may reach a person is a :class:`PamError`: a lower-case sentence that says what
happened and, in ``hint``, what to do about it. Command lines print ``error: …`` and ``HINT: …`` and
exit with ``exit_code``; anything else that escapes is a bug and shows a traceback.
"""

from __future__ import annotations


class PamError(Exception):
    """Something failed; the message is for the user, ``hint`` says what to do next."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class ConfigError(PamError):
    """A configuration file is wrong. ``problems`` holds every finding, each ``file:line: key: …``."""

    exit_code = 78  # EX_CONFIG of sysexits.h, which systemd's RestartPreventExitStatus can name

    def __init__(self, problems: list[str], *, hint: str = "") -> None:
        super().__init__("\n".join(problems), hint=hint)
        self.problems = problems


class ProtocolError(PamError):
    """The other side sent something its protocol does not allow; nothing of it is used."""


class AuthenticationError(PamError):
    """A key, certificate, token or signature is not what it must be; the peer is refused."""


class RefusedError(PamError):
    """The other side understood and said no; the message is its reason."""


class UnavailableError(PamError):
    """The platform, a relay or a target cannot be reached now; trying again may help."""

    exit_code = 69  # EX_UNAVAILABLE


class TruncatedError(ProtocolError):
    """The stream ended without a proper end: what arrived may be cut and is not a clean end."""
