"""Run a COMMAND as a shell would: signals reach it first, its exit code becomes ours."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType

from pam_common.errors import PamError


class CommandNotFoundError(PamError):
    """There is no such program."""

    exit_code = 127  # as in a shell


class CommandNotExecutableError(PamError):
    """It is there and cannot be run."""

    exit_code = 126  # as in a shell


def find(command: Sequence[str]) -> list[str]:
    """``command`` with its program's full path; asked before a session is opened for nothing."""
    name = command[0]
    program = shutil.which(name)
    if program is not None:
        return [program, *command[1:]]
    # A shell tells the two apart: a file, or a folder named with its path, is there and is no program.
    if shutil.which(name, mode=os.F_OK) or ("/" in name and os.access(name, os.F_OK)):
        raise CommandNotExecutableError(f"cannot run {name}: permission denied")
    raise CommandNotFoundError(f"command not found: {name}")


def run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run ``command`` to its end and return its exit code, 128+n when signal n ended it.

    Must be called in the main thread. The terminal sends Ctrl-C to the whole foreground group, so the
    command has it already and we only must not die of it; what is sent to us alone is passed on.
    """
    with _Forwarding() as forwarding:
        try:
            child = subprocess.Popen(list(command), env=dict(environment))
        except OSError as error:
            raise CommandNotExecutableError(f"cannot run {command[0]}: {error.strerror}") from None
        forwarding.attach(child)
        code = child.wait()
    return 128 - code if code < 0 else code


class _Forwarding:
    """Signal dispositions while a command runs. Handlers, not SIG_IGN: exec resets only handlers."""

    ALWAYS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    #: The terminal sends these to the command as well as to us.
    FROM_TERMINAL = (signal.SIGINT, signal.SIGQUIT)

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._early: list[int] = []
        self._restore = contextlib.ExitStack()

    def __enter__(self) -> _Forwarding:
        for number in (*self.ALWAYS, *self.FROM_TERMINAL):
            if signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup and the like: what we ignore, the command is to ignore too
            self._restore.callback(signal.signal, number, signal.signal(number, self._take))
        return self

    def __exit__(self, *_: object) -> None:
        self._restore.close()

    def attach(self, child: subprocess.Popen[bytes]) -> None:
        self._child = child
        for number in self._early:
            child.send_signal(number)

    def _take(self, number: int, _frame: FrameType | None) -> None:
        if number in self.FROM_TERMINAL and _in_foreground():
            return
        if self._child is None:
            self._early.append(number)
        else:
            self._child.send_signal(number)


def _in_foreground() -> bool:
    with _terminal() as terminal:
        return terminal is not None and os.tcgetpgrp(terminal) == os.getpgrp()


@contextlib.contextmanager
def _terminal() -> Iterator[int | None]:
    try:
        fd = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:  # no controlling terminal: a service, a CI job
        yield None
        return
    try:
        yield fd
    finally:
        os.close(fd)
