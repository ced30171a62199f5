"""``sessions``: list, show, kill."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import click
from click.shell_completion import CompletionItem

from pam_client.commands import App, examples, pass_app
from pam_client.home import Home
from pam_client.names import session_id
from pam_client.output import clean, moment, say, show_fields, show_json, show_table
from pam_common.errors import PamError

_COMPLETION_FILE = "sessions.json"


def complete_session(_ctx: click.Context, _param: click.Parameter, start: str) -> list[CompletionItem]:
    """Sessions as last listed; completion must not wait for the network."""
    known = Home().read_json(_COMPLETION_FILE).get("sessions")
    names = [name for name in known if isinstance(name, str)] if isinstance(known, list) else []
    return [CompletionItem(name) for name in names if name.startswith(start)]


class _ListsByDefault(click.Group):
    """``sessions --all`` is ``sessions ls --all``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # While a shell completes, an empty line may still become any subcommand.
        bare = not args and not ctx.resilient_parsing
        if bare or (args and args[0].startswith("-") and args[0] not in ctx.help_option_names):
            args = ["ls", *args]
        return super().parse_args(ctx, args)


@click.group(
    cls=_ListsByDefault,
    epilog=examples(
        "pam-client sessions                                    # the same as: sessions ls",
        "pam-client sessions --all --active",
        "pam-client sessions show s-…",
        "pam-client sessions kill s-… --reason 'left the desk'",
    ),
)
def sessions() -> None:
    """List, show and end sessions; without a subcommand: list yours."""


@sessions.command(
    "ls",
    epilog=examples(
        "pam-client sessions ls --all --json |",
        "  jq -r '.[] | select(.state==\"active\").id'",
    ),
)
@click.option("--mine/--all", default=True, help="Only yours (the default), or all that you may see.")
@click.option("--active", is_flag=True, help="Only those that run now.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True, help="How many.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@pass_app
def list_sessions(app: App, mine: bool, active: bool, limit: int, as_json: bool) -> None:
    """List sessions, the newest first."""
    found = app.api().sessions(mine=mine, active=active, limit=limit)
    with contextlib.suppress(PamError):  # a home that takes nothing is no reason to show nothing
        app.home.write_json(_COMPLETION_FILE, {"sessions": [entry.get("id") for entry in found]})
    if as_json:
        show_json(found)
        return
    columns = ("SESSION", "USER", "ACCOUNT", "STATE", "STARTED", "ENDED", "WHY", "RECORDING")
    rows = [
        (
            entry.get("id"),
            entry.get("user"),
            entry.get("account"),
            entry.get("state"),
            moment(entry.get("started")),
            moment(entry.get("ended")),
            entry.get("end_reason"),
            entry.get("recording"),
        )
        for entry in found
    ]
    # `sessions show` has what is left out; of one's own sessions the user is known.
    show_table(columns, rows, empty="no sessions", first_to_go=("WHY", "ENDED", *(["USER"] * mine)))


@sessions.command(
    "show", epilog=examples("pam-client sessions show s-…", "pam-client sessions show s-… --json")
)
@click.argument("session", type=session_id, shell_complete=complete_session)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@pass_app
def show_session(app: App, session: str, as_json: bool) -> None:
    """Show one session."""
    found = app.api().session(session)
    if as_json:
        show_json(found)
        return
    times = {"started", "ended", "session_end"}
    show_fields([(clean(name), _plain(name, value, times)) for name, value in found.items()])


def _plain(name: str, value: Any, times: set[str]) -> str:
    if name in times:
        return moment(value)
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)


@sessions.command("kill", epilog=examples("pam-client sessions kill s-… --reason 'left the desk'"))
@click.argument("session", type=session_id, shell_complete=complete_session)
@click.option("--reason", default="", help="Why; the user and the audit log are told.")
@pass_app
def kill_session(app: App, session: str, reason: str) -> None:
    """End a session at once."""
    app.api().kill(session, reason)
    say(f"killed {clean(session)}")
