"""``status``: does the server answer, and what is connected to it."""

from __future__ import annotations

import http.client
import json
import ssl
from typing import Any

import click

from pam_common.errors import UnavailableError
from pam_platform.commands.root import main, start
from pam_platform.config import PlatformConfig

#: A server that takes longer to say that it is well is not.
TIMEOUT = 5.0


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(as_json: bool) -> None:
    """Whether the server answers, and how many agents, relays and sessions there are.

    Exits with 69 when it does not answer, so that a deployment can wait for it.

    \b
    Example:
      pam-platform status
    """
    settings = start()
    found = _counts()
    try:
        _ask(settings)
        found = {"server": "up", **found}
    except (OSError, http.client.HTTPException) as error:
        found = {"server": f"does not answer: {error or type(error).__name__}", **found}
    if as_json:
        click.echo(json.dumps(found))
    else:
        for name, value in found.items():
            click.echo(f"{name:<18} {value}")
    if found["server"] != "up":
        raise UnavailableError(
            f"nothing healthy answers on {settings.listen_host}:{settings.listen_port}",
            hint="is pam-platform serve running?",
        )


def _ask(settings: PlatformConfig) -> None:
    """Raise OSError or HTTPException unless the server on the configured address is healthy."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.listen_host, settings.listen_host)  # noqa: S104
    connection = http.client.HTTPConnection(host, settings.listen_port, timeout=TIMEOUT)
    try:
        connection.connect()
        if settings.tls is not None:
            connection.sock = _tls(settings).wrap_socket(connection.sock, server_hostname=settings.host)
        connection.request("GET", "/api/v1/health", headers={"Host": settings.host})
        answer = connection.getresponse()
        if answer.status != http.client.OK:
            raise http.client.HTTPException(f"HTTP {answer.status}")
    finally:
        connection.close()


def _tls(settings: PlatformConfig) -> ssl.SSLContext:
    """Trust exactly the certificate that the configuration names, whoever signed it."""
    assert settings.tls is not None
    context = ssl.create_default_context(cafile=str(settings.tls.cert))
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def _counts() -> dict[str, Any]:
    from datetime import timedelta

    from django.utils import timezone

    from pam_platform.access.ending import running
    from pam_platform.fleet.models import Agent, Relay

    recently = timezone.now() - timedelta(minutes=2)
    agents = Agent.objects.filter(state=Agent.State.ACTIVE)
    relays = Relay.objects.filter(state=Relay.State.ACTIVE)
    return {
        "agents": agents.count(),
        "agents_connected": agents.filter(last_seen__gt=recently).count(),
        "relays": relays.count(),
        "relays_connected": relays.filter(last_seen__gt=recently).count(),
        "sessions": running().count(),
    }
