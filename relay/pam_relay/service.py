"""``pam-relay run``: the server, its poller, status, metrics and signals, from start to drained end."""

from __future__ import annotations

import time
from typing import Any

from pam_common import logging
from pam_common.daemon import Notifier, StatusSocket, passed_sockets, run_until_signal
from pam_common.errors import ConfigError
from pam_common.logging import get_logger, kv
from pam_common.platform_client import PlatformClient
from pam_relay import config as relay_config
from pam_relay.config import RelayConfig
from pam_relay.metrics import Metrics
from pam_relay.platform import BundlePoller, connect
from pam_relay.server import RelayServer
from pam_relay.state import RelayState

log = get_logger("relay.service")

#: A poll that hangs longer than all its timeouts together is a reason to be restarted.
POLL_STUCK = 300.0
#: The clock comes round twice a second and needs the lock that everything needs.
CLOCK_STUCK = 30.0
DRAIN_STEP = 0.2
#: Asked of systemd beyond drain_timeout, for what follows the drain.
STOP_MARGIN = 30.0
#: What a reload cannot change: the rest of relay.yml it takes on.
_FIXED = ("platform", "platform_ca", "state_dir", "runtime_dir", "listen", "metrics")


class Service:
    """One running relay process."""

    def __init__(self, config: RelayConfig) -> None:
        self._config = config
        self._notifier = Notifier()
        state = RelayState.load(config.state_dir)
        self._client: PlatformClient = connect(config, state.keys.identity, state.relay, state.issuer)
        self.metrics = Metrics()
        self.server = RelayServer(
            state.bundle,
            state.keys.host_seed,
            limits=config.limits,
            metrics=self.metrics,
            now=self._client.now,
        )
        self.poller = BundlePoller(self._client, state, config.poll_interval, self.server.update)
        self._status = StatusSocket(config.status_socket, self.status)

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT, then drain. Raises PamError when it cannot start."""
        stop_metrics = self.metrics.serve(self._config.metrics) if self._config.metrics else None
        self.metrics.watch(self.status)
        self._listen()
        self._status.start()
        self.poller.start()
        self._notifier.ready()
        reason = run_until_signal(
            self.reload, healthy=self._healthy, notifier=self._notifier, status=self._summary
        )
        log.info("stopping", extra=kv(reason=reason))
        self._notifier.stopping(self._config.drain_timeout + STOP_MARGIN)
        self._drain()
        self.poller.stop()
        self._status.stop()
        if stop_metrics is not None:
            stop_metrics()

    def reload(self) -> None:
        """Read relay.yml anew and fetch the bundle. Raises ConfigError, and then nothing has changed."""
        new = relay_config.load(self._config.path)
        changed = [name for name in _FIXED if getattr(new, name) != getattr(self._config, name)]
        if changed:
            raise ConfigError([f"{new.path.name}: {name}: needs a restart to change" for name in changed])
        self._config = new
        logging.setup(new.log_level)
        self.server.limits = new.limits
        self.poller.interval = new.poll_interval
        self.poller.poll_soon()
        log.info("reloaded")

    def status(self) -> dict[str, Any]:
        """What ``pam-relay status`` shows."""
        return {
            "relay": self.poller.state.relay,
            **self.server.status(),
            "platform": self.poller.problem or "ok",
        }

    def _listen(self) -> None:
        """On the configured address, or on what pam-relay.socket passes: never on another than is meant."""
        passed, name = passed_sockets(), self._config.path.name
        if self._config.listen is not None and not passed:
            self.server.listen(*self._config.listen)
        elif self._config.listen is None and passed:
            self.server.serve(passed)
        elif passed:
            raise ConfigError(
                [f"{name}: listen: an address, but systemd passes a socket"],
                hint="set `listen: systemd`, or disable pam-relay.socket.",
            )
        else:
            raise ConfigError(
                [f"{name}: listen: systemd, which passes no socket"],
                hint="systemctl enable --now pam-relay.socket",
            )

    def _drain(self) -> None:
        """Let open channels end by themselves for a while; revocations still arrive meanwhile."""
        self.server.drain()
        end = time.monotonic() + self._config.drain_timeout
        while self.server.channels and time.monotonic() < end:
            self._notifier.status(f"draining: {self.server.channels} channels")
            self._notifier.alive()
            time.sleep(DRAIN_STEP)
        self.server.close()

    def _healthy(self) -> bool:
        now = time.monotonic()
        return now - self.poller.beat < POLL_STUCK and now - self.server.beat < CLOCK_STUCK

    def _summary(self) -> str:
        status = self.server.status()
        problem = f"; platform: {self.poller.problem}" if self.poller.problem else ""
        return f"{len(status['routes'])} routes, {status['sessions']} sessions{problem}"
