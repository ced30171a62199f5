"""``login``, ``logout``, ``status``."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import click

from pam_client.browser import show
from pam_client.commands import App, examples, pass_app
from pam_client.home import Settings
from pam_client.oauth import Authority, DeviceCode
from pam_client.output import clean, duration, moment, say, show_fields, show_json
from pam_client.running import running
from pam_client.store import TokenStore
from pam_common.errors import PamError
from pam_common.platform_client import check_base_url


@click.command(
    epilog=examples(
        "pam-client login --platform https://pam.example.com",
        "pam-client login --no-browser        # on a machine without one: open the address elsewhere",
        "PAM_CLIENT_ID=ci PAM_CLIENT_SECRET_FILE=/run/secrets/pam pam-client ls    # programs need no login",
    )
)
@click.option("--platform", "address", metavar="URL", help="The platform's address; remembered.")
@click.option(
    "--platform-ca",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The CA that signed the platform's certificate, if it is a private one; remembered.",
)
@click.option("--no-browser", is_flag=True, help="Only show the address and the code.")
@pass_app
def login(app: App, address: str | None, platform_ca: Path | None, no_browser: bool) -> None:
    """Log in, by confirming a code in a browser.

    The tokens are kept in the system's keyring, or where there is none in a file that only you can read.
    """
    settings = _settings(app, address or app.platform, platform_ca)
    authority = Authority(settings.platform, settings.platform_ca)
    code = authority.start_device()
    _show_code(code, browser=not no_browser)
    tokens = authority.wait_for_device(code)
    store = TokenStore(app.home, settings.platform)
    with store.lock():
        place = store.save(tokens)
    if address or platform_ca:
        app.home.save_settings(settings)
    say(f"logged in to {settings.platform}; the tokens are in {'the ' * (place == 'keyring')}{place}")


def _settings(app: App, address: str | None, platform_ca: Path | None) -> Settings:
    if platform_ca is None:
        return app.home.settings(address)
    url = check_base_url(address) if address else app.home.settings().platform
    return Settings(url, platform_ca.resolve())


def _show_code(code: DeviceCode, *, browser: bool) -> None:
    say("To log in, open this address in a browser, and check that it shows this code:")
    say(f"\n  {code.complete_url}\n  code: {clean(code.user_code)}\n")
    # Whoever else reads the address in an argument list still has no login to confirm it with.
    if browser:
        show(code.complete_url)
    say("Waiting for your confirmation …")


@click.command(epilog=examples("pam-client logout"))
@pass_app
def logout(app: App) -> None:
    """Revoke the tokens at the platform and forget them here."""
    settings = app.home.settings(app.platform)
    store = TokenStore(app.home, settings.platform)
    with store.lock():
        tokens = store.load()
        store.remove()
    if tokens is None:
        say(f"not logged in to {settings.platform}")
        return
    authority = Authority(settings.platform, settings.platform_ca)
    try:
        for token, kind in ((tokens.refresh, "refresh_token"), (tokens.access, "access_token")):
            if token:
                authority.revoke(token, kind)
    except PamError as error:
        raise PamError(
            f"forgotten here, but not revoked at the platform: {error}",
            hint="the tokens expire by themselves; an administrator can end them at once.",
        ) from None
    say(f"logged out of {settings.platform}")


@click.command(epilog=examples("pam-client status", "pam-client status --json | jq .connects"))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@pass_app
def status(app: App, as_json: bool) -> None:
    """Who you are, at which platform, what is connected now, and where things are kept.

    Exits with 1 when not logged in, and with 69 when the platform cannot be reached.
    """
    facts: dict[str, Any] = {"home": str(app.home.folder), "config": str(app.home.config_file)}
    facts["connects"] = running(app.home)
    problem: PamError | None = None
    try:
        facts |= _who(app)
    except PamError as error:
        problem = error
    if as_json:
        show_json(facts | {"error": str(problem) if problem else None})
    else:
        _show_status(facts)
    if problem is not None:
        raise problem


def _who(app: App) -> dict[str, Any]:
    settings = app.home.settings(app.platform)
    facts: dict[str, Any] = {"platform": settings.platform}
    api = app.api()
    me = api.me()
    facts |= {"user": me.get("name"), "roles": me.get("roles", [])}
    if program := os.environ.get("PAM_CLIENT_ID"):
        return facts | {"client": program}
    tokens = TokenStore(app.home, settings.platform).load()
    if tokens is not None:
        facts |= {"token_expires": int(tokens.expires), "renewable": bool(tokens.refresh)}
    return facts


def _show_status(facts: dict[str, Any]) -> None:
    expires = facts.get("token_expires")
    left = f"in {duration(expires - time.time())}" if expires else None
    if left and facts.get("renewable"):
        left += ", renewed by itself"
    roles = ", ".join(map(str, facts.get("roles", [])))
    show_fields(
        [
            ("platform", facts.get("platform")),
            ("user", facts.get("user")),
            ("roles", roles),
            ("client", facts.get("client")),
            ("token ends", left),
            ("config", facts["config"]),
            ("state", facts["home"]),
        ]
    )
    for note in facts["connects"]:
        where = f"{note.get('host')}:{note.get('port')}" if note.get("port") else note.get("host")
        line = f"connected: {note.get('account')} at {where} until {moment(note.get('session_end'))}"
        click.echo(clean(f"{line} ({note.get('session')}, pid {note.get('pid')})"))
