"""Tunnels: outbound ssh connections to relays, each with one reverse forward ``<gateway>:<slot>``.

    connect ─▶ verify host certificate ─▶ log in ─▶ tcpip-forward ─▶ up ──(lost)──▶ back-off ─▶ connect
                                                                     │
                                            (new certificate) ─▶ a second link first; the old one takes
                                            no new channels and closes with its last one

A :class:`Tunnel` keeps one slot at one relay served; a :class:`Link` is one ssh connection of it.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable

import paramiko

from pam_agent.backoff import Backoff, scatter
from pam_agent.doorstep import Doorstep
from pam_agent.state import AgentState, Relay, Standing
from pam_common import fast_ssh
from pam_common.errors import PamError, UnavailableError
from pam_common.logging import get_logger, kv
from pam_common.ssh_certs import CertificateKey

log = get_logger("agent.tunnel")

CONNECT_TIMEOUT = 10.0
#: A relay that restarts is back in seconds; the cap has all tunnels back within half a minute of its return.
BACKOFF_FIRST, BACKOFF_CAP = 0.5, 20.0
#: A link that lived this long was a good one: the next failure starts the back-off anew. Several restarts in
#: a row must not make the agent slow to return; a relay that drops us at once must not be hammered.
STABLE = 5.0
#: A relay that goes takes the tunnels of every agent with it: they come back over so many seconds.
SPREAD = 3.0
#: Channels of one link at once, beyond which the relay is told no. More than the agent's connections.
MAX_CHANNELS = 2048
#: How often a tunnel looks at its links: draining ones end, a stop or a new certificate is noticed.
PULSE = 1.0


class Link:
    """One ssh connection to a relay that forwards ``gateway:slot`` to ``doorstep``."""

    def __init__(
        self,
        transport: fast_ssh.Transport,
        doorstep: Doorstep,
        standing: Standing,
        slot: int,
        now: Callable[[], float],
    ) -> None:
        self._transport = transport
        self._doorstep = doorstep
        self._forward = (standing.gateway, slot)
        self._lock = threading.Lock()
        self.certificate = standing.certificate
        self.expires = standing.certificate_expires
        self.renew_at = self.expires - (self.expires - now()) / 2
        self.since = time.monotonic()
        self.channels = 0
        self._quiet_since = self.since

    @classmethod
    def open(
        cls,
        relay: Relay,
        slot: int,
        state: AgentState,
        doorstep: Doorstep,
        now: Callable[[], float],
        on_end: Callable[[], None],
    ) -> Link:
        """Connect, log in and ask for the forward. Raises PamError."""
        standing = state.standing
        login = CertificateKey(state.keys.identity_seed, standing.certificate)
        sock = _dial(relay)
        transport: fast_ssh.Transport | None = None
        try:
            transport = fast_ssh.connect(
                sock,
                name=f"tunnel-{relay.name}-{slot}-ssh",
                host_ca=standing.trust.relay_host_ca,
                hostname=relay.host,
                login=login,
                now=now,
            )
            transport.on_end = on_end
            link = cls(transport, doorstep, standing, slot, now)
            transport.request_port_forward(standing.gateway, slot, link._arrived)
        except BaseException as error:
            if transport is not None:
                transport.close()  # its own thread closes the socket
            if isinstance(error, paramiko.SSHException | EOFError | OSError):
                reason = str(error) or "the connection was closed"
                raise UnavailableError(f"relay {relay.name} did not take the tunnel: {reason}") from None
            raise
        return link

    @property
    def alive(self) -> bool:
        return self._transport.is_active()

    @property
    def fault(self) -> str:
        """What the relay did that made this side end the connection, or nothing."""
        return self._transport.fault

    @property
    def quiet(self) -> bool:
        """No channel for a while: the last bytes of the last one had time to leave."""
        return not self.channels and time.monotonic() - self._quiet_since > PULSE

    def cancel(self) -> None:
        """Take no new channels; the open ones live on."""
        with contextlib.suppress(PamError, paramiko.SSHException, EOFError, OSError):
            self._transport.cancel_port_forward(*self._forward)

    def close(self) -> None:
        """End the connection and all its channels at once."""
        self._transport.close()

    def _arrived(
        self, stream: fast_ssh.ChannelStream, origin: tuple[str, int], server: tuple[str, int]
    ) -> None:
        """In the transport's reader thread, so nothing here may block."""
        with self._lock:
            room = self.channels < MAX_CHANNELS and tuple(server) == self._forward
            self.channels += 1
        if room:
            self._doorstep.welcome(stream, origin[0], self._departed)
        else:
            stream.abort()
            self._departed()

    def _departed(self) -> None:
        with self._lock:
            self.channels -= 1
            self._quiet_since = time.monotonic()


class Tunnel:
    """Keeps ``slot`` at ``relay`` served until stopped, in a thread ``tunnel-<relay>-<slot>``."""

    def __init__(
        self,
        relay: Relay,
        slot: int,
        state: AgentState,
        doorstep: Doorstep,
        *,
        now: Callable[[], float],
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self.relay = relay
        self.slot = slot
        self._state = state
        self._doorstep = doorstep
        self._now = now
        self._beat = beat
        self._wake = threading.Event()
        self._stopping = False
        self._draining = False
        self._link: Link | None = None
        self._old: list[Link] = []
        self._backoff = Backoff(BACKOFF_FIRST, BACKOFF_CAP)
        self._error = ""
        self.tried = threading.Event()  #: set after the first attempt, whatever came of it
        self.drained = threading.Event()  #: set once the relay sends no new channels any more
        self.name = f"tunnel-{relay.name}-{slot}"
        self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def drain(self) -> None:
        """Take no new channels and make no new link."""
        self._draining = True
        self._wake.set()

    def stop(self) -> None:
        """Close every link; the thread ends soon."""
        self._stopping = True
        self._wake.set()

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    @property
    def up(self) -> bool:
        link = self._link
        return link is not None and link.alive

    @property
    def channels(self) -> int:
        return sum(link.channels for link in self._links())

    def status(self) -> dict[str, object]:
        link = self._link
        state = "draining" if self._draining else "up" if self.up else "down"
        return {
            "relay": self.relay.name,
            "slot": self.slot,
            "state": state,
            "channels": self.channels,
            "age": int(time.monotonic() - link.since) if link and link.alive else 0,
            "error": "" if self.up else self._error,
        }

    # -- the thread ----------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._beat()
                try:
                    wait = self._step()
                except Exception:  # a fault of ours must not leave the gateway without a way in
                    log.exception("tunnel fault", extra=kv(relay=self.relay.name, slot=self.slot))
                    self._error = "a fault of the agent"
                    wait = self._backoff.next()
                self._wake.wait(wait)
                self._wake.clear()
        finally:
            for link in self._links():
                link.close()
            self.tried.set()
            self.drained.set()

    def _step(self) -> float:
        """Look once; returns the seconds until the next look."""
        self._sweep()
        if self._draining:
            if self._link is not None:
                self._link.cancel()
                self._retire(self._link)
            self.drained.set()
            return PULSE
        link = self._link
        if link is not None and not link.alive:
            self._lost(link)
            return self._backoff.next() + scatter(SPREAD)
        if link is None or self._wants_renewal(link):
            return self._connect()
        return PULSE

    def _wants_renewal(self, link: Link) -> bool:
        """The relay ends a link with its certificate. Half-way a newer one is worth a new link, which
        leaves the old one's sessions the other half to end by themselves."""
        newer = self._state.standing.certificate_expires > link.expires
        return newer and self._now() >= link.renew_at

    def _connect(self) -> float:
        """Make a link; the one it replaces goes on until its last channel has ended."""
        try:
            new = Link.open(
                self.relay, self.slot, self._state, self._doorstep, self._now, on_end=self._wake.set
            )
        except PamError as error:
            if str(error) != self._error:
                self._log("tunnel failed", reason=str(error))
            self._error = str(error)
            return self._backoff.next()
        finally:
            self.tried.set()
        if self._link is not None:
            self._retire(self._link)
        self._link, self._error = new, ""
        self._log("tunnel up")
        return PULSE

    def _lost(self, link: Link) -> None:
        self._link, self._error = None, "the connection was lost"
        if time.monotonic() - link.since >= STABLE:
            self._backoff.reset()
        fault = {"reason": link.fault} if link.fault else {}
        self._log("tunnel lost", channels=link.channels, **fault)

    def _retire(self, link: Link) -> None:
        self._old.append(link)
        self._link = None

    def _sweep(self) -> None:
        for link in list(self._old):
            if link.quiet or not link.alive:
                link.close()
                self._old.remove(link)

    def _links(self) -> list[Link]:
        return [*([self._link] if self._link else []), *self._old]

    def _log(self, event: str, **fields: object) -> None:
        log.info(event, extra=kv(relay=self.relay.name, slot=self.slot, **fields))


def _dial(relay: Relay) -> socket.socket:
    try:
        return socket.create_connection((relay.host, relay.port), timeout=CONNECT_TIMEOUT)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error) or "no answer"
        raise UnavailableError(f"relay {relay.name} cannot be reached: {reason.lower()}") from None
