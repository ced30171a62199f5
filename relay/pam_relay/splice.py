"""A client's channel joined to an agent's: what it carried, and when it ended.

The bytes are ciphertext of a session whose keys the relay lacks; it only moves them from one connection to
the other (:class:`pam_common.fast_ssh.Switch`), in the reader threads of both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pam_common.fast_ssh import ChannelStream, Switch


@dataclass(frozen=True)
class Summary:
    """How a splice ended; ``cut`` when it was not by both sides' clean ends."""

    bytes_up: int
    bytes_down: int
    cut: bool


class Splice:
    """Carries between ``client`` and ``agent`` until either is closed, then closes the other."""

    def __init__(self, client: ChannelStream, agent: ChannelStream) -> None:
        self._switch = Switch(client, agent, self._over)
        self._ended: Callable[[Summary], None] = lambda _summary: None
        self._reported = (0, 0)

    def start(self, ended: Callable[[Summary], None]) -> None:
        """Begin; ``ended`` is told once, in a thread that must not be held up."""
        self._ended = ended
        self._switch.start()

    def abort(self) -> None:
        """End it from any thread, without waiting."""
        self._switch.abort()

    def progress(self) -> tuple[int, int]:
        """Bytes up and down since the last call. For one thread at a time."""
        now = self._switch.bytes_up, self._switch.bytes_down
        before, self._reported = self._reported, now
        return now[0] - before[0], now[1] - before[1]

    def _over(self) -> None:
        switch = self._switch
        self._ended(Summary(switch.bytes_up, switch.bytes_down, switch.cut))
