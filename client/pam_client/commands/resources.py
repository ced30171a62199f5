"""``ls`` and ``completion``."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from pam_client.api import remember_names
from pam_client.commands import App, examples, pass_app
from pam_client.output import duration, show_json, show_table
from pam_common.errors import PamError


@click.command(epilog=examples("pam-client ls", "pam-client ls --json | jq -r '.[].name'"))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@pass_app
def ls(app: App, as_json: bool) -> None:
    """List the resources and accounts that you may use."""
    resources = app.api().resources()
    remember_names(app.home, resources)
    if as_json:
        show_json(resources)
        return
    rows = [
        (
            f"{resource.get('name')}/{account.get('name')}",
            resource.get("protocol"),
            resource.get("gateway"),
            resource.get("database"),
            _limit(account.get("max_duration")),
            _limit(account.get("idle_limit")),
            account.get("policy"),
        )
        for resource in resources
        for account in resource.get("accounts") or []
    ]
    columns = ("ACCOUNT", "PROTOCOL", "GATEWAY", "DATABASE", "FOR", "IDLE", "POLICY")
    show_table(columns, rows, empty="you may use no resource yet; ask your administrator")


def _limit(seconds: object) -> str:
    return duration(seconds) if isinstance(seconds, int) and seconds > 0 else "-"


@click.command(
    epilog=examples(
        "pam-client completion bash \\",
        "  > ~/.local/share/bash-completion/completions/pam-client",
        "# with fpath+=~/.zfunc before compinit:",
        "pam-client completion zsh > ~/.zfunc/_pam-client",
        "pam-client completion fish > ~/.config/fish/completions/pam-client.fish",
    )
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script for a shell.

    Names of resources are completed as `pam-client ls` listed them last.
    """
    kind = get_completion_class(shell)
    if kind is None:
        raise PamError(f"no completion for {shell}")
    click.echo(kind(ctx.find_root().command, {}, "pam-client", "_PAM_CLIENT_COMPLETE").source())
