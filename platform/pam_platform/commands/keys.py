"""``keys`` and ``vault``: the platform's own keys, and the key above all secrets."""

from __future__ import annotations

import json

import click

from pam_platform import keyfiles
from pam_platform.commands.root import OPERATOR, main, start


@main.group("keys")
def keys_group() -> None:
    """The platform's signing and recording keys."""


@keys_group.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_keys(as_json: bool) -> None:
    """Every key: purpose, id, state.

    \b
    Example:
      pam-platform keys list
    """
    start()
    from django.utils import timezone

    from pam_platform.vault.keys import is_published
    from pam_platform.vault.models import PlatformKey

    now = timezone.now()
    rows = [
        {
            "purpose": row.purpose,
            "kid": row.kid,
            "key": row.public,
            "state": row.state,
            "created": int(row.created.timestamp()),
            "trusted": is_published(row, now),
        }
        for row in PlatformKey.objects.all()
    ]
    if as_json:
        click.echo(json.dumps({"keys": rows}))
        return
    for row in rows:
        trusted = "trusted" if row["trusted"] else "no longer trusted"
        click.echo(f"{row['purpose']:<24} {row['kid']}  {row['state']:<8} {trusted}")


@keys_group.command()
@click.argument("purpose")
@click.option("--now", "at_once", is_flag=True, help="Do not wait until everyone knows the next key.")
def rotate(purpose: str, at_once: bool) -> None:
    """One step of a rotation: publish a next key; later, run again, let it sign.

    A next key may sign eight days after it was published, when every agent and relay has renewed its trust
    and every session that began before is over.
    What the old key signed stays valid for its time. The purposes secret-key (cookies, second factors) and
    oidc (ID tokens) are files that are replaced at once.

    \b
    Examples:
      pam-platform keys rotate grant  # publishes a next key
      pam-platform keys rotate grant  # eight days later: it signs from now on
    """
    settings = start()
    from pam_platform import audit
    from pam_platform.fleet import inbox
    from pam_platform.vault import keys

    if purpose in (keyfiles.SECRET_KEY, keyfiles.OIDC):
        keyfiles.rotate(settings, purpose)
        audit.record(OPERATOR, "keys.rotate", purpose, "ok")
        click.echo("replaced; restart the server, which then uses the new key")
        return
    row = keys.rotate(purpose, at_once=at_once)
    inbox.post_reload()
    audit.record(OPERATOR, "keys.rotate", purpose, "ok", kid=row.kid, state=row.state)
    if row.state == "next":
        ready = row.created + keys.PUBLICATION
        click.echo(f"key {row.kid} is published; run this again after {ready:%Y-%m-%d %H:%M} UTC to use it")
    else:
        click.echo(f"key {row.kid} signs from now on")


@keys_group.command()
@click.argument("kid")
def distrust(kid: str) -> None:
    """Let nobody believe a retired key any longer, since it has leaked.

    Agents learn it at once, relays at their next poll. Sessions whose grants it signed take no new
    connections. What a recording key has sealed can still be read.

    \b
    Example:
      pam-platform keys distrust 0123456789abcdef
    """
    start()
    from pam_platform import audit
    from pam_platform.fleet import inbox
    from pam_platform.vault import keys

    row = keys.distrust(kid)
    inbox.post_reload()
    audit.record(OPERATOR, "keys.distrust", row.purpose, "ok", kid=kid)
    click.echo(f"{row.purpose} key {kid} is no longer trusted")


@main.group()
def vault() -> None:
    """The sealed credentials."""


@vault.command()
def rekey() -> None:
    """Put every secret under a new master key.

    The server may run meanwhile. Afterwards back up the key file; the old key opens nothing any more.

    \b
    Example:
      pam-platform vault rekey
    """
    start()
    from pam_platform import audit
    from pam_platform.vault import master, store

    kid, moved = store.rekey()
    audit.record(OPERATOR, "vault.rekey", kid, "ok", entries=moved)
    click.echo(f"{moved} secrets are under master key {kid}")
    click.echo(f"back up {master.source().path}")
