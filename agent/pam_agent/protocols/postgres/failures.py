"""How failures are said to a client in PostgreSQL's own form."""

from __future__ import annotations

import contextlib
from typing import Final

from pam_agent.protocols.base import (
    ClientProtocolError,
    Conversation,
    TargetLoginError,
    TargetProtocolError,
)
from pam_agent.protocols.postgres.codec import error_response
from pam_agent.protocols.postgres.login import TargetRefusalError
from pam_agent.protocols.postgres.pump import TargetGoneError
from pam_common.errors import PamError, RefusedError, UnavailableError
from pam_common.secure_channel import deadline
from pam_common.stream import Stream

#: For a client to take its last message.
FAREWELL_SECONDS: Final = 5.0

REFUSED: Final = "28000"  # invalid_authorization_specification
_RECORDER: Final = "58030"  # io_error

#: The SQLSTATE for each error; the first match counts. What is left is a recording that failed.
_SQLSTATES: Final[tuple[tuple[type[PamError], str], ...]] = (
    (ClientProtocolError, "08P01"),  # protocol_violation
    (TargetProtocolError, "08P01"),
    (TargetLoginError, REFUSED),
    (TargetGoneError, "08006"),  # connection_failure
    (UnavailableError, "08001"),  # sqlclient_unable_to_establish_sqlconnection
    (RefusedError, REFUSED),
)


class SessionEndedError(RefusedError):
    """The session was ended from outside; the message is the reason."""


def reason(error: PamError | OSError, conversation: Conversation) -> PamError:
    """What to say of an error: the session's end, when that caused it."""
    if conversation.end_reason is not None:
        return SessionEndedError(conversation.end_reason)
    if isinstance(error, PamError):
        return error
    if isinstance(error, TimeoutError):
        return UnavailableError("the target does not answer")
    return UnavailableError(f"the target cannot be used: {error.strerror or type(error).__name__}")


def sqlstate(error: PamError) -> str:
    if isinstance(error, TargetRefusalError):
        return error.sqlstate
    if isinstance(error, SessionEndedError):
        return "57P01"  # admin_shutdown: drivers know that the connection is over
    return next((state for kind, state in _SQLSTATES if isinstance(error, kind)), _RECORDER)


def tell(client: Stream, error: PamError) -> None:
    """Send the error as the last message, if the client takes it. Never raises, never hangs."""
    hint = error.hint
    if sqlstate(error) == _RECORDER and not hint:
        hint = "nothing goes on without its recording; tell an administrator"
    with contextlib.suppress(OSError, PamError), deadline(client, FAREWELL_SECONDS, "the last message"):
        client.sendall(error_response(sqlstate(error), str(error), hint))
