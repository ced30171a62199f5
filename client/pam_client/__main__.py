"""``pam-client``."""

from __future__ import annotations

import sys

import click

from pam_client.commands import App, examples
from pam_client.commands.connect import connect
from pam_client.commands.login import login, logout, status
from pam_client.commands.recording_key import recording_key
from pam_client.commands.replay import replay
from pam_client.commands.resources import completion, ls
from pam_client.commands.sessions import sessions
from pam_client.commands.ssh import ssh_config, ssh_proxy
from pam_client.home import Home
from pam_common import logging, memory
from pam_common.cli import run

_EXIT_CODES = """\b
Exit codes:
  0 done, 1 refused or failed, 2 wrong usage,
  69 platform or relays unreachable, 78 wrong configuration, 130 interrupted.
  connect: 3 when the session was ended from the other side; with a COMMAND
  its own code, 126 or 127 when it cannot be run.
  replay: 4 when it is not verified.

\b
Environment:
  PAM_PLATFORM            the platform's address
  PAM_CLIENT_HOME         where configuration and state are kept
  PAM_CLIENT_ID           a program's name: it needs no login, but
  PAM_CLIENT_SECRET_FILE  a file with its secret"""


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples(
        "pam-client login --platform https://pam.example.com",
        "pam-client ls",
        "pam-client connect prod-db/readonly",
        "pam-client connect prod-db/readonly -- psql -c 'select 1'",
        "pam-client connect web-01/deploy",
        "pam-client connect grafana/viewer",
    )
    + "\n\n"
    + _EXIT_CODES,
)
@click.option("--platform", envvar="PAM_PLATFORM", metavar="URL", help="The platform, for this command.")
@click.option("-v", "--verbose", count=True, help="Log what happens to stderr; twice for more.")
@click.version_option(package_name="pam-bundle", prog_name="pam-client")
@click.pass_context
def cli(ctx: click.Context, platform: str | None, verbose: int) -> None:
    """Reach private databases, servers and web applications without a password in your hands."""
    logging.setup(("warning", "info", "debug")[min(verbose, 2)])
    memory.keep_some()
    ctx.obj = App(home=Home(), platform=platform)


for _command in (
    *(login, logout, status, ls, connect, ssh_proxy, ssh_config),
    *(sessions, replay, recording_key, completion),
):
    cli.add_command(_command)


def main() -> None:
    """The console script."""
    # The name is the one that completion scripts and usage lines know, however this was started.
    sys.exit(run(cli, prog_name="pam-client"))


if __name__ == "__main__":
    main()
