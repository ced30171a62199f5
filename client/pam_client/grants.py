"""The session of a running connect: granted at once, and once more where the first grant is of no use.

A grant must be used within a minute or two, and the relay's certificate lasts minutes; a person may open
the first connection after lunch, or wake a laptop. Then the platform is asked again, under the same
policy: access is decided anew, and what follows is a session of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from pam_client.session import Session
from pam_common.errors import PamError, ProtocolError
from pam_common.logging import get_logger, kv

log = get_logger("client.grants")

#: Seconds that a handshake through a slow relay may take after we looked at the clock.
MARGIN = 10.0


class Grants:
    """Holds the current session; safe from any thread.

    ``request()`` asks the platform for a session, ``end(id)`` tells it that one is done.
    """

    def __init__(
        self, request: Callable[[], Session], *, end: Callable[[str], None], now: Callable[[], float]
    ) -> None:
        self._request = request
        self._end = end
        self._now = now
        self._lock = threading.Lock()
        self._opened = False
        self.current = request()

    def is_open(self) -> bool:
        """Whether an agent has seen the current grant, so that the session goes on until its end."""
        return self._opened

    def mark_open(self, session: Session) -> None:
        """An agent has seen the grant of ``session``."""
        if session is self.current:
            self._opened = True

    def for_use(self, *, linked: bool) -> Session:
        """A session that a new connection can use. ``linked``: a relay is connected under the current one.

        Raises PamError when the platform grants none any more.
        """
        with self._lock:
            session, soon = self.current, self._now() + MARGIN
            unused = not self._opened and soon >= session.expires
            stranded = not linked and soon >= session.certificate_end
            # At the session's own end there is nothing to go on with.
            if (unused or stranded) and soon < session.session_end:
                self._renew()
            return self.current

    def _renew(self) -> None:
        old, fresh = self.current, self._request()
        if (fresh.account, fresh.protocol) != (old.account, old.protocol):
            raise ProtocolError("the platform granted another account than before", hint="connect again.")
        self.current, self._opened = fresh, False
        log.info("session granted anew", extra=kv(session=fresh.id, before=old.id))
        try:
            self._end(old.id)
        except PamError as error:  # it ends by itself; the new one must not fail for it
            log.info("the old session was not ended", extra=kv(session=old.id, error=error))
