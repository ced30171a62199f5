"""Reading a server's SSH host keys, when an administrator asks for it through the inbox.

One key exchange per type of key, since a server shows one at a time. Nothing is logged in to: the connection
ends when the server has proved to hold the key. ``allow_targets`` holds here as for any session.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Final

import paramiko

from pam_agent.api import AgentApi
from pam_agent.inbox import Message
from pam_agent.target import TargetRules, dial
from pam_common.errors import PamError, UnavailableError
from pam_common.logging import get_logger, kv
from pam_common.secure_channel import deadline
from pam_common.stream import SocketStream

log = get_logger("agent.scan")

#: A type of key, and the signatures by which a server shows it. The other sizes of ECDSA are hardly found.
TYPES: Final = (
    ("ssh-ed25519",),
    ("ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521"),
    ("rsa-sha2-512", "rsa-sha2-256"),
)
#: Identification and key exchange with one server; old ones take seconds.
EXCHANGE_TIMEOUT = 15.0
#: Scans at a time: people ask for them, one after the other.
MAX_SCANS = 4
#: What the platform takes of a failure's reason.
MAX_ERROR = 300


class Scans:
    """Carries out the inbox's ``scan`` messages, each in a thread of its own."""

    def __init__(self, api: AgentApi, rules: Callable[[], TargetRules]) -> None:
        self._api = api
        self._rules = rules
        self._slots = threading.BoundedSemaphore(MAX_SCANS)

    def start(self, message: Message) -> None:
        """Begin one; never blocks. One too many is left out: its administrator will ask again."""
        if not self._slots.acquire(blocking=False):
            log.warning("scan left out", extra=kv(scan=message.scan, reason="too many at once"))
            return
        threading.Thread(
            target=self._run, args=(message,), name=f"scan-{message.scan[:8]}", daemon=True
        ).start()

    def _run(self, message: Message) -> None:
        try:
            self._report(message, read_keys(message.host, message.port, self._rules()), "")
        except PamError as error:
            self._report(message, [], str(error))
        except Exception:
            log.exception("scan failed", extra=kv(scan=message.scan))
            self._report(message, [], "the agent failed to read the keys")
        finally:
            self._slots.release()

    def _report(self, message: Message, keys: list[str], error: str) -> None:
        shown = "".join(char if char.isprintable() else "?" for char in error)[:MAX_ERROR]
        fields = {"scan": message.scan, "host": message.host, "port": message.port}
        log.info("host keys read", extra=kv(**fields, keys=len(keys), error=shown))
        try:
            self._api.scanned(message.scan, keys, shown)
        except PamError as problem:
            log.warning("scan not reported", extra=kv(scan=message.scan, reason=str(problem)))


def read_keys(host: str, port: int, rules: TargetRules) -> list[str]:
    """The host keys that the server shows, as lines, one per type that it has.

    Raises RefusedError (not allowed here) and UnavailableError (nobody answers, or not in SSH).
    """
    found = [line for types in TYPES if (line := _read_key(host, port, rules, types)) is not None]
    if not found:
        raise UnavailableError("the server shows no host key of a type that is known here")
    return found


def _read_key(host: str, port: int, rules: TargetRules, types: tuple[str, ...]) -> str | None:
    # Not only paramiko's own timeout: a server that trickles would renew that with every byte.
    with (
        contextlib.closing(dial(host, port, rules)) as sock,
        deadline(SocketStream(sock), EXCHANGE_TIMEOUT, "no SSH key exchange: it"),
    ):
        return _exchange(sock, types)


def _exchange(sock: object, types: tuple[str, ...]) -> str | None:
    transport: paramiko.Transport | None = None
    try:
        transport = paramiko.Transport(sock)  # type: ignore[arg-type]  # a socket, as its documentation says
        transport.get_security_options().key_types = types
        transport.start_client(timeout=EXCHANGE_TIMEOUT)
        key = transport.get_remote_server_key()
        return f"{key.get_name()} {key.get_base64()}"
    except paramiko.ssh_exception.IncompatiblePeer:
        return None  # it has no key of this type
    except (paramiko.SSHException, OSError, EOFError) as error:
        raise UnavailableError(f"no SSH key exchange: {error or type(error).__name__}") from None
    finally:
        if transport is not None:
            transport.close()
