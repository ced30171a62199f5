"""Metrics are for loopback only, and tell numbers."""

from __future__ import annotations

import pytest
from prometheus_client import generate_latest

from pam_relay.metrics import Metrics, parse_loopback


@pytest.mark.parametrize(
    "address",
    ["0.0.0.0:9102", "[::]:9102", "192.0.2.1:9102", "localhost:9102", "127.0.0.1", ":9102", "127.0.0.1:x"],
)
def test_other_addresses_than_loopback_are_refused(address: str) -> None:
    """Metrics endpoints open to everybody (CVE-2022-24797)."""
    with pytest.raises(ValueError, match=r".+"):
        parse_loopback(address)
    with pytest.raises(ValueError, match=r".+"):
        Metrics().serve(address)


def test_a_scrape_shows_the_relays_numbers() -> None:
    metrics = Metrics()
    metrics.watch(lambda: {"sessions": 3, "bundle_age": 12})
    metrics.count_bytes("up", 100)
    metrics.admitted("serve")
    metrics.refused_connection("transports")
    metrics.channel("opened")
    stop = metrics.serve("127.0.0.1:0")
    stop()
    text = generate_latest(metrics.registry).decode()
    for line in (
        'pam_relay_bytes_total{direction="up"} 100.0',
        'pam_relay_links_admitted_total{role="serve"} 1.0',
        'pam_relay_connections_refused_total{limit="transports"} 1.0',
        'pam_relay_channels_total{result="opened"} 1.0',
        "pam_relay_sessions_now 3.0",
        "pam_relay_bundle_age_now 12.0",
    ):
        assert line in text
