"""The commands. Each module holds one or a few of them; they share :class:`App`.

Results go to stdout, everything said to the person to stderr. Exit codes:

    0    done; `connect` without a COMMAND: ended by you
    1    refused, failed, or not found
    2    wrong usage
    3    `connect`: the session was ended by its time, an administrator or the idle limit
    4    `replay`: the recording could not be verified
    69   the platform or every relay cannot be reached now
    78   the configuration file is wrong
    126  `connect … -- COMMAND`: it cannot be run
    127  `connect … -- COMMAND`: there is no such program
    130  interrupted
    n    `connect … -- COMMAND`: the COMMAND's own, 128+n when signal n ended it
"""

from __future__ import annotations

from dataclasses import dataclass

import click
from click.shell_completion import CompletionItem

from pam_client.api import Api, remembered_names
from pam_client.home import Home

ENDED_BY_OTHERS = 3
NOT_VERIFIED = 4


@dataclass(frozen=True)
class App:
    """What every command needs: where things are kept, and which platform was chosen on the line."""

    home: Home
    platform: str | None

    def api(self) -> Api:
        """The platform's API with the login at hand."""
        return Api.open(self.home, self.platform)


pass_app = click.make_pass_decorator(App)


#: What an example may have of 80 columns, indented by click and by us.
_EXAMPLE_WIDTH = 76


def examples(*lines: str) -> str:
    """The epilog of a command's help; ``\\b`` keeps click from joining the lines.

    A comment stands after two spaces and ``# ``; above the commands, where one has no room beside its own.
    """
    if max(map(len, lines)) > _EXAMPLE_WIDTH:
        lines = tuple(part for line in lines for part in _comment_above(line))
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def _comment_above(line: str) -> list[str]:
    command, _, comment = line.partition("  # ")
    return [f"# {comment}", command.rstrip()] if comment else [command]


def complete_account(_ctx: click.Context, _param: click.Parameter, start: str) -> list[CompletionItem]:
    """Names as last listed; completion must not wait for the network."""
    return [CompletionItem(name) for name in remembered_names(Home()) if name.startswith(start)]
