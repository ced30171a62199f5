"""``replay``: a recording played, printed or exported, and verified."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from pam_client.api import Api
from pam_client.auditing import decrypted, read_key
from pam_client.commands import NOT_VERIFIED, App, examples, pass_app
from pam_client.commands.sessions import complete_session
from pam_client.export import EXPORTS, Events
from pam_client.names import session_id
from pam_client.output import Reporter, clean, say
from pam_client.playback.frames import Terminal, compressed, find, frames
from pam_client.playback.keys import Keys
from pam_client.playback.player import HELP, Player
from pam_client.playback.transcript import transcript
from pam_client.replay import verdict
from pam_common.errors import PamError

#: The longest pause that replay keeps: nobody watches a lunch break.
_LONGEST_PAUSE = 5.0


class _Events:
    """The events of a recording, as often as they are asked for. Remembers what could not be read of it."""

    def __init__(self, fetch: Events) -> None:
        self._fetch = fetch
        self.any = False  #: something was read
        self.problems: dict[str, str] = {}  #: with their hints

    def __call__(self) -> Iterator[dict[str, Any]]:
        for event in self._fetch():
            if event.get("kind") != "problem":
                self.any = True
            elif len(self.problems) < Reporter.LIMIT:
                part, text = clean(event.get("part"), limit=12), clean(event.get("problem"), limit=500)
                self.problems[f"part {part}: {text}"] = clean(event.get("hint"), limit=500)
            yield event


@click.command(
    epilog=examples(
        "pam-client replay s-…                                  # a terminal session is played",
        "pam-client replay s-… --speed 4                        # as it happened, four times as fast",
        "pam-client replay s-… --max-pause 1 --terminal 2       # its second terminal, without long pauses",
        "pam-client replay s-… --lines | less                   # printed; so is what is no terminal",
        "pam-client replay s-… --export asciicast -o demo.cast  # for: asciinema play demo.cast",
        "pam-client replay s-… --export har -o session.har      # for a browser's developer tools",
        "pam-client replay s-… --key-file auditor.key          # sealed to an auditor, not to the platform",
        "pam-client replay s-… --json | jq -r 'select(.kind==\"query\").sql'",
    )
)
@click.argument("session", type=session_id, shell_complete=complete_session)
@click.option(
    "--json", "as_json", is_flag=True, help="Print the events as they are, one JSON object per line."
)
@click.option("--lines", "as_lines", is_flag=True, help="Print lines, also of a terminal session.")
@click.option("--verify/--no-verify", default=True, help="Have the recording verified (the default).")
@click.option(
    "--key-file",
    type=click.Path(path_type=Path),
    help="An auditor's private key (see recording-key): decrypt here, not on the platform.",
)
@click.option(
    "--speed",
    type=click.FloatRange(min=0, min_open=True),
    help="Keep the pauses, divided by this. A terminal is played with 1, lines are printed without pauses.",
)
@click.option(
    "--max-pause",
    type=click.FloatRange(min=0),
    default=_LONGEST_PAUSE,
    show_default=True,
    help="Cut longer pauses to this many seconds.",
)
@click.option(
    "--terminal", "number", type=click.IntRange(min=1), default=1, help="Which terminal of the session."
)
@click.option("--export", "form", type=click.Choice(sorted(EXPORTS)), help="Write a file in this format.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The file that --export writes.")
@pass_app
def replay(
    app: App,
    session: str,
    as_json: bool,
    as_lines: bool,
    verify: bool,
    key_file: Path | None,
    speed: float | None,
    max_pause: float,
    number: int,
    form: str | None,
    output: Path | None,
) -> int:
    """Show what was recorded in a session.

    On a terminal, a terminal session is played: space pauses, the arrow keys seek and change the speed, q
    ends. What could act on your terminal (its title, clipboard, answers to questions) is left out. Everything
    else is printed.

    The platform verifies the recording (signatures, hash chain, completeness); its verdict follows the
    events, with --json on stderr. A recording that cannot be verified is shown all the same, and the exit
    code is 4. It is 1 when some of it cannot be read, or there is nothing to export; and 0 for a session in
    which nothing was recorded.
    """
    if (form is None) != (output is None):
        raise click.UsageError("--export and -o belong together")
    api = app.api()
    key = read_key(key_file) if key_file else None
    events = _Events(lambda: decrypted(api, session, key) if key else api.events(session))
    whole = True
    try:
        if form is not None and output is not None:
            whole = _export(EXPORTS[form](events, api.session(session), number), output, events)
        elif (found := _to_play(events, number, as_json or as_lines)) is not None:
            _play(events, found, number, speed or 1.0, max_pause)
        else:
            _print(_paced(events(), speed, max_pause), as_json)
    finally:  # also before another error, of which it may be the cause
        reporter = Reporter()
        for problem, hint in events.problems.items():
            reporter.once(problem, hint)
    if not whole:
        say(f"error: there is nothing to write: {output} was not made")
    if verify and not _verify(api, session, events, write=say if as_json else click.echo):
        return NOT_VERIFIED
    return 0 if whole and not events.problems else 1


def _to_play(events: Events, number: int, printed: bool) -> Terminal | None:
    """The terminal to play, if it is to be played: on a terminal, and where there is one in the recording."""
    if printed or not sys.stdout.isatty():
        return None
    found = find(events(), number)
    if found is None and number > 1:
        raise PamError(f"the recording has no terminal {number}")
    return found


def _play(events: Events, found: Terminal, number: int, speed: float, max_pause: float) -> None:
    size = shutil.get_terminal_size()
    if size.columns < found.columns or size.lines < found.rows:
        say(f"it had {found.columns} columns and {found.rows} rows, more than this terminal")
    say(HELP)
    with Keys() as keys:
        Player(lambda: compressed(frames(events(), number), max_pause), _write, keys, speed=speed).play()
    if find(events(), number + 1) is not None:
        say(f"the session has another terminal: --terminal {number + 1}")


def _write(text: str) -> None:
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()


def _print(events: Iterator[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        for event in events:
            click.echo(json.dumps(event, ensure_ascii=True))
    else:
        for line in transcript(events):
            click.echo(line)


def _export(pieces: Iterator[str], output: Path, events: _Events) -> bool:
    """Into a file of the person's alone, whole or not at all; False when there were no events for one."""
    scratch = output.with_name(f".{output.name}.{secrets.token_hex(6)}")
    try:
        fd = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise PamError(f"cannot write {output}: {error.strerror}") from None
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            for piece in pieces:
                file.write(piece)
        if events.any:
            scratch.replace(output)
    except OSError as error:
        raise PamError(f"cannot write {output}: {error.strerror}") from None
    finally:
        scratch.unlink(missing_ok=True)
    if events.any:
        say(f"{output} is written")
    return events.any


def _verify(api: Api, session: str, events: _Events, write: Callable[[str], None]) -> bool:
    try:
        report = api.verify(session)
    except PamError as error:
        write(f"NOT VERIFIED: {clean(error)}")
        return False
    for line in verdict(report):
        write(line)
    ok, parts = report.get("ok") is True, report.get("parts")
    if ok and parts == [] and not events.any:
        # The platform vouches for it. A recording that it should have and has not, it calls wrong.
        write("nothing was recorded in this session so far")
        return True
    ok = ok and bool(parts) and isinstance(parts, list)
    write("the recording is verified" if ok else "THE RECORDING IS NOT VERIFIED")
    return ok


def _paced(
    events: Iterator[dict[str, Any]], speed: float | None, max_pause: float
) -> Iterator[dict[str, Any]]:
    """The events as they happened, ``speed`` times as fast; at once without."""
    before: float | None = None
    for event in events:
        now = event.get("t")
        if speed and not isinstance(now, bool) and isinstance(now, int | float):
            if before is not None and now > before:
                time.sleep(min((now - before) / speed, max_pause))
            before = float(now)
        yield event
