"""A target behind a jump host: ``sshtunnel`` forwards a private UNIX socket to it.

    TargetLeg ──▶ UNIX socket in a folder of ours ──▶ sshtunnel ──▶ jump host ──▶ target

The jump host is dialled by the agent, so ``allow_targets`` holds for it; the target's address is resolved and
checked here as well, and the jump host is given the address. Both host keys are mandatory. What sshtunnel
loses, the half-close, SSH never uses: the end of one direction is the end of its connection.
"""

from __future__ import annotations

import contextlib
import logging
import re
import socket
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import paramiko
import sshtunnel

from pam_agent.protocols.base import Conversation, Opening, TargetIdentityError, TargetLoginError
from pam_agent.protocols.ssh.hostkeys import ALGORITHMS, parse_line
from pam_agent.protocols.ssh.login import private_key
from pam_agent.protocols.ssh.policy import texts
from pam_common.errors import PamError, ProtocolError, UnavailableError

#: Keepalives to the jump host, as on the other legs.
_KEEPALIVE: Final = 15.0


@contextlib.contextmanager
def through(opening: Opening, conversation: Conversation) -> Iterator[socket.socket]:
    """A connection to the target by way of the jump host that the options name. Raises PamError."""
    jump = opening.options["jump"]
    if not isinstance(jump, dict):
        raise ProtocolError("the opening's jump host is not a mapping")
    host, port, user = _where(jump)
    address = conversation.permitted(opening.target.host, opening.target.port)
    with tempfile.TemporaryDirectory(prefix="pam-jump-") as folder:  # 0700
        path = str(Path(folder) / "target")
        tunnel = _Tunnel(opening.credential.secrets, user, host, port, path, (address, opening.target.port))
        with tunnel.start(jump, conversation), socket.socket(socket.AF_UNIX) as sock:
            try:
                sock.connect(path)
            except OSError as error:
                raise UnavailableError(f"the jump host cannot be used: {error.strerror}") from None
            yield sock


def _where(jump: Mapping[str, Any]) -> tuple[str, int, str]:
    host, port, user = jump.get("host"), jump.get("port", 22), jump.get("user")
    if not (isinstance(host, str) and host and isinstance(user, str) and user):
        raise ProtocolError("the opening's jump host has no host or no user")
    if type(port) is not int or not 1 <= port <= 65535:
        raise ProtocolError("the opening's jump host has no port")
    return host, port, user


class _Tunnel:
    def __init__(
        self, secrets: Mapping[str, str], user: str, host: str, port: int, path: str, target: tuple[str, int]
    ) -> None:
        self._secrets = secrets
        self._user, self._host, self._port = user, host, port
        self._path, self._target = path, target

    @contextlib.contextmanager
    def start(self, jump: Mapping[str, Any], conversation: Conversation) -> Iterator[None]:
        failure: PamError | None = None
        for key in _host_keys(jump):
            heard = _Heard()
            sock = conversation.dial(self._host, self._port)
            forwarder = self._forwarder(_Dialled(sock), key, heard.logger)
            try:
                forwarder.start()
            except sshtunnel.BaseSSHTunnelForwarderError:
                sock.close()
                failure = heard.failure(self._host, self._port)
                if heard.about_keys:
                    continue  # it may have another of the keys that are pinned
                raise failure from None
            try:
                yield
            finally:
                with contextlib.suppress(Exception):  # what it raises then depends on who closed first
                    forwarder.stop(force=True)
                sock.close()
            return
        assert failure is not None
        raise failure

    def _forwarder(self, sock: _Dialled, key: paramiko.PKey, logger: logging.Logger) -> Any:
        pem = self._secrets.get("jump_private_key")
        # Its defaults would look for keys and settings of the agent's own user, and check no host key.
        return sshtunnel.SSHTunnelForwarder(
            (self._host, self._port),
            ssh_config_file=None,
            allow_agent=False,
            host_pkey_directories=[],
            ssh_host_key=key,
            ssh_username=self._user,
            ssh_password=self._secrets.get("jump_password"),
            ssh_pkey=private_key(pem, None) if pem else None,
            ssh_proxy=sock,
            local_bind_address=self._path,
            remote_bind_address=self._target,
            set_keepalive=_KEEPALIVE,
            logger=logger,
        )


def _host_keys(jump: Mapping[str, Any]) -> list[paramiko.PKey]:
    """The pinned keys, one of each kind, best first. Raises ProtocolError when there is none."""
    found: dict[str, paramiko.PKey] = {}
    for line in texts(jump, "host_keys"):
        kind, blob = parse_line(line)
        try:
            found.setdefault(kind, paramiko.PKey.from_type_string(kind, blob))
        except (paramiko.SSHException, ValueError, IndexError):
            raise ProtocolError("the opening's jump host has a host key that cannot be read") from None
    if not found:
        raise ProtocolError("the jump host's host key is not known, and none is learned by connecting")
    return [found[kind] for kind in ALGORITHMS if kind in found]


class _Dialled:
    """A socket that is connected already: sshtunnel would connect a plain one itself, past all rules."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.send, self.recv, self.close = sock.send, sock.recv, sock.close
        self.settimeout, self.shutdown = sock.settimeout, sock.shutdown
        self.getpeername, self.fileno = sock.getpeername, sock.fileno

    def __repr__(self) -> str:
        return "<dialled socket>"


class _Heard(logging.Handler):
    """What sshtunnel says of a failure: it only logs it."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._words: list[str] = []
        self.logger = logging.Logger("pam-jump", logging.ERROR)  # beside the tree: nothing else hears it
        self.logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if len(self._words) < 16:
            self._words.append(record.getMessage())

    @property
    def about_keys(self) -> bool:
        # "Bad host key from server", "no acceptable host key"; "no acceptable ciphers" is another thing.
        return "host key" in " ".join(self._words).lower()

    def failure(self, host: str, port: int) -> PamError:
        text = " ".join(self._words)
        if self.about_keys:
            return TargetIdentityError(
                f"the jump host {host}:{port} shows another host key than it should",
                hint="was it set up anew, or is something else answering?",
            )
        if "authentication" in text.lower() or "could not open connection to gateway" in text.lower():
            return TargetLoginError(f"the jump host {host}:{port} refused the credential")
        unfit = re.search(r"no acceptable [a-z -]+", text)  # paramiko's words about algorithms
        return UnavailableError(
            f"the jump host {host}:{port} cannot be used{f': {unfit[0]}' if unfit else ''}"
        )
