"""The data path for as long as one likes, with everything that goes wrong at once.

``PAM_SOAK_MINUTES=20`` (default: three quarters of one) says how long; see docs/performance.md. Keys are
exchanged every 10 MB on all ends; channels end cleanly, are cut, or have readers that stall; clients come, go
and stop reading their socket altogether.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from traffic import CLEAN, Exchange, answer

from pam_common import fast_ssh
from pam_common.errors import PamError
from pam_common.fast_ssh import ChannelStream, Transport

pytestmark = [pytest.mark.slow]

SECONDS = 60 * float(os.environ.get("PAM_SOAK_MINUTES", "0.75"))
REKEY_BYTES = 10_000_000
LARGEST = 6 << 20
#: Of certificates (s): the relay ends a link with its own.
LIFETIME = SECONDS + 3600
#: No exchange takes so long, on however busy a machine.
STUCK = 90.0


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Soak:
    """Workers that each repeat a job until the time is over, and what they did."""

    def __init__(self, world: Any) -> None:
        self.world = world
        self.end = time.monotonic() + SECONDS
        self.done: Counter[str] = Counter()
        self.checked = 0
        self.errors: list[str] = []
        self.rekeys = 0
        self._progress: dict[str, float] = {}
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def repeat(self, job: Callable[[random.Random], None], name: str) -> None:
        thread = threading.Thread(target=self._repeat, args=(job, name), name=f"soak-{name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _repeat(self, job: Callable[[random.Random], None], name: str) -> None:
        rng = random.Random(name)
        while time.monotonic() < self.end and not self.errors:
            self._progress[name] = time.monotonic()
            try:
                job(rng)
            except Exception as error:  # noqa: BLE001  of another thread: told by the test's own
                self.errors.append(f"{name}: {type(error).__name__}: {error}")
            with self._lock:
                self.done[name.partition("-")[0]] += 1
        self._progress.pop(name, None)

    def wait(self) -> None:
        """Until all are done; fails when one makes no progress."""
        while any(thread.is_alive() for thread in self._threads):
            time.sleep(0.5)
            stuck = [name for name, at in list(self._progress.items()) if time.monotonic() - at > STUCK]
            if stuck:
                faulthandler.dump_traceback(sys.__stderr__)
                pytest.fail(f"no progress: {stuck}; {self.errors}")

    # -- connections ---------------------------------------------------------------------------------------

    def rekeying(self, transport: Transport) -> Transport:
        transport.packets.rekey_bytes = REKEY_BYTES
        for link in list(self.world.relay._links.values()):
            if link.transport is not None:
                link.transport.packets.rekey_bytes = REKEY_BYTES
        return transport

    def arrived(self, stream: ChannelStream, _origin: object, _to: object) -> None:
        threading.Thread(target=self._answer, args=(stream,), name="soak-answer", daemon=True).start()

    def _answer(self, stream: ChannelStream) -> None:
        try:
            self._count(answer(stream))
        except OSError:
            pass  # cut before it had begun
        except Exception as error:  # noqa: BLE001
            # Clean or not, a link that was dropped cuts what was on it: that is the client's to judge.
            if "nobody had cut" not in str(error):
                self.errors.append(f"agent: {error}")
        stream.close()

    def _count(self, size: int) -> None:
        with self._lock:
            self.checked += size

    # -- jobs ----------------------------------------------------------------------------------------------

    def exchange(self, client: Transport) -> Callable[[random.Random], None]:
        """One channel after the other on a connection that stays."""

        def job(rng: random.Random) -> None:
            stream = fast_ssh.open_direct(client, "dc1")
            self._count(Exchange.random(rng, LARGEST).run(stream))

        return job

    def come_and_go(self, rng: random.Random) -> None:
        """A connection for one exchange; at times it is dropped in the middle."""
        client = self.rekeying(self.world.client())
        timer = threading.Timer(rng.random(), client.close) if rng.random() < 0.4 else None
        if timer is not None:
            timer.start()
        try:
            stream = fast_ssh.open_direct(client, "dc1")
            self._count(Exchange.random(rng, LARGEST // 4).run(stream))
        except Exception as error:
            expected = isinstance(error, PamError | OSError) or "nobody" in str(error)
            if timer is None or not expected:
                raise
        finally:
            if timer is not None:
                timer.cancel()
                timer.join()
            self._leave(client)

    def go_deaf(self, rng: random.Random) -> None:
        """A client that stops reading its socket while much is on its way, and then reads on."""
        client = self.rekeying(self.world.client())
        wake = threading.Event()
        client._handler_table[80] = lambda _message: wake.wait(30)
        with contextlib.closing(client):
            exchanges = [
                threading.Thread(target=self._unhurried, args=(client,), name="soak-deaf") for _ in range(3)
            ]
            for thread in exchanges:
                thread.start()
            own = client.sock.getsockname()
            for link in list(self.world.relay._links.values()):
                transport = link.transport  # none yet, of one that comes just now
                with contextlib.suppress(OSError):
                    if transport is not None and transport.sock.getpeername() == own:
                        transport.send_soon(b"\x50\0\0\0\x04stop\0")
            time.sleep(rng.random() * 2)
            wake.set()
            for thread in exchanges:
                thread.join()
        self._leave(client)

    def _unhurried(self, client: Transport) -> None:
        try:
            stream = fast_ssh.open_direct(client, "dc1", timeout=60)
            self._count(Exchange(100_000, LARGEST, end=CLEAN).run(stream))
        except Exception as error:  # noqa: BLE001
            self.errors.append(f"deaf: {type(error).__name__}: {error}")

    def _leave(self, client: Transport) -> None:
        client.close()
        client.join(90)
        self.world._opened.remove(client)
        if client.is_alive():
            self.errors.append("the thread of a connection does not end")


@pytest.fixture
def soak(world: Any) -> Soak:
    world.start()
    return Soak(world)


@pytest.mark.timeout(SECONDS + 300)
def test_nothing_hangs_breaks_or_grows(soak: Soak, wait_for: Callable[..., None]) -> None:
    world = soak.world
    threads, open_files = threading.active_count(), descriptors()
    agents = [world.connect(world.login("serve:dc1", "dc1-a", lifetime=LIFETIME)) for _ in range(2)]
    for slot, agent in enumerate(agents, 1):
        soak.rekeying(agent).request_port_forward("dc1", slot, soak.arrived)
    clients = [soak.rekeying(world.client(lifetime=LIFETIME)) for _ in range(2)]
    soak.rekeying(clients[0])
    keys = [client.packets._key_out for client in clients]
    for number, client in enumerate(clients * 2):
        soak.repeat(soak.exchange(client), f"exchange-{number}")
    for number in range(2):
        soak.repeat(soak.come_and_go, f"come-{number}")
    soak.repeat(soak.go_deaf, "deaf-0")
    sizes = sample(soak.end)
    soak.wait()
    print(f"{dict(soak.done)}, {soak.checked / 1e9:.2f} GB checked, MiB {[size >> 20 for size in sizes]}")
    assert not soak.errors, (soak.errors, [end.fault for end in (*agents, *clients)])
    assert all(end.is_active() for end in (*agents, *clients)), [end.fault for end in (*agents, *clients)]
    assert all(client.packets._key_out is not key for client, key in zip(clients, keys, strict=True))
    assert all(soak.done[name] for name in ("exchange", "come", "deaf"))
    wait_for(lambda: world.relay.channels == 0, 120)
    wait_for(lambda: not any(end._streams for end in (*agents, *clients)), 120)
    for end in (*agents, *clients):
        end.close()
        end.join(60)
    wait_for(lambda: not world.relay._links and not world.relay._splices, 120)
    wait_for(lambda: threading.active_count() <= threads, 120)
    wait_for(lambda: descriptors() <= open_files, 120)
    # The first third is for buffers and allocator to reach their size.
    early, late = max(sizes[: len(sizes) // 3]), max(sizes[len(sizes) * 2 // 3 :])
    assert late < early * 1.15 + (16 << 20), [size >> 20 for size in sizes]


def sample(end: float) -> list[int]:
    """Resident bytes, thirty times until ``end``."""
    pause = max(0.1, (end - time.monotonic()) / 30)
    sizes = []
    while time.monotonic() < end:
        time.sleep(pause)
        sizes.append(resident())
    return sizes
