"""``resource``: the host keys of SSH servers, and the CA that signs logins to them."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING

import click

from pam_common.errors import PamError, UnavailableError
from pam_platform.commands.root import OPERATOR, main, start

if TYPE_CHECKING:
    from pam_platform.access.models import HostKeyScan, Resource

#: Five key exchanges with a slow server, and the agent's poll.
SCAN_TIMEOUT = 90
#: How often the answer is looked for.
_PAUSE = 0.2


@main.group()
def resource() -> None:
    """The targets; access.yml declares them."""


@resource.command()
@click.argument("name")
@click.option("--agent", "agent_name", metavar="NAME", help="Ask this agent; else any of the gateway.")
@click.option(
    "--accept",
    "accepted",
    metavar="SHA256:…",
    multiple=True,
    help="Pin the key with this fingerprint, which you have from the server itself; may be repeated.",
)
@click.option(
    "--wait",
    type=click.IntRange(0, SCAN_TIMEOUT),
    default=SCAN_TIMEOUT,
    show_default=True,
    help="Seconds to wait for the agent.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, and ask nothing.")
def scan(name: str, agent_name: str | None, accepted: tuple[str, ...], wait: int, as_json: bool) -> None:
    """Read the host keys of an SSH server, and pin those you accept.

    An agent of its gateway connects to it and reports the keys that it shows. Compare their fingerprints
    with those on the server itself (ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub): whoever answers in its
    place shows other ones. Nobody gets in before keys are pinned, here or in access.yml.

    \b
    Examples:
      pam-platform resource scan web-01
      pam-platform resource scan web-01 \\
        --accept SHA256:+DiY3wvvV6TuJJhbpZisF/zLDA0zPMSvHdkr4UvCOqU
    """
    start()
    from pam_platform.access import scanning

    row = _find(name)
    asked = scanning.begin(row, OPERATOR, agent_name)
    if wait:
        _await(asked, wait)
    if asked.error:
        raise PamError(f"agent {asked.agent.name}: {asked.error}")
    if as_json:
        _print_json(asked, row)
    else:
        _show(asked, row)
    if not wait:
        return
    chosen = accepted or _ask(asked, as_json)
    if chosen:
        pinned = scanning.accept(asked, chosen, OPERATOR)
        if not as_json:
            click.echo(f"{len(pinned)} host key{'' if len(pinned) == 1 else 's'} of {name} pinned")


@resource.command("user-ca")
@click.argument("gateway")
def user_ca(gateway: str) -> None:
    """Print the CA that signs logins to a gateway's SSH servers, for their TrustedUserCAKeys.

    Every published key is printed: the current one, and those before and after it.

    \b
    Example:
      pam-platform resource user-ca dc1 > pam_user_ca.pub
    """
    start()
    from pam_common.keys import KEY_SIZE, b64decode
    from pam_platform.access.hostkeys import line_of
    from pam_platform.vault import keys

    entries = keys.public_entries(keys.target_user_ca(gateway))
    if not entries:
        raise PamError(f"there is no gateway {gateway}")
    for entry in entries:
        click.echo(f"{line_of(b64decode(entry['key'], KEY_SIZE))} pam {gateway} {entry['kid']}")


def _find(name: str) -> Resource:
    from pam_platform.access.models import Resource

    row = Resource.objects.select_related("gateway").filter(name=name).first()
    if row is None:
        raise PamError(f"there is no resource {name}")
    return row


def _await(asked: HostKeyScan, seconds: int) -> None:
    end = time.monotonic() + seconds
    while asked.answered is None:
        if time.monotonic() > end:
            raise UnavailableError(
                f"agent {asked.agent.name} has not answered", hint="its log says more; it may need an update."
            )
        time.sleep(_PAUSE)
        asked.refresh_from_db()


def _show(asked: HostKeyScan, row: Resource) -> None:
    from pam_platform.access.hostkeys import fingerprint

    click.echo(f"{row.name} ({asked.host}:{asked.port}), as agent {asked.agent.name} sees it:")
    for line in asked.keys:
        known = "  pinned already" if line in row.scanned_keys else ""
        click.echo(f"  {line.split()[0]:<20} {fingerprint(line)}{known}")
    for line in row.scanned_keys:
        if line not in asked.keys:
            click.secho(f"  {line.split()[0]:<20} {fingerprint(line)}  pinned, but NOT SHOWN", fg="red")


def _print_json(asked: HostKeyScan, row: Resource) -> None:
    from pam_platform.access.hostkeys import fingerprint

    keys = [
        {"key": line, "fingerprint": fingerprint(line), "pinned": line in row.scanned_keys}
        for line in asked.keys
    ]
    click.echo(json.dumps({"scan": asked.pk, "agent": asked.agent.name, "keys": keys}))


def _ask(asked: HostKeyScan, as_json: bool) -> list[str]:
    from pam_platform.access.hostkeys import fingerprint

    if as_json or not sys.stdin.isatty():
        if not as_json:
            click.echo("nothing is pinned; run it again with --accept SHA256:… for each key that is right")
        return []
    click.echo("compare with the server itself: ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub")
    if not click.confirm("are these its keys?", default=False):
        return []
    return [fingerprint(line) for line in asked.keys]
