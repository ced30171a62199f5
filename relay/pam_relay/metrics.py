"""Counters for Prometheus, served on loopback only: what a relay carries is nobody else's business.

A scraper on another host comes through a local agent or its own tunnel.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from pam_common.errors import PamError


class Metrics:
    """The relay's counters. Names, values and labels are few and fixed: none is a peer's choice."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._bytes = self._counter("bytes", "Bytes carried by splices", "direction")
        self._up = self._bytes.labels(direction="up")
        self._down = self._bytes.labels(direction="down")
        self._admitted = self._counter("links_admitted", "Connections that logged in", "role")
        self._refused = self._counter("connections_refused", "Connections over a limit", "limit")
        self._channels = self._counter("channels", "Channels wanted by clients", "result")

    def _counter(self, name: str, text: str, label: str) -> Counter:
        return Counter(f"pam_relay_{name}", text, [label], registry=self.registry)

    def count_bytes(self, direction: str, size: int) -> None:
        (self._up if direction == "up" else self._down).inc(size)

    def admitted(self, role: str) -> None:
        self._admitted.labels(role=role).inc()

    def refused_connection(self, limit: str) -> None:
        self._refused.labels(limit=limit).inc()

    def channel(self, result: str) -> None:
        self._channels.labels(result=result).inc()

    def watch(self, status: Callable[[], dict[str, Any]]) -> None:
        """Show the numbers of ``status`` as gauges, asked for at each scrape."""
        for name in (
            "sessions",
            "channels",
            "transports",
            "unauthenticated",
            "bundle_age",
            "bundle_serial",
            "host_certificate_expires",
        ):
            gauge = Gauge(
                f"pam_relay_{name}_now", f"{name.replace('_', ' ')} at present", registry=self.registry
            )
            gauge.set_function(_reader(status, name))

    def serve(self, address: str) -> Callable[[], None]:
        """Answer scrapes on ``address`` (``127.0.0.1:9102``); returns what stops it. Raises PamError."""
        host, port = parse_loopback(address)
        try:
            server, thread = start_http_server(port, addr=host, registry=self.registry)
        except OSError as error:
            raise PamError(f"metrics cannot listen on {address}: {error.strerror or error}") from None

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join(5)

        return stop


def parse_loopback(address: str) -> tuple[str, int]:
    """Host and port of ``127.0.0.1:9102`` or ``[::1]:9102``; ValueError for all that is not loopback."""
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not port.isdigit() or not 0 <= int(port) <= 65535:
        raise ValueError(f'expected an address such as 127.0.0.1:9102, got "{address}"')
    if not ipaddress.ip_address(host).is_loopback:
        raise ValueError(f"metrics are for loopback only, {host} is not")
    return host, int(port)


def _reader(status: Callable[[], dict[str, Any]], name: str) -> Callable[[], float]:
    return lambda: float(status().get(name, 0))
