"""What the four commands share: errors a person can act on, exit codes, the log level."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click

from pam_common.errors import PamError


def run(command: click.Command, args: Sequence[str] | None = None, **extra: Any) -> int:
    """Run ``command`` and return its exit code: 0, a PamError's own, 2 for usage, 130 for Ctrl-C."""
    try:
        result = command.main(args=list(args) if args is not None else None, standalone_mode=False, **extra)
    except PamError as error:
        show_error(error)
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); say nothing more, not even at exit.
        sys.stderr.close()
        return 141
    return result if isinstance(result, int) else 0


def main_of(command: click.Command) -> Callable[[], None]:
    """The console-script function of ``command``."""

    def main() -> None:
        # A core would put keys and credentials on a disk.
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sys.exit(run(command))

    return main


def show_error(error: PamError) -> None:
    """``error: …`` and ``HINT: …`` on stderr."""
    for line in str(error).splitlines() or ["failed"]:
        click.echo(f"error: {line}", err=True)
    if error.hint:
        click.echo(f"HINT: {error.hint}", err=True)
