"""``pam-relay``."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from pam_common import logging, memory
from pam_common.cli import main_of
from pam_common.daemon import read_status
from pam_common.errors import PamError
from pam_common.files import read_private
from pam_relay import config as relay_config
from pam_relay import platform
from pam_relay.service import Service
from pam_relay.state import RelayState

DEFAULT_CONFIG = Path("/etc/pam-relay/relay.yml")
#: An enrolment token is a line.
MAX_TOKEN_FILE = 4096


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="""\b
Examples:
  pam-relay enrol --token-file token --name relay-1
  pam-relay check-config
  pam-relay --config ./relay.yml run
  pam-relay status --json

\b
Shell completion (bash; likewise zsh, fish):
  eval "$(_PAM_RELAY_COMPLETE=bash_source pam-relay)"

\b
Exit codes:
  0 done, 1 refused or failed, 2 wrong usage,
  69 platform or relay unreachable, 78 wrong configuration.""",
)
@click.option(
    "--config",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    default=DEFAULT_CONFIG,
    show_default=True,
    help="The relay's configuration.",
)
@click.version_option(package_name="pam-bundle", prog_name="pam-relay")
@click.pass_context
def cli(ctx: click.Context, path: Path) -> None:
    """Join clients to the agents of private networks; route ciphertext, hold no session's key."""
    ctx.obj = path


@cli.command()
@click.option(
    "--token-file",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    required=True,
    help="A private file with the one-time token (never on a command line), or - for standard input.",
)
@click.option("--name", required=True, help="The name the token was made for.")
@click.pass_obj
def enrol(path: Path, token_file: Path, name: str) -> None:
    """Make this relay's keys and have the platform sign them. May be repeated.

    The token comes from `pam-platform enrol-token relay NAME` and works once, for an hour.

    \b
    Examples:
      pam-relay enrol --token-file token --name relay-1
      ssh admin@platform pam-platform enrol-token relay relay-1 --quiet |
        pam-relay enrol --token-file - --name relay-1
    """
    config = relay_config.load(path)
    state = platform.enrol(config, _token(token_file), name, version("pam-bundle"))
    click.echo(f"enrolled as relay {state.relay} at {state.issuer}")


def _token(file: Path) -> str:
    if str(file) == "-":
        data = sys.stdin.buffer.read(MAX_TOKEN_FILE + 1)
        if len(data) > MAX_TOKEN_FILE:
            raise PamError("standard input holds no enrolment token")
        return data.decode("ascii", "replace").strip()
    try:
        return read_private(file, max_size=MAX_TOKEN_FILE).decode("ascii", "replace").strip()
    except FileNotFoundError:
        raise PamError(f"there is no {file}", hint="`pam-platform enrol-token` makes one.") from None
    except OSError as error:
        raise PamError(f"{file} cannot be read: {error.strerror}") from None


@cli.command()
@click.pass_obj
def run(path: Path) -> None:
    """Serve until SIGTERM, then let open channels end for up to drain_timeout. SIGHUP fetches the bundle.

    \b
    Example:
      pam-relay --config relay.yml run
    """
    config = relay_config.load(path)
    logging.setup(config.log_level)
    memory.keep_some()
    Service(config).run()


@cli.command("check-config")
@click.pass_obj
def check_config(path: Path) -> None:
    """Check the configuration and, if enrolled, the stored state; change nothing.

    \b
    Example:
      pam-relay --config relay.yml check-config
    """
    config = relay_config.load(path)
    if (config.state_dir / "relay.json").exists():
        state = RelayState.load(config.state_dir)
        click.echo(f"{path}: ok, enrolled as relay {state.relay}")
    else:
        click.echo(f"{path}: ok, not enrolled yet")


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="The whole answer as one JSON object.")
@click.pass_obj
def status(path: Path, as_json: bool) -> None:
    """Ask the running relay for its routes and counts.

    \b
    Examples:
      pam-relay status
      pam-relay status --json | jq .routes
    """
    answer = read_status(relay_config.load(path).status_socket)
    if as_json:
        click.echo(json.dumps(answer))
        return
    click.echo("\n".join(_lines(answer)))


def _lines(answer: dict[str, Any]) -> list[str]:
    head = [
        f"relay       {answer['relay']}{' (draining)' if answer['draining'] else ''}",
        f"platform    {answer['platform']}",
        f"bundle      serial {answer['bundle_serial']}, {answer['bundle_age']} s old",
        f"sessions    {answer['sessions']} with {answer['channels']} channels",
        f"transports  {answer['transports']}, {answer['unauthenticated']} not logged in",
    ]
    routes = [
        f"route       {route['gateway']}:{route['slot']} agent {route['agent']}, {route['channels']} channels"
        for route in answer["routes"]
    ]
    return head + (routes or ["route       none"])


main = main_of(cli)

if __name__ == "__main__":
    main()
