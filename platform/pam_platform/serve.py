"""The server: gunicorn with threads, configured here and nowhere else."""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import logging as std_logging
import math
import os
import signal
import socket
import ssl
import struct
import sys
import termios
import threading
import time
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Any

from django.conf import settings as django_settings
from django.db import DatabaseError, connection
from django.http import HttpRequest
from gunicorn import systemd, util
from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.glogging import Logger
from gunicorn.workers.gthread import ThreadWorker

from pam_common import logging
from pam_common.errors import ConfigError, PamError
from pam_platform import config
from pam_platform.config import PlatformConfig

#: A client that sends nothing for this long while a thread waits for it is cut; without it 32 such clients
#: would be the whole server. TLS asks the kernel again and again: there only the next ones hold.
READ_TIMEOUT = 10
#: So long may a thread wait for the whole head of a request, and for TLS before it.
HEAD_TIMEOUT = 20
#: Whoever has a thread wait for so long, with a body or by not reading, must have moved so many bytes
#: meanwhile. GPRS carries several times as much, so no honest upload is cut, not even in a tunnel.
SLOW_PERIOD = 30
SLOW_BYTES = 16 * 1024
#: So long may a streamed answer stand still: whoever watches a recording pauses it.
PAUSE_TIMEOUT = 3600
#: Kept-alive connections wait in the poller and hold no thread; agents come back within a second.
KEEPALIVE = 30
#: Uploads in flight may finish; agents that wait are sent home at once.
GRACEFUL_TIMEOUT = 20
#: What a reload takes on; Django was set up with all the rest.
_RELOADED = frozenset(
    {"tls", "workers", "threads", "log_level", "recording_recipients", "recording_platform_key"}
)


class _Watch:
    """A thread's time with one client: in every ``seconds`` that the thread waits for it, at least ``least``
    bytes must go one way or the other."""

    def __init__(self, sock: socket.socket) -> None:
        # Its own: while TLS shakes hands gunicorn has none that works, and the number may be another's soon.
        self.sock = socket.socket(fileno=os.dup(sock.fileno()))
        self.expect(HEAD_TIMEOUT, math.inf)
        self.reading = True

    def expect(self, seconds: float, least: float) -> None:
        self.reading = False
        self._seconds, self._least = seconds, least
        self._waited, self._before = 0.0, _moved(self.sock)

    def too_slow(self, passed: float) -> bool:
        """Count ``passed`` seconds, if they were the client's; the thread's own work is not its fault."""
        if not (self.reading or _unsent(self.sock)):
            return False
        self._waited += passed
        if self._waited < self._seconds:
            return False
        moved = _moved(self.sock)
        if moved - self._before < self._least:
            return True
        self._waited, self._before = 0.0, moved
        return False


class _Reader:
    """gunicorn's reader of a body; says when a thread waits in it."""

    def __init__(self, reader: Any, watch: _Watch) -> None:
        self._reader, self._watch = reader, watch

    def read(self, size: int) -> bytes:
        self._watch.reading = True
        try:
            return bytes(self._reader.read(size))
        finally:
            self._watch.reading = False


def _unsent(sock: socket.socket) -> int:
    """Bytes that the client has not taken yet."""
    return int.from_bytes(fcntl.ioctl(sock, termios.TIOCOUTQ, b"\0" * 4), sys.byteorder)


def _moved(sock: socket.socket) -> int:
    """Bytes that have come from the client, and that it has taken: Linux's ``tcp_info`` counts them."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
    return sum(struct.unpack_from("QQ", info, 120))  # tcpi_bytes_acked, tcpi_bytes_received


class Worker(ThreadWorker):  # type: ignore[misc]  # gunicorn is untyped
    """gthread in which no client keeps a thread for long, and which lets waiting agents go when it stops."""

    wsgi: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._watches: dict[int, _Watch] = {}  # by thread
        self._looked = time.monotonic()

    def handle(self, conn: Any) -> Any:
        thread = threading.get_ident()
        watch = self._watches[thread] = _Watch(conn.sock)
        try:
            kept = super().handle(conn)
            if not kept:
                _linger(watch.sock, conn.sock)
            return kept
        finally:
            del self._watches[thread]
            watch.sock.close()

    def handle_request(self, req: Any, conn: Any) -> Any:
        watch = self._watches[threading.get_ident()]
        watch.expect(SLOW_PERIOD, SLOW_BYTES)
        req.body.reader = _Reader(req.body.reader, watch)
        return super().handle_request(req, conn)

    def load_wsgi(self) -> None:
        super().load_wsgi()
        app = self.wsgi

        def answer(environ: Any, start_response: Any) -> Any:
            found = app(environ, start_response)
            if getattr(found, "streaming", False):
                self._watches[threading.get_ident()].expect(PAUSE_TIMEOUT, 1)
            return found

        self.wsgi = answer

    def murder_pending(self) -> None:
        # Called whenever the main loop has gone round: at least once a second, also while it stops.
        super().murder_pending()
        passed = time.monotonic() - self._looked
        if passed < 1:
            return
        self._looked += passed
        for watch in list(self._watches.values()):
            with contextlib.suppress(OSError, ValueError):  # it is over just now
                # When this loop was late, the thread may have been, too.
                if watch.too_slow(min(passed, 2)):
                    self.log.info("a client was too slow")
                    watch.sock.shutdown(socket.SHUT_RDWR)  # the thread finds that it has gone

    def init_process(self) -> None:
        for listener in self.sockets:
            # Accepted sockets inherit it (Linux), and it holds however Python's own timeout is set.
            timeout = struct.pack("ll", READ_TIMEOUT, 0)
            listener.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
        super().init_process()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        _send_waiting_agents_home()
        super().handle_exit(sig, frame)

    def is_parent_alive(self) -> bool:
        # Asked about once a second. Who holds out longer than it must keeps the port from the next server.
        if super().is_parent_alive():
            return True
        _send_waiting_agents_home()
        self.alive = False  # or gunicorn keeps connections alive that are idle from now on
        return False


def _linger(ours: socket.socket, gunicorns: socket.socket) -> None:
    """Let the client read its last answer to the end. gunicorn does so in its main loop, for which then
    everybody waits; after this, it finds that there is nothing to wait for."""
    util.close_graceful(ours)
    with contextlib.suppress(OSError):
        socket.socket.shutdown(gunicorns, socket.SHUT_RDWR)


def _send_waiting_agents_home() -> None:
    from pam_platform.fleet import inbox

    inbox.stop_waiting()


class PlainLogger(Logger):  # type: ignore[misc]  # gunicorn is untyped
    """gunicorn's messages by our log lines; no access log, the audit trail says who did what."""

    def setup(self, cfg: Any) -> None:
        self.error_log = std_logging.getLogger("pam.platform.server")
        self.access_log = std_logging.getLogger("pam.platform.access")
        self.access_log.disabled = True

    def exception(self, msg: str, *args: Any, **kwargs: Any) -> None:
        if isinstance(sys.exc_info()[1], BlockingIOError):
            self.error_log.info("a client was too slow")  # what READ_TIMEOUT raises: no fault of ours
        else:
            super().exception(msg, *args, **kwargs)

    def reopen_files(self) -> None:
        """There are none."""


class WatchedArbiter(Arbiter):  # type: ignore[misc]  # gunicorn is untyped
    """Feeds systemd's watchdog while a worker shows signs of life; gunicorn itself only says READY."""

    def reload(self) -> None:
        try:
            self.app.read_again()
        except PamError as error:
            self.log.error("reload refused, going on as before: %s", error)
            return
        super().reload()

    def murder_workers(self) -> None:
        # Called about once a second by the main loop.
        super().murder_workers()
        if any(self._lives(worker) for worker in self.WORKERS.values()):
            systemd.sd_notify("WATCHDOG=1", self.log)

    def _lives(self, worker: Any) -> bool:
        try:
            return bool(time.monotonic() - worker.tmp.last_update() <= self.timeout)
        except (OSError, ValueError):
            return False  # it has just ended


class Application(BaseApplication):  # type: ignore[misc]  # gunicorn is untyped
    """gunicorn with our settings; neither its command line nor its environment variables count."""

    def __init__(self, settings: PlatformConfig) -> None:
        self._settings = settings
        super().__init__()

    def load_config(self) -> None:
        for name, value in gunicorn_settings(self._settings).items():
            self.cfg.set(name, value)

    def run(self) -> None:
        WatchedArbiter(self).run()

    def read_again(self) -> None:
        """Read platform.yml anew. Raises ConfigError, and then nothing has changed."""
        path = Path(os.environ[config.CONFIG_VARIABLE])
        old, new = self._settings, config.load(path)
        changed = [
            field.name for field in fields(new) if getattr(new, field.name) != getattr(old, field.name)
        ]
        if fixed := [name for name in changed if name not in _RELOADED]:
            raise ConfigError([f"{path.name}: {name}: needs a restart to change" for name in fixed])
        check_tls(new)
        self._settings = django_settings.PAM_CONFIG = new
        logging.setup(new.log_level)
        if any(name.startswith("recording") for name in changed):
            _tell_agents()

    def load(self) -> Any:
        from pam_platform.wsgi import application

        return application


def gunicorn_settings(settings: PlatformConfig) -> dict[str, Any]:
    """gunicorn's settings for ``settings``."""
    host = f"[{settings.listen_host}]" if ":" in settings.listen_host else settings.listen_host
    found: dict[str, Any] = {
        "bind": f"{host}:{settings.listen_port}",
        "worker_class": "pam_platform.serve.Worker",
        "workers": settings.workers,
        "threads": settings.threads,
        "logger_class": "pam_platform.serve.PlainLogger",
        "timeout": 60,
        "graceful_timeout": GRACEFUL_TIMEOUT,
        "keepalive": KEEPALIVE,
        # The longest line is a page of sessions, the longest header a token of at most 16 KiB.
        "limit_request_line": 4094,
        "limit_request_fields": 50,
        "limit_request_field_size": 16380,
        "worker_connections": 1000,
        "control_socket_disable": True,
        "post_worker_init": _quieten,
        "worker_tmp_dir": "/dev/shm",  # noqa: S108  # heartbeats only, and never a disk that stalls
        "umask": 0o077,
        # Who may set X-Forwarded-*: the one proxy in front, or nobody.
        "forwarded_allow_ips": "*" if settings.behind_proxy else "",
        "forwarder_headers": "",
    }
    if settings.tls is not None:
        found |= {
            "certfile": str(settings.tls.cert),
            "keyfile": str(settings.tls.key),
            "ssl_context": _ssl_context,
            "do_handshake_on_connect": True,
        }
    return found


def run(settings: PlatformConfig) -> None:
    """Serve until SIGTERM."""
    check_tls(settings)
    # The watchdog's SIGABRT then shows in the journal where each thread was; no values, only lines.
    faulthandler.enable()
    # Started from a script with signals ignored, workers would never stop.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    Application(settings).run()


def _tell_agents() -> None:
    """Have agents fetch the new recipients of recordings now; otherwise they do within the hour."""
    from pam_platform.fleet import inbox

    try:
        inbox.post_reload()
    except DatabaseError as error:
        std_logging.getLogger("pam.platform.server").warning("agents not told: %s", error)
    finally:
        # Workers are forked from here; a connection must not be shared with them.
        connection.close()


def check_tls(settings: PlatformConfig) -> None:
    """Raise ConfigError unless certificate and key can be used together."""
    if settings.tls is None:
        return
    try:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(settings.tls.cert, settings.tls.key)
    except (OSError, ValueError) as error:
        raise ConfigError(
            [f"tls: {settings.tls.cert} and {settings.tls.key} cannot be used: {error}"],
            hint="a PEM chain, its own certificate first, and the PEM key of that certificate.",
        ) from None


def _quieten(worker: Any) -> None:
    # Every 401 and 404 would be a warning: what is decided is in the audit trail, the rest is noise.
    std_logging.getLogger("django.request").setLevel(std_logging.ERROR)
    std_logging.getLogger("django.security.DisallowedHost").addFilter(_one_line)


def _one_line(record: std_logging.LogRecord) -> bool:
    """A wrong name is a mistake of a proxy or a stranger, not a fault of ours that needs a traceback."""
    record.msg, record.args, record.exc_info = "request for another host than public_url's", (), None
    record.levelno, record.levelname = std_logging.WARNING, "WARNING"
    request: HttpRequest = vars(record)["request"]
    record.pam_fields = {"host": request.META.get("HTTP_HOST", "")}
    return True


def _ssl_context(config: Any, default: Any) -> ssl.SSLContext:
    context: ssl.SSLContext = default()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
