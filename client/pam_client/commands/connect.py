"""``connect``: bring an account to a local port, or run a command with it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import click
from rich.console import Console
from rich.live import Live
from rich.text import Text

from pam_client import child, place
from pam_client.api import Api
from pam_client.carry import Dial, announcing
from pam_client.commands import ENDED_BY_OTHERS, App, complete_account, examples, pass_app
from pam_client.dial import Dialer
from pam_client.ending import told
from pam_client.grants import Grants
from pam_client.home import Home, has_peer_check
from pam_client.launch import Launch, Place, launch_for
from pam_client.listener import Listener
from pam_client.names import account_name
from pam_client.output import Reporter, clean, duration, moment, say
from pam_client.running import noted
from pam_client.session import Session, SessionKeys, parse
from pam_client.watch import Watch
from pam_client.web.opening import opened
from pam_common.errors import PamError
from pam_common.stream import Stream

#: As ssh exits when its connection is lost.
_LOST = 255


@click.command(
    epilog=examples(
        "pam-client connect prod-db/readonly          # stays until Ctrl-C",
        "pam-client connect prod-db/readonly -- psql  # it finds host and user",
        "pam-client connect prod-db/readonly -- pg_dump -f dump.sql",
        "pam-client connect prod-db --port 5433 --database app",
        "pam-client connect prod-db --socket ~/pg/    # psql -h ~/pg -U readonly",
        "pam-client connect web-01/deploy             # a shell on that server",
        "pam-client connect web-01/deploy -- uptime   # runs there, as by ssh",
        "pam-client connect grafana/viewer            # in your browser",
        "pam-client connect grafana/viewer -- sh -c 'curl -s $PAM_URL/api/health'",
    )
)
@click.argument("account", type=account_name, metavar="RESOURCE[/ACCOUNT]", shell_complete=complete_account)
@click.option("--port", type=click.IntRange(1, 65535), help="Listen on this port of 127.0.0.1.")
@click.option(
    "--socket",
    "path",
    type=click.Path(path_type=Path),
    help="Listen on a UNIX socket in this folder, or at this path.",
)
@click.option("--database", help="The database to name in the usage line and to the COMMAND.")
@click.option("-t", "terminal", is_flag=True, help="SSH: give a COMMAND a terminal.")
@click.option("--no-open", is_flag=True, help="Web: print the link for your browser instead of opening it.")
@click.argument("command", metavar="[-- COMMAND…]", nargs=-1, type=click.UNPROCESSED)
@pass_app
def connect(
    app: App,
    account: str,
    port: int | None,
    path: Path | None,
    database: str | None,
    terminal: bool,
    no_open: bool,
    command: tuple[str, ...],
) -> int:
    """Bring an account to a local port, for as long as this runs; or log in to a server.

    The port of an account stays the same from day to day. Only your own user can connect to it. With a
    COMMAND, that is run with the connection in its environment; its exit code is returned, and the session
    ends with it. Programs need no password; the account's own is never on this machine.

    With an SSH account this opens a shell, or runs the COMMAND on the server; --port and --socket are for
    programs that connect by themselves. See ssh-config for plain ssh, scp and rsync.

    A web application is opened in your browser, logged in, at an address of its own. The link that lets the
    browser in works once. A COMMAND finds the application's address in PAM_URL.

    On Linux this listens on a TCP port. Other systems do not tell which user connects to one, so there a
    UNIX socket in a private folder is used.
    """
    if port is not None and path is not None:
        raise click.UsageError("--port and --socket exclude each other")
    if no_open and command:
        raise click.UsageError("a COMMAND opens no browser, with or without --no-open")
    wish = place.Wish(port, path, database, bool(command))
    place.check(wish)
    resource, _, label = account.partition("/")
    api = app.api()
    found = _find(api, resource, command)
    grants = Grants(lambda: request(api, resource, label or None), end=api.end, now=api.now)
    with told(api, grants):
        launch = launch_for(grants.current.protocol)
        if no_open and launch.origin is None:
            raise click.UsageError(f"{grants.current.account} is not a web application; leave --no-open out")
        wants_port = port is not None or path is not None
        if launch.native is not None and wants_port and command:
            raise click.UsageError("a COMMAND runs on the server, and needs no --port or --socket")
        with _local_end(app, api, grants, launch, wish) as (at, listener, watch):
            if launch.native is not None and not wants_port:
                return _closing(launch.native(at, command, terminal), grants, watch, shell=not command)
            if found:
                return _closing(child.run(found, launch.environment(at, os.environ)), grants, watch)
            shown = _shown(app.home, launch, at, grants.current, no_open=no_open)
            return _stay(grants, listener, watch, shown)


@contextlib.contextmanager
def _local_end(
    app: App, api: Api, grants: Grants, launch: Launch, wish: place.Wish
) -> Iterator[tuple[Place, Listener, Watch]]:
    """The listener with all that is behind it; connections get their clean end when the block is left."""
    session = grants.current
    watch = Watch(grants, ask=api.session, now=api.now)
    dialer = Dialer(grants, api.now, watch.look_now)
    with contextlib.ExitStack() as stack:
        stack.callback(dialer.close)
        stack.callback(watch.stop)
        # Before the port opens: a program that waits for it can be sure that it leads somewhere.
        dialer.reach()
        sockets, at = stack.enter_context(place.listening(app.home, api.platform, session, launch, wish))
        origin = at.origin
        dial = advising(dialer.dial)
        listener = Listener(
            sockets,
            dial=announcing(dial, origin.preamble) if origin else dial,
            launch=launch,
            observer=_Observer(watch),
            session=session.id,
            guarded=has_peer_check() or origin is None,
        )
        stack.callback(listener.stop)
        note = {
            "account": session.account,
            "host": at.host,
            "port": at.port,
            "session_end": session.session_end,
        }
        stack.enter_context(noted(app.home, session.id, session=session.id, **note))
        listener.start()
        watch.start()
        yield at, listener, watch


class _Observer:
    """Says why connections fail, once each, and has the platform asked whether the session goes on."""

    def __init__(self, watch: Watch) -> None:
        self._reporter = Reporter()
        self._watch = watch

    def report(self, message: str, hint: str) -> None:
        self._reporter.once(message, hint)
        self._watch.look_now()

    def far_end(self) -> None:
        self._watch.look_now()


def advising(dial: Dial) -> Dial:
    """``dial``, with advice where a relay knows no agent of the gateway: it sends its reason and no hint."""

    def advised() -> Stream:
        try:
            return dial()
        except PamError as error:
            if "no agent of gateway" in str(error):
                error.hint = (
                    "the gateway's agents are down or restarting; try again in a minute. "
                    "An administrator sees them with `pam-platform agent ls`."
                )
            raise

    return advised


def request(api: Api, resource: str, label: str | None) -> Session:
    """A session with keys of its own."""
    keys = SessionKeys()
    return parse(api.connect(resource, label, keys), keys)


def _find(api: Api, resource: str, command: tuple[str, ...]) -> list[str]:
    """The COMMAND with its program's path. One that is not here may be meant for a server."""
    try:
        return child.find(command) if command else []
    except (child.CommandNotFoundError, child.CommandNotExecutableError):
        with contextlib.suppress(PamError):
            for known in api.resources():
                if known.get("name") == resource and known.get("protocol") == "ssh":
                    return []
        raise


def _closing(code: int, grants: Grants, watch: Watch, *, shell: bool = False) -> int:
    """The exit code of what has run. It is not cut short when the session ends: it may have more to do.
    A ``shell`` has not; of its own it says how it ended only when it was not the session that did."""
    if shell and code == _LOST:
        watch.settle()  # the shell hears of the end before the watch does
    if not watch.reason:
        return code
    say(f"{grants.current.account}: {clean(watch.reason)}")
    return ENDED_BY_OTHERS if shell else code


def _stay(
    grants: Grants, listener: Listener, watch: Watch, shown: contextlib.AbstractContextManager[None]
) -> int:
    """Until Ctrl-C or the session's end; ``shown`` is how the place is used."""
    session = grants.current
    with _stop_on_signals(watch):
        _say_how(session, watch)
        with shown:
            _show_until_end(session, listener, watch)
    if not watch.reason:
        say(f"ending {session.account}")
        return 0
    say(f"{session.account}: {clean(watch.reason)}")
    return ENDED_BY_OTHERS


@contextlib.contextmanager
def _shown(home: Home, launch: Launch, at: Place, session: Session, *, no_open: bool) -> Iterator[None]:
    """The line to copy; a web application in the browser, or with ``no_open`` the link for one."""
    click.echo(at.origin.link if at.origin is not None and no_open else launch.usage(at))
    if at.origin is None or no_open:
        yield
        return
    with opened(home, session.id, at.origin.link) as found:
        if not found:
            say("no browser was found; --no-open prints the link for one")
        yield


def _say_how(session: Session, watch: Watch) -> None:
    until = f"until {moment(session.session_end)} ({duration(watch.left())})"
    idle = f", or {duration(session.idle_limit)} without traffic" if session.idle_limit else ""
    say(f"{session.account} is at your hand {until}{idle}; everything is recorded.")


def _show_until_end(session: Session, listener: Listener, watch: Watch) -> None:
    console = Console(stderr=True)
    if not console.is_terminal:
        # Not for ever: a signal that the kernel gave to another thread does not wake this one.
        while not watch.ended.wait(1.0):
            pass
        return

    def line() -> Text:
        count = listener.count()
        words = f"{count} connection{'' if count == 1 else 's'}"
        return Text(f"{session.account}  {words}  {duration(watch.left())} left  Ctrl-C ends", style="dim")

    with Live(line(), console=console, auto_refresh=False, transient=True) as live:
        while not watch.ended.wait(1.0):
            live.update(line(), refresh=True)


@contextlib.contextmanager
def _stop_on_signals(watch: Watch) -> Iterator[None]:
    """The first Ctrl-C, SIGTERM or SIGHUP ends in order; a second one acts as it would without us."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, action in before.items():
            signal.signal(number, action)

    def stop(_number: int, _frame: FrameType | None) -> None:
        restore()
        # Not in the handler itself: the main thread may be inside the lock that stop() needs.
        threading.Thread(target=watch.stop, name="stop", daemon=True).start()

    for number in numbers:
        if before[number] != signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
    finally:
        restore()
