"""A relay that means harm, against an agent's tunnels: that one is given up, and the log says why."""

from __future__ import annotations

import contextlib
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import paramiko
import pytest
from stalling import Target

from pam_agent.state import AgentState, Relay
from pam_agent.tunnel import Tunnel
from pam_common import fast_ssh
from pam_common.fast_ssh import transport
from pam_common.fast_ssh.channel import PACKET, WINDOW
from pam_common.keys import new_session_id


class Room:
    """A doorstep that keeps every stream, and reads none."""

    def __init__(self) -> None:
        self.streams: list[Any] = []

    def welcome(self, stream: Any, origin: str, done: Any) -> None:
        self.streams.append(stream)


@pytest.fixture
def room() -> Room:
    return Room()


@pytest.fixture
def new_tunnel(enrolled, room) -> Iterator[Callable[..., Tunnel]]:
    state = AgentState.load(enrolled().state_dir)
    made: list[Tunnel] = []

    def make(name: str, port: int) -> Tunnel:
        made.append(Tunnel(Relay(name, "127.0.0.1", port), 1, state, room, now=time.time))
        made[-1].start()
        return made[-1]

    yield make
    for tunnel in made:
        tunnel.stop()
    for tunnel in made:
        tunnel.join(60)
        assert not tunnel.running


def data(number: int, size: int) -> bytes:
    return struct.pack(">BII", 94, number, size) + bytes(size)


ATTACKS: dict[str, tuple[Callable[[int], list[bytes]], str]] = {
    "window": (lambda n: [data(n, 32_000)] * (WINDOW // 32_000 + 2), "more than its window"),
    "large data": (lambda n: [data(n, PACKET + 1)], "larger packets"),
    "unknown channel": (lambda n: [data(n + 1000, 10)], "never was"),
    "data after EOF": (lambda n: [struct.pack(">BI", 96, n), data(n, 1)], "after its EOF"),
    "opened twice": (lambda n: [struct.pack(">BIIII", 91, n, 7, 7, 7)], "opened again"),
    "lengths that lie": (lambda n: [struct.pack(">BII", 94, n, 1 << 31)], "malformed"),
    "endless room": (lambda n: [struct.pack(">BII", 93, n, 0xFFFFFFFF)] * 2, "4 GiB"),
    "answers to nothing": (lambda _n: [b"\x51"] * 3, "nobody asked"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_relay_that_breaks_the_protocol_loses_its_tunnel_only(
    new_tunnel, relay, another_relay, room, wait_until, caplog, attack: str
) -> None:
    caplog.set_level("INFO", "pam")
    good = another_relay("r2")
    tunnels = [new_tunnel("r1", relay.port), new_tunnel("r2", good.port)]
    wait_until(lambda: relay.live() and good.live(), "both tunnels")
    beside = good.open(new_session_id())
    wait_until(lambda: room.streams, "its other end")
    far = room.streams.pop()
    stream = relay.open(new_session_id())
    hostile = relay.live()[-1]
    make, words = ATTACKS[attack]
    with contextlib.suppress(EOFError, paramiko.SSHException):
        for payload in make(stream.remote):
            hostile.packets.send_payload(payload)

    def lost() -> list[Any]:
        return [record.pam_fields for record in caplog.records if record.getMessage() == "tunnel lost"]

    wait_until(lost, "the log line")
    assert lost()[0]["relay"] == "r1"
    assert words in lost()[0]["reason"]
    beside.sendall(b"still here")
    assert far.recv(100) == b"still here"
    wait_until(lambda: tunnels[0].up, "the relay's next chance")


def test_a_relay_that_stalls_anywhere_in_the_login_is_not_waited_for(
    new_tunnel, relay, wait_until, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the identification, in the key exchange, in the login, in the answer to the forward."""
    whole = Target(relay.port)
    first = new_tunnel("whole", whole.port)
    wait_until(lambda: first.up, "a tunnel")
    said = whole.down
    # Only now: a second attempt of the whole one would be counted with the first.
    for name in ("HANDSHAKE_TIMEOUT", "REQUEST_TIMEOUT"):
        monkeypatch.setattr(transport, name, 3.0)
    monkeypatch.setitem(fast_ssh.connect.__kwdefaults__, "timeout", 3.0)  # type: ignore[arg-type]
    stalls = [Target(relay.port, most_down=said * step // 16) for step in range(16)]
    tunnels = [new_tunnel(f"stall-{number}", stall.port) for number, stall in enumerate(stalls)]
    for tunnel in tunnels:
        assert tunnel.tried.wait(60)
        assert not tunnel.up
        assert tunnel.status()["error"]
    assert first.up
    for tunnel in tunnels:
        tunnel.stop()
    for stall in (whole, *stalls):
        stall.close()
