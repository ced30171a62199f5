"""The running agent: every part put together, started, reloaded, reported on and stopped.

inbox ────── kill, end ─────▶ registry ◀── doorstep ◀── tunnels (one per relay and slot)
clock ────── 4 times a second ─▶  │ ▲ opener ── platform
renewal ──── standing ─▶ tunnels  └─▶ recorder ─▶ spool ─▶ uploader ─▶ platform
"""

from __future__ import annotations

import threading
import time
from typing import Any

from pam_agent import api, config, session
from pam_agent.config import AgentConfig
from pam_agent.doorstep import Doorstep
from pam_agent.inbox import Inbox, Message
from pam_agent.liveness import Liveness
from pam_agent.opening import SessionOpener
from pam_agent.protocols import PROTOCOLS
from pam_agent.recorder import Recorder
from pam_agent.registry import SessionRegistry
from pam_agent.renewal import Renewal
from pam_agent.reports import Reports
from pam_agent.scan import Scans
from pam_agent.spool import Spool
from pam_agent.state import AgentState
from pam_agent.tunnels import Tunnels
from pam_agent.uploader import Uploader
from pam_common import logging
from pam_common.daemon import Notifier, StatusSocket
from pam_common.errors import ConfigError
from pam_common.logging import kv

log = logging.get_logger("agent")

#: How long each loop may take for one round before the watchdog counts it as stuck: a poll with its
#: trickling answer, a renewal's wait, a second's tick.
INBOX_LIMIT, RENEWAL_LIMIT, CLOCK_LIMIT = 200.0, 200.0, 30.0
#: After the drain: sessions that are cut need their last words and their recording's end.
CUT_TIMEOUT = 15.0
#: When revoked: as long may the sessions tell their clients, before the tunnels are cut.
LAST_WORDS = 1.0
#: How often the limits are looked at: with this, an end by the clock is as quick as a kill.
TICK = 0.25
#: Reports and uploads when stopping; what does not make it is taken up at the next start.
FLUSH_TIMEOUT = 5.0
#: Asked of systemd beyond drain_timeout: the cut, the recordings' ends and the flush, with room to spare.
STOP_MARGIN = 60.0
#: READY is said after the first tunnel attempt, or this: a relay that is down must not fail the start.
READY_TIMEOUT = 20.0


class Gateway:
    """One agent process. ``start``, then ``reload`` any number of times, then ``stop``."""

    def __init__(self, settings: AgentConfig) -> None:
        self.config = settings
        self.state = AgentState.load(settings.state_dir)
        standing = self.state.standing
        client = api.connect(
            settings.platform,
            settings.platform_ca,
            self.state.keys.identity,
            standing.agent,
            standing.issuer,
        )
        self.api = api.AgentApi(client)
        self.liveness = Liveness()
        self.reports = Reports(self.api)
        self.spool = Spool(settings.state_dir / "spool", max_bytes=settings.max_spool)
        self.uploader = Uploader(self.spool, client)
        self.recorder = Recorder(
            self.spool, self.state.keys.identity, standing.agent, client, on_ready=self.uploader.wake
        )
        opener = SessionOpener(
            self.api,
            self.state,
            self.recorder,
            PROTOCOLS,
            recipients=lambda: self.config.recipients,
            report=self.reports.add,
        )
        self.registry = SessionRegistry(
            protocols=PROTOCOLS,
            limits=settings.limits,
            rules=lambda: self.config.allow_targets,
            opener=opener,
            report=self.reports.add,
            alarm=self.reports.alarm,
            platform_now=self.api.now,
        )
        self.doorstep = Doorstep(self.state, self.registry, self.api.now)
        self.tunnels = Tunnels(self.state, self.doorstep, self.liveness, self.api.now)
        self.scans = Scans(self.api, lambda: self.config.allow_targets)
        self.inbox = Inbox(
            self.api,
            deliver=self._deliver,
            heard=self._heard,
            revoked=self._revoked,
            back=self.uploader.platform_is_back,
            beat=self.liveness.beat("inbox", INBOX_LIMIT),
        )
        self.renewal = Renewal(
            self.api,
            self.state,
            renewed=self._sync_tunnels,
            beat=self.liveness.beat("renewal", RENEWAL_LIMIT),
        )
        self.started = time.monotonic()
        self._is_revoked = False
        self._stopping = threading.Event()
        self._clock = threading.Thread(target=self._tick, name="clock", daemon=True)
        self._status_socket = StatusSocket(settings.status_socket, self.status)

    # -- life ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start every loop. Raises PamError when the spool or the status socket cannot be used."""
        standing = self.state.standing
        log.info("agent starting", extra=kv(agent=standing.agent, gateway=standing.gateway))
        self._status_socket.start()
        self.recorder.start()
        self.uploader.start()
        self.reports.start()
        self.inbox.start()
        self.renewal.start()
        self._clock.start()
        self._sync_tunnels()

    def announce(self, notifier: Notifier) -> None:
        """Say READY after the first attempt to connect, in a thread of its own."""

        def wait() -> None:
            self.tunnels.wait_tried(READY_TIMEOUT)
            notifier.ready()

        threading.Thread(target=wait, name="ready", daemon=True).start()

    @property
    def stop_seconds(self) -> float:
        """How long ``stop`` may take."""
        return self.config.drain_timeout + STOP_MARGIN

    def reload(self) -> None:
        """Read the configuration anew. Raises ConfigError, and then nothing has changed."""
        new = config.load(self.config.path)
        fixed = ("platform", "platform_ca", "state_dir", "runtime_dir", "max_spool", "limits")
        changed = [name for name in fixed if getattr(new, name) != getattr(self.config, name)]
        if changed:
            raise ConfigError([f"{new.path.name}: {name}: needs a restart to change" for name in changed])
        self.config = new
        logging.setup(new.log_level)
        self._sync_tunnels()
        self.renewal.soon()
        log.info("reloaded")

    def stop(self) -> None:
        """Drain: no new session, time for the open ones, then cut, finalise, upload what is possible."""
        log.info("draining", extra=kv(sessions=len(self.registry), timeout=self.config.drain_timeout))
        self._stopping.set()
        until = time.monotonic() + self.config.drain_timeout
        # Who was sent here before the relays knew is let in still: nobody is refused for an upgrade.
        self.tunnels.drain(until - time.monotonic())
        self.doorstep.wait_empty(until - time.monotonic())
        self.registry.close(session.STOPPING)
        if not self.registry.wait_empty(until - time.monotonic()):
            self.registry.end_all(session.STOPPING)
            self.registry.wait_empty(CUT_TIMEOUT)
        self.tunnels.stop()
        self.recorder.stop()
        flush_until = time.monotonic() + FLUSH_TIMEOUT
        self.reports.stop(FLUSH_TIMEOUT)
        self.uploader.wait_until_empty(max(0.0, flush_until - time.monotonic()))
        self.uploader.stop()
        self.inbox.stop()
        self.renewal.stop()
        self.spool.close()
        self._status_socket.stop()
        log.info("agent stopped")

    # -- what the loops call -------------------------------------------------------------------------

    def _deliver(self, message: Message) -> None:
        if message.kind == "kill":
            log.info("kill received", extra=kv(session=message.session))
            self.registry.end(message.session, session.killed(message.reason))
        elif message.kind == "end":
            self.registry.end(message.session, session.ENDED)
        elif message.kind == "scan":
            self.scans.start(message)
        else:
            self.renewal.soon()

    def _heard(self) -> None:
        if self._is_revoked:
            log.warning("agent accepted again")
            self._is_revoked = False
            self._sync_tunnels()
            self.renewal.soon()

    def _revoked(self) -> None:
        if not self._is_revoked:
            log.error("agent revoked: the platform no longer accepts it")
        self._is_revoked = True
        self.registry.end_all(session.REVOKED)
        self.registry.wait_empty(LAST_WORDS)
        self.tunnels.set((), 0)

    def _sync_tunnels(self) -> None:
        if not self._is_revoked and not self._stopping.is_set():
            self.tunnels.set(self.state.standing.relays, self.config.tunnels_per_relay)

    def _tick(self) -> None:
        beat = self.liveness.beat("clock", CLOCK_LIMIT)
        while True:
            beat()
            try:
                self.registry.tick(silent=self.inbox.silent(), grace=self.config.grace)
                self.tunnels.sweep()
            except Exception:  # it enforces every limit: it goes on, and a fault is seen in the log
                log.exception("clock failed")
            time.sleep(TICK)

    # -- what it tells -------------------------------------------------------------------------------

    def healthy(self) -> bool:
        """Whether every loop goes round (the watchdog's question; an outage elsewhere is not one)."""
        return not self.liveness.stuck()

    def summary(self) -> str:
        """One line for systemd's STATUS."""
        up, total = self.tunnels.counts()
        text = f"{up}/{total} tunnels, {len(self.registry)} sessions"
        if self._is_revoked:
            return "REVOKED: the platform no longer accepts this agent"
        if self._stopping.is_set():
            return f"draining: {text}"
        return f"{text}; {self.inbox.trouble}" if self.inbox.trouble else text

    def status(self) -> dict[str, Any]:
        """The answer of ``pam-agent status``."""
        standing, now = self.state.standing, self.api.now()
        up, total = self.tunnels.counts()
        state = "revoked" if self._is_revoked else "draining" if self._stopping.is_set() else "running"
        return {
            "agent": standing.agent,
            "gateway": standing.gateway,
            "state": state,
            "ok": state == "running" and up > 0 and not self.inbox.trouble and self.healthy(),
            "summary": self.summary(),
            "uptime": int(time.monotonic() - self.started),
            "stuck": self.liveness.stuck(),
            "tunnels_up": up,
            "tunnels_total": total,
            "tunnels": self.tunnels.status(),
            "sessions": self.registry.status(),
            "reports_waiting": self.reports.waiting,
            "recorder": self.recorder.status(),
            "uploader": self.uploader.status(),
            "certificate_left": int(standing.certificate_expires - now),
            "statement_left": int(standing.statement_expires - now),
            "trust_left": int(standing.trust.expires - now),
            "renewal_trouble": self.renewal.trouble,
            "platform": {"silent": int(self.inbox.silent()), "trouble": self.inbox.trouble},
        }
