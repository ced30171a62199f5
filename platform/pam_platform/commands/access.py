"""``apply``: access.yml into the database."""

from __future__ import annotations

import json
from pathlib import Path

import click

from pam_platform.commands.root import OPERATOR, main, start


@main.command()
@click.option("-f", "--file", "path", type=click.Path(path_type=Path), required=True, help="access.yml.")
@click.option("--dry-run", is_flag=True, help="Show what would change, and change nothing.")
@click.option("--prune", is_flag=True, help="Remove (users: disable) what the file does not name.")
@click.option("--json", "as_json", is_flag=True, help="Print the changes as JSON.")
def apply(path: Path, dry_run: bool, prune: bool, as_json: bool) -> None:
    """Make users, groups, gateways, relays, resources and policies what access.yml says.

    Everything or nothing. Sessions that the new state does not allow are ended at once. Secrets are read
    from the files and environment variables that access.yml names, and never shown.

    \b
    Examples:
      pam-platform apply -f access.yml --dry-run
      pam-platform apply -f access.yml
      pam-platform apply -f access.yml --prune
    """
    start()
    from pam_platform.access.apply.document import load
    from pam_platform.access.apply.run import apply as run

    changes = run(load(path), prune=prune, dry_run=dry_run, actor=OPERATOR)
    if as_json:
        click.echo(json.dumps({"dry_run": dry_run, "changes": [change.to_json() for change in changes]}))
        return
    for change in changes:
        for style, line in change.lines():
            click.secho(line, fg=style)
    count = sum(change.action != "keep" for change in changes)
    words = "would change" if dry_run else "changed"
    click.echo(f"{count} {words}" if count else "nothing to change")
