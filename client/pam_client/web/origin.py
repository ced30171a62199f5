"""Under which name an account's application is reached on this machine, and who may.

    first on every connection, from us          the agent checks
    {"v": 1, "mode": "browser",                 Host and Origin are this origin's; the cookie that only
     "origin": "http://viewer.grafana…:42017",  the one-time link gives
     "key": …}
    {"v": 1, "mode": "program",                 nothing that a browser would say of itself
     "origin": "http://127.0.0.1:40123"}

Every account has a host name of its own below ``localhost``, which browsers resolve by themselves
(RFC 6761, 6.3): cookies ignore ports, so two applications on one name would share theirs.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from dataclasses import dataclass, field

from pam_common.keys import KEY_SIZE, b64encode

#: Where the agent answers the link.
_ENTER = "/.pam/enter"
_LINK_PURPOSE = b"pam-web-link"


@dataclass(frozen=True)
class Origin:
    """Scheme, name and port as a browser shows them; ``key`` proves to the agent whom we let in."""

    url: str
    key: bytes = field(default=b"", repr=False)  #: empty: for programs, which have no cookie

    @classmethod
    def for_browser(cls, account: str, port: int) -> Origin:
        """``http://viewer.grafana.localhost:PORT`` for ``grafana/viewer``, with a key of its own."""
        resource, _, label = account.partition("/")
        return cls(f"http://{label}.{resource}.localhost:{port}", secrets.token_bytes(KEY_SIZE))

    @classmethod
    def for_programs(cls, port: int) -> Origin:
        """An address that every program understands."""
        return cls(f"http://127.0.0.1:{port}")

    @property
    def preamble(self) -> bytes:
        """What goes up first on every connection."""
        said = {"v": 1, "mode": "browser" if self.key else "program", "origin": self.url}
        if self.key:
            said["key"] = b64encode(self.key)
        return json.dumps(said, separators=(",", ":")).encode() + b"\n"

    @property
    def link(self) -> str:
        """Lets in the browser that opens it first. Secret until then: never logged, never an argument."""
        ticket = hmac.new(self.key, _LINK_PURPOSE, hashlib.sha256).digest()
        return f"{self.url}{_ENTER}?t={b64encode(ticket)}"
