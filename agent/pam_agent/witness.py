"""Witness: shows the platform where each recording's chain has got to, while the session runs.

A head that the platform has seen can never be recorded around again. Posting may fail or hang without
any effect on sessions or on how often their files are synced: only the newest head of a part is kept,
and one thread posts them.
"""

from __future__ import annotations

import random
import threading

from pam_common.errors import AuthenticationError, PamError, RefusedError, UnavailableError
from pam_common.logging import get_logger, kv
from pam_common.platform_client import PlatformClient
from pam_common.recording.format import Head

log = get_logger("agent.witness")

#: A platform that does not answer within this is not going to.
POST_TIMEOUT = 10.0
#: First and longest wait after a failure. Heads are small: half a minute late costs little.
FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0

#: Parts whose refusal was logged; more than sessions at once, and forgetting one costs a log line.
MAX_NOTED = 1000


class Witness:
    """Posts the newest head of each part from a thread of its own."""

    def __init__(self, platform: PlatformClient) -> None:
        self._platform = platform
        self._condition = threading.Condition()
        # One entry per part being recorded, so the session limit bounds it.
        self._newest: dict[tuple[str, int], Head] = {}
        self._posting: tuple[str, int] | None = None  # None too when that part was finished meanwhile
        self._refused: set[tuple[str, int]] = set()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="recorder-witness", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float = 5.0) -> None:
        """Stop posting; what was not posted is covered by the final head."""
        with self._condition:
            self._stopping = True
            self._condition.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def offer(self, head: Head) -> None:
        """Post ``head`` when possible, unless a newer one of its part comes before."""
        with self._condition:
            self._newest[head.session, head.part] = head
            self._condition.notify_all()

    def forget(self, session: str, part: int) -> None:
        """The part is finished: its final head says it all."""
        with self._condition:
            self._newest.pop((session, part), None)
            if self._posting == (session, part):
                self._posting = None
            self._refused.discard((session, part))

    def _run(self) -> None:
        wait = FIRST_WAIT
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._stopping or self._newest)
                if self._stopping:
                    return
                place = self._posting = next(iter(self._newest))
                head = self._newest.pop(place)
            if self._post(head):
                wait = FIRST_WAIT
                continue
            with self._condition:
                if self._posting == place:
                    self._newest.setdefault(place, head)  # a newer one may have come meanwhile
                pause = wait * random.uniform(0.5, 1.0)  # noqa: S311  jitter, not a secret
                self._condition.wait_for(lambda: self._stopping, pause)
            wait = min(wait * 2, LONGEST_WAIT)

    def _post(self, head: Head) -> bool:
        path = f"/agent/recordings/{head.session}/{head.part}/head"
        try:
            self._platform.post(path, json=head.to_json(), timeout=POST_TIMEOUT)
        except (UnavailableError, AuthenticationError):
            return False
        except RefusedError as error:
            self._note_refusal(head, error)
        except PamError as error:
            log.warning("head not witnessed", extra=kv(session=head.session, reason=error))
            return False
        return True

    def _note_refusal(self, head: Head, error: RefusedError) -> None:
        # Once per part: the next heads of it will be refused as well.
        place = (head.session, head.part)
        with self._condition:
            # A head that crosses the end of its part on the way is refused rightly.
            known = place in self._refused or self._posting != place
            if len(self._refused) >= MAX_NOTED:
                self._refused.clear()
            self._refused.add(place)
        if not known:
            fields = kv(session=head.session, recording_part=head.part, chunks=head.count, reason=error)
            log.error("platform refuses to witness a recording", extra=fields)
