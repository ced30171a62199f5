"""``python -m pam_packages``: ``lock`` or ``build``."""

from __future__ import annotations

from pathlib import Path

import click

from pam_packages import building, locking
from pam_packages.parts import ROOT


@click.group()
def main() -> None:
    """Lock the dependencies of the packages, and build them."""


@main.command()
def lock() -> None:
    """Resolve the dependencies anew and write packaging/lock/*.txt."""
    locking.write_locks()


@main.command()
@click.option(
    "--out", type=click.Path(path_type=Path), default=ROOT / "dist", help="Where to; dist by default."
)
@click.option("--version", default="", help="Instead of pyproject's, for tests of upgrades.")
@click.option("--key", default="", help="The GPG key that signs SHA256SUMS.")
def build(out: Path, version: str, key: str) -> None:
    """Build the .deb and .rpm of every package."""
    for path in building.build(out, version or None, key or None):
        click.echo(path)


main()
