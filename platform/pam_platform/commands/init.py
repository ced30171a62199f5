"""``init``: everything an empty folder needs to become a platform; safe to repeat, also after an upgrade."""

from __future__ import annotations

from pathlib import Path

import click

from pam_common.errors import PamError
from pam_common.files import make_private_dir, read_private
from pam_platform import keyfiles
from pam_platform.commands.root import OPERATOR, main, refuse_newer_tables, start
from pam_platform.config import PlatformConfig, from_environment


@main.command()
@click.option("--admin", metavar="NAME", help="Create this user with the admin role, if it is missing.")
@click.option(
    "--password-file",
    type=click.Path(path_type=Path),
    help="The admin's password, in a file that only you may read.",
)
def init(admin: str | None, password_file: Path | None) -> None:
    """Create state folder, database, vault key and platform keys; or bring them up to date.

    \b
    Examples:
      pam-platform --config platform.yml init
      pam-platform --config platform.yml init \\
        --admin root --password-file root-password
    """
    settings = from_environment()
    assert settings is not None
    password = _password(admin, password_file)
    _make_files(settings)
    start(initialised=False)
    from pam_platform.vault import master

    with master.locked():
        _migrate(settings)
        _make_vault()
        _make_keys()
        if admin is not None:
            _make_admin(admin, password)
    _print_next_steps(settings, admin)


def _password(admin: str | None, path: Path | None) -> str:
    if (admin is None) != (path is None):
        raise click.UsageError("--admin and --password-file belong together")
    if path is None:
        return ""
    try:
        password = read_private(path).decode().rstrip("\r\n")
    except FileNotFoundError:
        raise PamError(f"{path} does not exist") from None
    if not password:
        raise PamError(f"{path} is empty")
    return password


def _make_files(settings: PlatformConfig) -> None:
    for folder in (settings.state_dir, settings.keys_dir, settings.recordings):
        make_private_dir(folder)
    keyfiles.ensure(settings)


def _migrate(settings: PlatformConfig) -> None:
    from django.core.management import call_command
    from django.db import OperationalError, connection
    from django.db.migrations.loader import MigrationLoader

    try:
        refuse_newer_tables(MigrationLoader(connection))
        call_command("migrate", verbosity=0, interactive=False)
        call_command("createcachetable", verbosity=0)
    except OperationalError as error:
        raise PamError(f"the database does not answer: {str(error).strip()}") from None


def _make_vault() -> None:
    from pam_platform.vault import master, store
    from pam_platform.vault.models import VaultEntry

    where = master.source()
    if where.ours and not where.path.exists():
        if VaultEntry.objects.exists():
            # A new key would open nothing of what is there, and hide that the old one is lost.
            raise PamError(
                f"{where.path}: the vault's master key is missing", hint="restore it from your back-up."
            )
        make_private_dir(where.path.parent)
        master.write(where, [master.generate()])
    store.check()


def _make_keys() -> None:
    from django.db import transaction

    from pam_platform.accounts.oauth import ensure_clients
    from pam_platform.vault import keys

    with transaction.atomic():
        for purpose in keys.PURPOSES:
            keys.ensure(purpose)
        ensure_clients()


def _make_admin(name: str, password: str) -> None:
    from django.core.exceptions import ValidationError

    from pam_platform import audit
    from pam_platform.accounts.models import User

    if User.objects.filter(username=name).exists():
        click.echo(f"user {name} exists already and is left as it is")
        return
    try:
        User.objects.create_user(name, password, is_admin=True)
    except ValidationError as error:
        raise PamError(f'"{name}": {"; ".join(error.messages)}') from None
    audit.record(OPERATOR, "user.add", name, "ok", roles=["admin"])


def _print_next_steps(settings: PlatformConfig, admin: str | None) -> None:
    from pam_platform.vault import master

    click.echo(f"platform ready in {settings.state_dir}, to be reached at {settings.public_url}")
    click.echo(f"back up {master.source().path}: without it no credential and no recording can be opened")
    click.echo("next:")
    if admin is None:
        click.echo("  pam-platform init --admin NAME --password-file FILE   a first administrator")
    click.echo("  pam-platform apply -f access.yml                      who may reach what")
    click.echo("  pam-platform serve")
    click.echo("  pam-platform enrol-token agent NAME --gateway GATEWAY  for each agent, likewise each relay")
