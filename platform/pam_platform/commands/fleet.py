"""``enrol-token`` and ``recordings``: what an operator does on the platform's host."""

from __future__ import annotations

import json

import click

from pam_common.errors import PamError
from pam_platform.commands.root import OPERATOR, main, start


@main.command("enrol-token")
@click.argument("kind", type=click.Choice(["agent", "relay"]))
@click.argument("name")
@click.option("--gateway", metavar="NAME", help="The gateway an agent serves.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--quiet", is_flag=True, help="Print the token alone.")
def enrol_token(kind: str, name: str, gateway: str | None, as_json: bool, quiet: bool) -> None:
    """A one-time token for an agent or relay; valid for an hour, shown once.

    \b
    Examples:
      pam-platform enrol-token agent dc1-a --gateway dc1
      pam-platform enrol-token relay r1 --quiet > r1-token
    """
    start()
    from pam_platform.fleet.enrolment import create_token

    if kind == "agent" and gateway is None:
        raise click.UsageError("an agent needs --gateway")
    token, expires = create_token(kind, name, gateway, actor=OPERATOR)
    if as_json:
        facts = {"token": token, "kind": kind, "name": name, "expires": int(expires.timestamp())}
        click.echo(json.dumps(facts))
    elif quiet:
        click.echo(token)
    else:
        click.echo(f"token for {kind} {name}, valid until {expires:%H:%M} UTC:")
        click.echo(f"  {token}")
        click.echo(f"put it into a private file and run: pam-{kind} enrol --token-file FILE --name {name}")


@main.group()
def recordings() -> None:
    """The stored recordings."""


@recordings.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per part.")
def verify(as_json: bool) -> None:
    """Check every stored recording against its agent's signature and the witnessed heads.

    Exits with 1 when one is not as it must be.

    \b
    Example:
      pam-platform recordings verify
    """
    start()
    from pam_platform.recordings.checks import verify_all

    bad = total = 0
    for part in verify_all():
        total += 1
        wrong = not part.ok and not part.in_progress
        bad += wrong
        if as_json:
            click.echo(json.dumps({**vars(part), "problems": list(part.problems), "ok": part.ok}))
        elif wrong:
            click.echo(f"{part.session} part {part.part}: {'; '.join(part.problems)}")
    if not as_json:
        click.echo(f"{total} parts, {bad} not as they must be")
    if bad:
        raise PamError(f"{bad} of {total} recording parts do not verify")
