"""``recording-key``: a key pair for an auditor."""

from __future__ import annotations

from pathlib import Path

import click

from pam_client.auditing import make_key
from pam_client.commands import examples
from pam_client.output import say, show_json


@click.command("recording-key", epilog=examples("pam-client recording-key auditor.key"))
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def recording_key(file: Path, as_json: bool) -> None:
    """Make a key that opens recordings: the private half into FILE, the public one is printed.

    An administrator puts the public half into recording_recipients of platform.yml (and, where agents list
    their recipients, of agent.yml). Recordings made from then on can be opened with FILE and replay
    --key-file. Keep FILE: nothing else opens what is sealed to it alone.
    """
    public = make_key(file)
    if as_json:
        show_json(public)
        return
    click.echo(f"{{kid: {public['kid']}, key: {public['key']}}}")
    say(f"the private key is in {file}; back it up")
