"""A session ends with the command that opened it; the platform hears of it, whatever ended the command."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from pam_client.api import Api
from pam_client.grants import Grants
from pam_client.session import Session
from pam_common.errors import PamError
from pam_common.logging import get_logger, kv

log = get_logger("client.ending")


@contextlib.contextmanager
def told(api: Api, grants: Grants) -> Iterator[None]:
    """Tell the platform when the block is left, also when SIGTERM or a hang-up leaves it.

    Must be entered in the main thread. A second SIGTERM acts as it would without us. Hang-ups come twice in
    ordinary life and are ignored from the first on, or from the block's end: the terminal sends one and the
    shell another, and ssh sends one to its ProxyCommand when it is done, which may be ending already.
    """

    def leave(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN if number == signal.SIGHUP else signal.SIG_DFL)
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        _tell(api, grants.current)


def _tell(api: Api, session: Session) -> None:
    """What the platform does not hear ends by itself, so a failure is only logged."""
    try:
        api.end(session.id)
    except PamError as error:
        log.info("the end was not told to the platform", extra=kv(session=session.id, error=error))
