"""The doorstep's bound: strangers hold no more than its places."""

from __future__ import annotations

import socket
import threading

from pam_agent import doorstep as doorstep_module
from pam_agent.doorstep import Doorstep
from pam_agent.state import AgentState
from pam_common.keys import new_session_id
from pam_common.stream import SocketStream


def test_who_comes_when_all_places_are_taken_is_cut_at_once(enrolled, wait_until, monkeypatch) -> None:
    monkeypatch.setattr(doorstep_module, "MAX_HANDSHAKES", 2)
    state = AgentState.load(enrolled().state_dir)
    doorstep = Doorstep(state, registry=None, now=lambda: 0.0)  # type: ignore[arg-type]  # nobody gets so far
    session, done = new_session_id(), list[int]()
    pairs = [socket.socketpair() for _ in range(3)]
    for number, (_, far) in enumerate(pairs):
        doorstep.welcome(SocketStream(far), session, lambda number=number: done.append(number))
    assert done == [2]
    pairs[2][0].settimeout(60)
    assert pairs[2][0].recv(1) == b""
    # By a name of their own: threads of another test may still be ending.
    assert sum(thread.name == f"session-{session}" for thread in threading.enumerate()) == 2
    assert not doorstep.wait_empty(0.1)
    for near, _ in pairs:
        near.close()
    wait_until(lambda: sorted(done) == [0, 1, 2], "the end of those who had a place")
    assert doorstep.wait_empty(30)
    for _, far in pairs:
        far.close()
