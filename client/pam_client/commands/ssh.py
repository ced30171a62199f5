"""``ssh-proxy`` and ``ssh-config``: what lets plain ``ssh``, ``scp``, ``rsync``, ``git`` and Ansible work."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import click

from pam_client.api import Api
from pam_client.commands import ENDED_BY_OTHERS, App, complete_account, examples, pass_app
from pam_client.commands.connect import advising, request
from pam_client.dial import Dialer
from pam_client.ending import told
from pam_client.grants import Grants
from pam_client.names import account_name
from pam_client.output import clean, say
from pam_client.ssh import config, known_hosts
from pam_client.stdio import Splice
from pam_client.watch import Watch
from pam_common.errors import PamError, UnavailableError
from pam_common.files import write_private


@click.command(
    "ssh-proxy",
    epilog=examples(
        "ssh -o ProxyCommand='pam-client ssh-proxy web-01/deploy' …     # see ssh-config for the rest of it"
    ),
)
@click.argument("account", type=account_name, metavar="RESOURCE[/ACCOUNT]", shell_complete=complete_account)
@pass_app
def ssh_proxy(app: App, account: str) -> int:
    """Carry one SSH connection on stdin and stdout, as ssh's ProxyCommand.

    Needs nothing else to run. The session ends with it; with ControlMaster many calls of ssh share one.
    """
    resource, _, label = account.partition("/")
    api = app.api()
    grants = Grants(lambda: request(api, resource, label or None), end=api.end, now=api.now)
    with told(api, grants):
        if grants.current.protocol != "ssh":
            raise PamError(
                f"{grants.current.account} is not an SSH server",
                hint=f"pam-client connect {grants.current.account} is for the others.",
            )
        # Before the first byte: ssh reads the file when it has the host key.
        known_hosts.write(app.home, api.platform, grants.current.interceptor_host_ca)
        return _splice(api, grants)


def _splice(api: Api, grants: Grants) -> int:
    watch = Watch(grants, ask=api.session, now=api.now)
    dialer = Dialer(grants, api.now, watch.look_now)
    with contextlib.ExitStack() as stack:
        stack.callback(dialer.close)
        stack.callback(watch.stop)
        splice = Splice(advising(dialer.dial)(), 0, 1)
        watch.start()
        with _stop_on_signals(splice):
            try:
                splice.run()
            except OSError:
                raise UnavailableError(
                    "the connection through the relay was lost", hint="a new one may work."
                ) from None
    if watch.reason:
        say(f"{grants.current.account}: {clean(watch.reason)}")
        return ENDED_BY_OTHERS
    return 0


@contextlib.contextmanager
def _stop_on_signals(splice: Splice) -> Iterator[None]:
    """ssh sends SIGHUP when it is done: the session is to end as in any other case."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def stop(_number: int, _frame: FrameType | None) -> None:
        # Not in the handler itself: the main thread may hold the lock that abort() needs.
        threading.Thread(target=splice.stop, name="stop", daemon=True).start()

    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, action in before.items():
            signal.signal(number, action)


@click.command(
    "ssh-config",
    epilog=examples(
        "pam-client ssh-config          # print it",
        "pam-client ssh-config --write  # for ~/.ssh/config: says how",
        "ssh deploy.web-01.pam          # then; scp, sftp, rsync, git, Ansible, too",
    ),
)
@click.option("--write", is_flag=True, help="Write the file that ~/.ssh/config can include.")
@pass_app
def ssh_config(app: App, write: bool) -> None:
    """Print Host entries for every SSH server that you may use.

    ACCOUNT.RESOURCE.pam, and RESOURCE.pam where you have one account only. Each call of ssh opens a session
    of its own. Run it again when servers are added.
    """
    api = app.api()
    resources, ca = api.ssh_resources()
    trust = known_hosts.write(app.home, api.platform, ca)
    text = config.render(resources, trust, config.own_command(app.platform))
    if not write:
        click.echo(text, nl=False)
        return
    file = known_hosts.folder(app.home) / "config"
    write_private(file, text.encode())
    include = config.include_line(file)
    if config.is_included(Path.home() / ".ssh/config", file):
        say(f"{file} is written; ~/.ssh/config includes it")
    else:
        say(f"{file} is written; put this line at the top of ~/.ssh/config:")
        click.echo(include)
