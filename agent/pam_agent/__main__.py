"""``pam-agent``: enrol, run, check-config, status."""

from __future__ import annotations

import gc
import json
import signal
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click

from pam_agent import config, enrolment
from pam_agent.gateway import Gateway
from pam_common import cli, logging, memory
from pam_common.daemon import Notifier, read_status, run_until_signal
from pam_common.errors import PamError

DEFAULT_CONFIG = Path("/etc/pam-agent/agent.yml")
#: An enrolment token has some 50 characters.
MAX_TOKEN_FILE = 4096


def _version() -> str:
    try:
        return version("pam-bundle")
    except PackageNotFoundError:
        return "unknown"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    default=DEFAULT_CONFIG,
    show_default=True,
    help="The agent's configuration.",
)
@click.version_option(_version(), prog_name="pam-agent")
@click.pass_context
def main_command(context: click.Context, config_path: Path) -> None:
    """Serve a gateway: carry authorised sessions to targets in this network and record them.

    The agent only makes outbound connections: HTTPS to the platform, ssh to the relays, and to the
    targets that allow_targets lists.

    \b
    Examples:
      pam-agent --config agent.yml check-config
      pam-agent --config agent.yml enrol --token-file token --name dc1-a
      pam-agent --config agent.yml run
      pam-agent --config agent.yml status --json

    \b
    Exit codes:
      0 done, 1 failed, 2 wrong usage, 69 not reachable, 78 wrong configuration.
    """
    context.obj = config_path


@main_command.command()
@click.option(
    "--token-file",
    type=click.File("r"),
    required=True,
    help="A file with the one-time enrolment token, or - for standard input.",
)
@click.option("--name", required=True, help="The agent's name, as the token was made for.")
@click.pass_obj
def enrol(config_path: Path, token_file: Any, name: str) -> None:
    """Make this agent's keys and have the platform sign them.

    The token comes from `pam-platform enrol-token agent NAME --gateway GATEWAY` and works once, for an
    hour. Enrolling again under the same name changes nothing.

    \b
    Examples:
      pam-agent --config agent.yml enrol --token-file token --name dc1-a
      ssh admin@platform \\
        pam-platform enrol-token agent dc1-a --gateway dc1 --quiet |
        pam-agent enrol --token-file - --name dc1-a
    """
    settings = config.load(config_path)
    logging.setup(settings.log_level)
    token = token_file.read(MAX_TOKEN_FILE + 1).strip()
    if not token or len(token) > MAX_TOKEN_FILE or not token.isprintable():
        raise PamError("the token file holds no enrolment token")
    standing = enrolment.enrol(settings, token, name, _version())
    relays = ", ".join(relay.name for relay in standing.relays) or "none yet"
    click.echo(f"enrolled as {standing.agent} of gateway {standing.gateway} (relays: {relays})")


@main_command.command()
@click.pass_obj
def run(config_path: Path) -> None:
    """Run the agent until SIGTERM or SIGINT, which drain it; SIGHUP reloads the configuration.

    \b
    Example:
      pam-agent --config agent.yml run
    """
    settings = config.load(config_path)
    logging.setup(settings.log_level)
    memory.keep_some()
    gateway = Gateway(settings)
    # What is there now stays: the look for garbage after each session need not go through it (10 ms).
    gc.freeze()
    notifier = Notifier()
    gateway.start()
    gateway.announce(notifier)
    try:
        run_until_signal(gateway.reload, healthy=gateway.healthy, notifier=notifier, status=gateway.summary)
        notifier.stopping(gateway.stop_seconds)
        # A second Ctrl-C does not wait for the drain; recordings survive that as they do a crash.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    finally:
        gateway.stop()


@main_command.command()
@click.pass_obj
def check_config(config_path: Path) -> None:
    """Check the configuration without running; every problem is shown with file and line.

    \b
    Example:
      pam-agent --config agent.yml check-config
    """
    settings = config.load(config_path)
    click.echo(f"{settings.path}: ok ({len(settings.allow_targets.rules)} target rules)")


@main_command.command()
@click.option("--json", "as_json", is_flag=True, help="The whole status as one JSON object.")
@click.pass_obj
def status(config_path: Path, as_json: bool) -> int:
    """Show what the running agent does. Exits with 0 when all is well, 1 when something is not, 69 when
    no agent runs.

    \b
    Examples:
      pam-agent --config agent.yml status
      pam-agent --config agent.yml status --json | jq .tunnels
    """
    answer = read_status(config.load(config_path).status_socket)
    if as_json:
        click.echo(json.dumps(answer, indent=2))
    else:
        _show(answer)
    return 0 if answer.get("ok") else 1


def _show(answer: dict[str, Any]) -> None:
    click.echo(f"{answer['agent']} of gateway {answer['gateway']}: {answer['summary']}")
    for tunnel in answer["tunnels"]:
        error = f" ({tunnel['error']})" if tunnel["error"] else ""
        click.echo(f"  tunnel {tunnel['relay']}:{tunnel['slot']} {tunnel['state']}{error}")
    for session in answer["sessions"]:
        click.echo(
            f"  session {session['session']} {session['account']} by {session['user']}:"
            f" {session['connections']} connections, {session['state']}"
        )
    pending = answer["uploader"]["pending"]
    if pending:
        click.echo(f"  {pending} recordings wait for their upload {answer['uploader']['trouble']}".rstrip())
    if lost := answer["uploader"]["lost"]:
        click.echo(
            f"  the platform has lost {len(lost)} recordings that it acknowledged: {', '.join(lost[:5])}"
        )
    click.echo(f"  certificate valid for {answer['certificate_left'] // 3600} h")


main = cli.main_of(main_command)

if __name__ == "__main__":
    main()
