"""What every daemon does: tell systemd, answer ``status`` on a UNIX socket, stop and reload on signals."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sdnotify

from pam_common.errors import PamError, ProtocolError, UnavailableError
from pam_common.files import make_private_dir
from pam_common.logging import get_logger

log = get_logger("daemon")

#: A status of thousands of sessions stays below it.
MAX_STATUS = 4 << 20
STATUS_TIMEOUT = 5.0
#: systemd reads at once; while it does not, a sign of life is lost and the daemon's main thread is not.
NOTIFY_TIMEOUT = 1.0
#: sd_listen_fds(3): the number of the first descriptor that systemd passes.
FIRST_PASSED = 3


class Notifier:
    """READY, STATUS, RELOADING, STOPPING and WATCHDOG messages; does nothing outside systemd."""

    def __init__(self) -> None:
        self._notifier = sdnotify.SystemdNotifier()
        if self._notifier.socket is not None:
            self._notifier.socket.settimeout(NOTIFY_TIMEOUT)
        self._last_status = ""

    def ready(self) -> None:
        self._notifier.notify("READY=1")

    def reloading(self) -> None:
        self._notifier.notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self, seconds: float = 0.0) -> None:
        """The end begins. It may take ``seconds``, even where the unit's TimeoutStopSec is less."""
        extend = f"\nEXTEND_TIMEOUT_USEC={int(seconds * 1e6)}" if seconds else ""
        self._notifier.notify(f"STOPPING=1{extend}")

    def status(self, text: str) -> None:
        if text != self._last_status:
            self._last_status = text
            self._notifier.notify(f"STATUS={text}")

    def alive(self) -> None:
        self._notifier.notify("WATCHDOG=1")

    @staticmethod
    def watchdog_interval() -> float | None:
        """Seconds between signs of life that systemd expects (half of its limit), or None."""
        limit = os.environ.get("WATCHDOG_USEC", "")
        return int(limit) / 2e6 if limit.isdigit() and int(limit) > 0 else None


def passed_sockets() -> list[socket.socket]:
    """The listening sockets that a systemd socket unit passed to this process (sd_listen_fds(3)).

    Child processes do not inherit them, and a second call finds none. Raises PamError when one of them is
    not a listening TCP socket.
    """
    count, pid = os.environ.pop("LISTEN_FDS", ""), os.environ.pop("LISTEN_PID", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdigit():
        return []
    found: list[socket.socket] = []
    for number in range(FIRST_PASSED, FIRST_PASSED + int(count)):
        os.set_inheritable(number, False)
        passed = socket.socket(fileno=number)
        listens = passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if passed.family not in (socket.AF_INET, socket.AF_INET6) or not listens:
            raise PamError("systemd passed something else than a listening TCP socket")
        found.append(passed)
    return found


class StatusSocket:
    """Answers every connection on a 0600 UNIX socket with one JSON object, in one thread."""

    def __init__(self, path: Path, status: Callable[[], dict[str, Any]]) -> None:
        self.path = path
        self._status = status
        self._listener: socket.socket | None = None

    def start(self) -> None:
        make_private_dir(self.path.parent)
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(_short(self.path))
        # The folder is 0700 already; the mode makes it true of the socket too.
        self.path.chmod(0o600)
        listener.listen(8)
        self._listener = listener
        threading.Thread(target=self._serve, args=(listener,), name="status", daemon=True).start()

    def stop(self) -> None:
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
            self.path.unlink(missing_ok=True)

    def _serve(self, listener: socket.socket) -> None:
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return  # stopped
            with peer:
                peer.settimeout(STATUS_TIMEOUT)
                try:
                    peer.sendall(json.dumps(self._status()).encode())
                except OSError:
                    continue  # the asker went away
                except Exception:  # the status must not end with one bad answer
                    log.exception("status failed")


def read_status(path: Path) -> dict[str, Any]:
    """Ask the daemon behind ``path``. Raises UnavailableError when none runs."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asker:
        asker.settimeout(STATUS_TIMEOUT)
        try:
            asker.connect(_short(path))
            data = bytearray()
            while len(data) <= MAX_STATUS and (more := asker.recv(65536)):
                data += more
        except OSError as error:
            raise UnavailableError(
                f"nothing answers on {path} ({error.strerror or error})",
                hint="is the service running, and may this user read its runtime directory?",
            ) from None
    try:
        answer = json.loads(data)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise ProtocolError(f"the answer on {path} is not a status")
    return answer


def run_until_signal(
    on_reload: Callable[[], None],
    *,
    healthy: Callable[[], bool],
    notifier: Notifier,
    status: Callable[[], str],
    stop: threading.Event | None = None,
) -> str:
    """Run the main thread until SIGTERM or SIGINT; returns the reason to stop.

    SIGHUP calls ``on_reload``; a PamError from it is logged and the old state stays. While ``healthy``
    says so, systemd's watchdog is fed; ``stop`` ends it from inside.
    """
    # The watchdog's SIGABRT then shows in the journal where each thread was; no values, only lines.
    faulthandler.enable()
    signals: list[int] = []
    wake = threading.Event()

    def note(number: int, _frame: object) -> None:
        signals.append(number)
        wake.set()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, note)
    interval = min(notifier.watchdog_interval() or 1.0, 1.0)
    while True:
        wake.wait(interval)
        wake.clear()
        while signals:
            received = signals.pop(0)
            if received != signal.SIGHUP:
                return signal.Signals(received).name
            _reload(on_reload, notifier)
        if stop is not None and stop.is_set():
            return "stopped"
        notifier.status(status())
        if healthy():
            notifier.alive()


def _reload(on_reload: Callable[[], None], notifier: Notifier) -> None:
    notifier.reloading()
    try:
        on_reload()
    except PamError as error:
        log.error("reload refused, going on as before: %s", error)
    notifier.ready()


def _short(path: Path) -> str:
    """``path`` as a socket address: those hold about 100 bytes, so fall back to a relative path."""
    text = str(path)
    if len(os.fsencode(text)) < 100:
        return text
    relative = os.path.relpath(text)
    if len(os.fsencode(relative)) < 100:
        return relative
    raise PamError(f"{path} is too long for a UNIX socket", hint="choose a shorter runtime_dir.")
