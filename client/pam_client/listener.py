"""The local end: takes connections of this user only, and carries each in its own threads."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import stat
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from pam_client.carry import Carrier, Dial, Observer
from pam_client.launch import Launch
from pam_client.peers import is_own
from pam_common.errors import PamError
from pam_common.files import make_private_dir
from pam_common.logging import get_logger, kv

log = get_logger("client.listener")

#: Connections at a time, each two threads and a channel. Pools have tens; beyond it the kernel's backlog
#: holds new ones back until one ends.
MAX_CONNECTIONS = 128
#: How long ending connections may take for their last bytes.
FINISH_TIMEOUT = 5.0


class Listener:
    """Accepts on the sockets ``listening`` (which it owns from now on) until :meth:`stop`.

    ``guarded`` False: also connections of other users, where this system cannot tell and the agent asks
    every request for what only this user has.
    """

    def __init__(
        self,
        listening: Sequence[socket.socket],
        *,
        dial: Dial,
        launch: Launch,
        observer: Observer,
        session: str,
        guarded: bool = True,
    ) -> None:
        self._listening = listening
        self._dial = dial
        self._launch = launch
        self._observer = observer
        self._session = session
        self._guarded = guarded
        self._slots = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._carriers: dict[int, Carrier] = {}
        self._idle = threading.Condition()  # guards _carriers; notified when one leaves
        self._stopping = threading.Event()
        self._wake_read, self._wake_write = socket.socketpair()
        self._thread = threading.Thread(target=self._accept_all, name="listener", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def count(self) -> int:
        """How many connections are carried now."""
        with self._idle:
            return len(self._carriers)

    def stop(self, timeout: float = FINISH_TIMEOUT) -> None:
        """Accept no more, let open connections end cleanly, cut those that do not in ``timeout`` seconds."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        with contextlib.suppress(OSError):
            self._wake_write.send(b"\0")
        if self._thread.ident is not None:
            self._thread.join()
        for listening in self._listening:
            listening.close()
        self._wake_read.close()
        self._wake_write.close()
        for carrier in self._snapshot():
            carrier.finish()
        if not self._wait_idle(timeout):
            for carrier in self._snapshot():
                carrier.abort()
            self._wait_idle(timeout)

    def _snapshot(self) -> list[Carrier]:
        with self._idle:
            return list(self._carriers.values())

    def _wait_idle(self, timeout: float) -> bool:
        with self._idle:
            return self._idle.wait_for(lambda: not self._carriers, timeout)

    def _accept_all(self) -> None:
        number = 0
        with selectors.DefaultSelector() as selector:
            for listening in self._listening:
                listening.setblocking(False)
                selector.register(listening, selectors.EVENT_READ, listening)
            selector.register(self._wake_read, selectors.EVENT_READ)
            while not self._stopping.is_set():
                if not self._slots.acquire(timeout=0.5):
                    self._observer.report(f"{MAX_CONNECTIONS} local connections are open; new ones wait", "")
                    continue
                ready = [key.data for key, _ in selector.select() if key.data is not None]
                # One for each slot; what else is ready is so the next time.
                local = self._accept(ready[0]) if ready and not self._stopping.is_set() else None
                if local is None:
                    self._slots.release()
                    continue
                number += 1
                self._begin(number, local)

    def _accept(self, listening: socket.socket) -> socket.socket | None:
        try:
            local, _ = listening.accept()
        except BlockingIOError:
            return None
        except OSError as error:
            # Out of descriptors, or a connection that ended in the queue: wait a moment, go on.
            log.warning("cannot accept", extra=kv(session=self._session, error=error.strerror))
            self._stopping.wait(0.1)
            return None
        local.setblocking(True)
        if self._guarded and not is_own(local):
            local.close()
            self._observer.report("a connection that is not of this user was refused", "")
            return None
        if local.family != socket.AF_UNIX:
            local.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return local

    def _begin(self, number: int, local: socket.socket) -> None:
        carrier = Carrier(number, local, dial=self._dial, launch=self._launch, observer=self._observer)
        with self._idle:
            self._carriers[number] = carrier
        thread = threading.Thread(
            target=self._carry, args=(number, carrier), name=f"connection-{number}", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:  # no more threads on this machine
            local.close()
            self._leave(number)
            self._observer.report("no thread is left for another connection", "")

    def _carry(self, number: int, carrier: Carrier) -> None:
        began = time.monotonic()
        try:
            carrier.run()
        finally:
            self._leave(number)
            seconds = round(time.monotonic() - began, 3)
            log.debug("connection ended", extra=kv(session=self._session, number=number, seconds=seconds))

    def _leave(self, number: int) -> None:
        with self._idle:
            del self._carriers[number]
            self._idle.notify_all()
        self._slots.release()


def listen_unix(path: Path) -> socket.socket:
    """A listening UNIX socket, 0600, in a folder that is ours and private. Raises PamError.

    A socket file that nobody listens on any more is replaced.
    """
    folder = path.parent
    if folder.exists():
        info = folder.stat()
        if info.st_uid != os.geteuid() or stat.S_IMODE(info.st_mode) & 0o077:
            raise PamError(
                f"{folder} is open to other users",
                hint="name a path in a folder of mode 0700, or a new folder.",
            )
    else:
        make_private_dir(folder)
    _remove_stale(path)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listening.bind(str(path))
        path.chmod(0o600)  # until here the folder alone kept others out
        listening.listen(64)
    except OSError as error:
        listening.close()
        # sun_path holds 108 bytes on Linux, 104 on macOS.
        raise PamError(f"cannot listen on {path}: {error.strerror or error}") from None
    return listening


def _remove_stale(path: Path) -> None:
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_socket():
        raise PamError(f"{path} exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except OSError as error:
            raise PamError(f"cannot use {path}: {error.strerror or error}") from None
    raise PamError(f"{path} is in use", hint="another pam-client may be running; see pam-client status.")
