"""``agent``, ``relay``, ``gateway``, ``session``, ``user``: shutting out, at once, on the platform's host.

The same code as the API's, so the same happens, in the name of the operator.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import click

from pam_common.errors import PamError
from pam_platform.commands.root import OPERATOR, main, start

if TYPE_CHECKING:
    from django.db.models import Model, QuerySet

    Row = TypeVar("Row", bound=Model)


@main.group()
def agent() -> None:
    """The enrolled agents."""


@agent.command("ls")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_agents(as_json: bool) -> None:
    """Every agent, revoked ones too: gateway, state, when it was last heard.

    \b
    Example:
      pam-platform agent ls
    """
    start()
    from pam_platform.fleet.models import Agent

    rows = [
        {
            "name": row.name,
            "gateway": row.gateway_name,
            "state": row.state,
            "last_seen": f"{row.last_seen:%FT%TZ}",
        }
        for row in Agent.objects.all()
    ]
    _show("agents", rows, as_json)


@agent.command("revoke")
@click.argument("name")
def revoke_agent(name: str) -> None:
    """Refuse an agent from now on; its sessions end at once.

    \b
    Example:
      pam-platform agent revoke dc1-a
    """
    start()
    from pam_platform.access import ending
    from pam_platform.fleet.models import Agent

    cut = ending.revoke_agent(_find(Agent.objects.filter(name=name), f"agent {name}"), OPERATOR)
    click.echo(f"agent {name} is revoked; {_ended(cut)}")


@main.group()
def relay() -> None:
    """The relays."""


@relay.command("ls")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_relays(as_json: bool) -> None:
    """Every relay: address, state, when it was last heard.

    \b
    Example:
      pam-platform relay ls
    """
    start()
    from pam_platform.fleet.models import Relay

    rows = [
        {
            "name": row.name,
            "address": f"{row.host}:{row.port}",
            "state": row.state,
            "last_seen": f"{row.last_seen:%FT%TZ}" if row.last_seen else None,
        }
        for row in Relay.objects.all()
    ]
    _show("relays", rows, as_json)


@relay.command("revoke")
@click.argument("name")
def revoke_relay(name: str) -> None:
    """Refuse a relay from now on; clients and agents are no longer sent to it.

    \b
    Example:
      pam-platform relay revoke r1
    """
    start()
    from pam_platform.access import ending
    from pam_platform.fleet.models import Relay

    ending.revoke_relay(_find(Relay.objects.filter(name=name), f"relay {name}"), OPERATOR)
    click.echo(f"relay {name} is revoked")


@main.group()
def gateway() -> None:
    """The gateways; access.yml declares them."""


@gateway.command("delete")
@click.argument("name")
def delete_gateway(name: str) -> None:
    """Delete a gateway with its resources and their credentials, revoke its agents, end its sessions.

    Take it out of access.yml too, or the next apply declares it again.

    \b
    Example:
      pam-platform gateway delete dc1
    """
    start()
    from pam_platform.access import ending
    from pam_platform.fleet.models import Gateway

    cut = ending.delete_gateway(_find(Gateway.objects.filter(name=name), f"gateway {name}"), OPERATOR)
    click.echo(f"gateway {name} is deleted; {_ended(cut)}")


@main.group()
def session() -> None:
    """The running sessions; pam-client sessions ls lists them."""


@session.command("kill")
@click.argument("session_id", metavar="SESSION")
@click.option("--reason", default="", help="Told to the user, and kept.")
def kill_session(session_id: str, reason: str) -> None:
    """End a session at once.

    \b
    Example:
      pam-platform session kill s-aaaaaaaaaaaaaaaaaaaaaaaaaa --reason upgrade
    """
    start()
    from pam_platform.access import ending
    from pam_platform.access.models import Session

    if not reason.isprintable() or len(reason) > ending.MAX_REASON:
        raise PamError(f"a reason is one printable line of at most {ending.MAX_REASON} characters")
    ending.kill(_find(Session.objects.filter(pk=session_id), f"session {session_id}"), OPERATOR, reason)
    click.echo(f"session {session_id} is ended")


@main.group()
def user() -> None:
    """Disable and enable users at once; everything else about them is in access.yml."""


@user.command()
@click.argument("name")
def disable(name: str) -> None:
    """End a user's logins and sessions and let in no new ones.

    \b
    Example:
      pam-platform user disable alice
    """
    start()
    from pam_platform.access import ending
    from pam_platform.accounts.models import User

    cut = ending.disable_user(_find(User.objects.filter(username=name), f"user {name}"), OPERATOR)
    click.echo(f"user {name} is disabled; {_ended(cut)}")


@user.command()
@click.argument("name")
def enable(name: str) -> None:
    """Let a disabled user log in again.

    \b
    Example:
      pam-platform user enable alice
    """
    start()
    from pam_platform.access import ending
    from pam_platform.accounts.models import User

    ending.enable_user(_find(User.objects.filter(username=name), f"user {name}"), OPERATOR)
    click.echo(f"user {name} is enabled")


def _find(rows: QuerySet[Row], what: str) -> Row:
    row = rows.first()
    if row is None:
        raise PamError(f"there is no {what}")
    return row


def _ended(count: int) -> str:
    return "1 session was ended" if count == 1 else f"{count} sessions were ended"


def _show(title: str, rows: Sequence[Mapping[str, str | None]], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({title: rows}))
        return
    lines = [[value or "-" for value in row.values()] for row in rows]
    # As wide as what is in them: four of a fixed width would wrap at 80 columns.
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        click.echo("  ".join(map(str.ljust, line, widths)).rstrip())
