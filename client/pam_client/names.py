"""The names that commands take, as types of their arguments: checked before the platform is asked, whose
words about a mistyped one are those of a validator."""

from __future__ import annotations

import click

from pam_client.output import clean
from pam_common.errors import PamError
from pam_common.keys import is_account, is_label, is_session_id

#: A mistyped name is shown as it was typed, but not a whole file that came by mistake.
_SHOWN = 100


class MistypedError(PamError):
    """What was typed cannot be the name of anything: wrong usage, as any other."""

    exit_code = click.UsageError.exit_code


def session_id(text: str) -> str:
    """The id of a session. Raises MistypedError."""
    if not is_session_id(text):
        raise MistypedError(
            f'"{clean(text, limit=_SHOWN)}" is not a session', hint="pam-client sessions ls lists them"
        )
    return text


def account_name(text: str) -> str:
    """``prod-db/readonly``, or ``prod-db`` alone. Raises MistypedError."""
    if not is_account(text) and not is_label(text):
        raise MistypedError(
            f'"{clean(text, limit=_SHOWN)}" is not an account',
            hint="pam-client ls shows yours; names are lower case, RESOURCE/ACCOUNT",
        )
    return text
