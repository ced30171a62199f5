"""Cancel keys: the client gets one of ours, which stands for the target's real one.

The process id stays the real one, for programs compare it with ``pg_backend_pid()`` and with the sender of
notifications; the secret is ours. So the target's key never leaves the agent, and a key works only within
the session that it was given to.
"""

from __future__ import annotations

import hmac
import secrets
import threading

from pam_agent.protocols.postgres.codec import UINT32, VERSION_3_2, CancelRequest


class CancelKeys:
    """The keys of one session's connections. Safe for use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._keys: dict[bytes, CancelRequest] = {}

    def issue(self, pid: int, secret: bytes, version: int) -> CancelRequest:
        """A key for the client that stands for the target's ``pid`` and ``secret``."""
        # 4 bytes are all that protocol 3.0 has room for; 32 is what PostgreSQL uses from 3.2 on.
        ours = CancelRequest(pid, secrets.token_bytes(32 if version >= VERSION_3_2 else 4))
        with self._lock:
            self._keys[_flat(ours)] = CancelRequest(pid, secret)
        return ours

    def withdraw(self, ours: CancelRequest) -> None:
        with self._lock:
            self._keys.pop(_flat(ours), None)

    def find(self, request: CancelRequest) -> CancelRequest | None:
        """The target's key for one of ours. Every key is compared, each in constant time."""
        given = _flat(request)
        found = None
        with self._lock:
            for ours, theirs in self._keys.items():
                if hmac.compare_digest(ours, given):
                    found = theirs
        return found


def _flat(key: CancelRequest) -> bytes:
    return UINT32.pack(key.pid) + key.secret
