"""Per protocol: how a native program is told where the listener is.

A protocol adds one module with a :class:`Launch` and one line in :data:`LAUNCHES`.
"""

from __future__ import annotations

from pam_client.launch.base import Launch, Place, Refusal
from pam_client.launch.http import HTTP
from pam_client.launch.postgres import POSTGRES
from pam_client.launch.ssh import SSH
from pam_common.errors import PamError

__all__ = ["HTTP", "LAUNCHES", "POSTGRES", "SSH", "Launch", "Place", "Refusal", "launch_for"]

#: protocol name → its entry.
LAUNCHES: dict[str, Launch] = {"postgres": POSTGRES, "ssh": SSH, "http": HTTP}


def launch_for(protocol: str) -> Launch:
    """The protocol's entry. Raises PamError when this client is too old to know it."""
    try:
        return LAUNCHES[protocol]
    except KeyError:
        raise PamError(
            f'this client does not know the protocol "{protocol}"', hint="install a newer pam-client."
        ) from None
