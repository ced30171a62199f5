"""Very many agents' tunnels to one relay, which can be restarted.

    with Fleet(folder, 2000) as fleet:
        fleet.wait_up(60)      # seconds until all were up
        fleet.restart_relay(downtime=2)
        fleet.wait_up(60)

The tunnels are the product's, in processes of their own; so is the relay. Agents have 16 tunnels each, the
most there can be, and come from many addresses, as in the world.
"""

from __future__ import annotations

import itertools
import json
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any, cast

from crowd import HOST, HOST_CA, USER_CA, Part, load, say
from processes import free_port

from pam_agent import tunnel as tunnel_module
from pam_agent.state import Relay
from pam_agent.tunnel import Tunnel
from pam_common import logging
from pam_common.keys import SigningKey, VerifyKeys
from pam_common.ssh_certs import make_user_certificate

PROCESSES = 2
SLOTS = 16


class Fleet:
    """``count`` tunnels, made below ``folder``, which must be empty and private."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count
        self._port = free_port()
        self._agents: list[Part] = []

    def __enter__(self) -> Fleet:
        about = {"port": self._port, "count": self.count}
        (self.folder / "fleet.json").write_text(json.dumps(about))
        self.relay = self._part("relay")
        self._agents = [self._part(f"agents-{number}") for number in range(PROCESSES)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for part in (*self._agents, self.relay):
            part.stop()

    def _part(self, role: str) -> Part:
        return Part(role, self.folder, program=__file__)

    def wait_up(self, timeout: float) -> float:
        """Wait until every tunnel is up and the relay routes to it; the seconds that took."""
        began = time.monotonic()
        while self.routes() < self.count or self.up() < self.count:
            if time.monotonic() - began > timeout:
                found = f"{self.up()} tunnels are up, {self.routes()} routes there"
                raise TimeoutError(f"{found}, of {self.count} after {timeout:g} s")
            time.sleep(0.2)
        return round(time.monotonic() - began, 1)

    def up(self) -> int:
        return sum(self._ask(part, "up") for part in self._agents)

    def routes(self) -> int:
        return self._ask(self.relay, "routes")

    def restart_relay(self, downtime: float) -> None:
        """End it at once, and start it again after ``downtime`` seconds."""
        self.relay.kill()
        time.sleep(downtime)
        self.relay = self._part("relay")

    @staticmethod
    def _ask(part: Part, what: str) -> int:
        part.tell(ask=what)
        return int(part.answer())


# -- the other processes -----------------------------------------------------------------------------------


def answer(**answers: Any) -> None:
    """Answer questions by name until nobody asks any more."""
    for line in sys.stdin:
        say(answers[json.loads(line)["ask"]]())


def run_relay(about: dict[str, int]) -> None:
    module = load("relay")
    world = module.World()
    world.user_ca, world.host_ca, world.host = USER_CA, HOST_CA, HOST
    limits = module.Limits(transports=5000)  # and logins at once as by default
    world.server = module.RelayServer(world.bundle(), HOST.seed(), limits=limits)
    world.server.listen("127.0.0.1", about["port"])
    say("ready")
    answer(routes=lambda: len(world.server.status()["routes"]))
    world.close()


def run_agents(about: dict[str, int], process: int) -> None:
    relay = Relay("r1", "127.0.0.1", about["port"])
    sources = itertools.count()

    def dial(address: tuple[str, int], timeout: float) -> socket.socket:
        number = next(sources)
        source = f"127.{1 + process}.{number // 250 % 250}.{1 + number % 250}"
        return socket.create_connection(address, timeout=timeout, source_address=(source, 0))

    # The module's own name for it, so that ours can use the true one.
    tunnel_module.socket = SimpleNamespace(create_connection=dial)  # type: ignore[attr-defined]
    running = []
    for number in range(process, about["count"], PROCESSES):
        agent, slot = divmod(number // PROCESSES, SLOTS)
        if slot == 0:
            state = _state(f"dc1-{process}-{agent}")
        running.append(Tunnel(relay, slot + 1, state, cast("Any", None), now=time.time))
        running[-1].start()
    say("ready")
    answer(up=lambda: sum(tunnel.up for tunnel in running))
    for tunnel in running:
        tunnel.stop()


def _state(name: str) -> Any:
    """As much of an AgentState as a Tunnel looks at."""
    key, now = SigningKey.generate(), int(time.time())
    certificate = make_user_certificate(
        USER_CA,
        key.public,
        key_id=name,
        principals=["serve:dc1"],
        valid_after=now - 300,
        valid_before=now + 7200,
    )
    standing = SimpleNamespace(
        gateway="dc1",
        certificate=certificate,
        certificate_expires=now + 7200,
        trust=SimpleNamespace(relay_host_ca=VerifyKeys.of(HOST_CA.public)),
    )
    return SimpleNamespace(standing=standing, keys=SimpleNamespace(identity_seed=key.seed()))


def main() -> None:
    logging.setup("warning")
    role, _, number = sys.argv[1].partition("-")
    about = json.loads((Path(sys.argv[2]) / "fleet.json").read_text())
    if role == "relay":
        run_relay(about)
    else:
        run_agents(about, int(number))


if __name__ == "__main__":
    main()
