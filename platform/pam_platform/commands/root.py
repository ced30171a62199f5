"""The ``pam-platform`` group, and how a command gets Django."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click
import django

from pam_common import logging
from pam_common.errors import PamError
from pam_platform import config

if TYPE_CHECKING:
    from django.db.migrations.loader import MigrationLoader

#: Who acts in the audit trail when somebody uses the command line on the platform's host.
OPERATOR = "operator"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    envvar=config.CONFIG_VARIABLE,
    default=config.DEFAULT_CONFIG,
    show_default=True,
    show_envvar=True,
    help="platform.yml.",
)
@click.version_option(package_name="pam-bundle", prog_name="pam-platform")
def main(config_path: Path) -> None:
    """The control plane: users, policies, vault, grants, recordings and their review.

    \b
    A first installation:
      pam-platform --config platform.yml init \\
        --admin root --password-file root-password
      pam-platform --config platform.yml apply -f access.yml
      pam-platform --config platform.yml serve
    """
    os.environ[config.CONFIG_VARIABLE] = str(config_path.absolute())
    # Nothing the platform writes is for others: the database, its journals, recordings.
    os.umask(0o077)


def start(*, initialised: bool = True) -> config.PlatformConfig:
    """Check the configuration, set up Django and return the configuration.

    Raises ConfigError; and PamError before ``init``, unless ``initialised`` is False. A command answers on
    stdout and logs only what is wrong.
    """
    settings = config.from_environment()
    assert settings is not None
    logging.setup("warning")
    if initialised and not settings.secret_key_file.exists():
        raise PamError(
            f"{settings.state_dir} holds no platform yet",
            hint=f"pam-platform --config {os.environ[config.CONFIG_VARIABLE]} init",
        )
    os.environ["DJANGO_SETTINGS_MODULE"] = "pam_platform.settings"
    django.setup()
    if initialised:
        _require_current_tables()
    return settings


def _require_current_tables() -> None:
    from django.db import OperationalError, connection
    from django.db.migrations.executor import MigrationExecutor

    try:
        executor = MigrationExecutor(connection)
        loader = executor.loader
        pending = executor.migration_plan(loader.graph.leaf_nodes())
    except OperationalError as error:
        raise PamError(f"the database does not answer: {str(error).strip()}") from None
    refuse_newer_tables(loader)
    if pending:
        raise PamError(
            "the database is of another version of pam-platform", hint="run pam-platform init: it migrates."
        )


def refuse_newer_tables(loader: MigrationLoader) -> None:
    """Raise PamError when the database has been migrated beyond what this version knows.

    An older version would write rows that the newer one's tables do not allow, or miss columns.
    """
    unknown = set(loader.applied_migrations) - set(loader.disk_migrations) - set(loader.replacements)
    apps = {app for app, _name in loader.disk_migrations}
    if newer := sorted(f"{app}.{name}" for app, name in unknown if app in apps):
        raise PamError(
            f"the database is of a newer version of pam-platform ({newer[0]})",
            hint="install that version again, or restore the backup made before the upgrade.",
        )
