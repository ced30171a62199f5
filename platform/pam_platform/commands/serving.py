"""``serve`` and ``check-config``."""

from __future__ import annotations

import click

from pam_common import logging
from pam_platform.commands.root import main, start


@main.command()
def serve() -> None:
    """Answer people, agents and relays until SIGTERM.

    \b
    Example:
      pam-platform --config /etc/pam-platform/platform.yml serve
    """
    settings = start()
    logging.setup(settings.log_level)
    from django.db import connection

    from pam_platform import serve as server
    from pam_platform.fleet import inbox
    from pam_platform.vault import store

    store.check()
    # platform.yml may name other recipients of recordings than before: agents must know them.
    inbox.post_reload()
    # Workers are forked from here; a connection must not be shared with them.
    connection.close()
    server.run(settings)


@main.command("check-config")
def check_config() -> None:
    """Check platform.yml, the keys and the database, and change nothing.

    \b
    Example:
      pam-platform --config platform.yml check-config
    """
    settings = start()
    from pam_platform import serve as server
    from pam_platform.vault import keys, store

    store.check()
    for purpose in keys.PURPOSES:
        keys.signing_key(purpose)
    server.check_tls(settings)
    click.echo("the configuration is good")
