"""The agent's SSH server in small, for tests of the client: runs commands here, with streams and exit codes.

Speaks over any stream (a SecureChannel), shows a host certificate, lets in "none", and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import pty
import socket
import struct
import subprocess
import termios
import threading
from fcntl import ioctl
from typing import Any

import paramiko
from paramiko.common import AUTH_FAILED, AUTH_SUCCESSFUL, OPEN_SUCCEEDED

from pam_common.ssh_certs import CERT_TYPE, CertificateKey


class _Transport(paramiko.Transport):
    @property
    def preferred_keys(self) -> tuple[str, ...]:
        return (CERT_TYPE,)


class _Server(paramiko.ServerInterface):
    def __init__(self, login: bool) -> None:
        self.login = login
        self.user = ""
        self.size = (80, 24)
        self.terminal: dict[int, bool] = {}
        self.master = -1

    def check_auth_none(self, username: str) -> int:
        self.user = username
        return AUTH_SUCCESSFUL if self.login else AUTH_FAILED

    def get_allowed_auths(self, username: str) -> str:
        return "none" if self.login else "publickey"

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return OPEN_SUCCEEDED

    def check_channel_pty_request(self, channel: Any, term: Any, width: int, height: int, *_: Any) -> bool:
        self.size, self.terminal[channel.get_id()] = (width, height), True
        return True

    def check_channel_window_change_request(self, channel: Any, width: int, height: int, *_: Any) -> bool:
        ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        return True

    def check_channel_env_request(self, *_: Any) -> bool:
        return True

    def check_channel_shell_request(self, channel: Any) -> bool:
        return self.check_channel_exec_request(channel, b"exec sh -i")

    def check_channel_exec_request(self, channel: Any, command: bytes) -> bool:
        threading.Thread(target=self._run, args=(channel, command), daemon=True).start()
        return True

    def _run(self, channel: Any, command: bytes) -> None:
        if self.terminal.get(channel.get_id()):
            code = self._run_in_terminal(channel, command)
        else:
            code = self._run_in_pipes(channel, command)
        with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
            channel.send_exit_status(code if code >= 0 else 128 - code)
        channel.close()

    def _run_in_pipes(self, channel: Any, command: bytes) -> int:
        pipe = subprocess.PIPE
        child = subprocess.Popen(["sh", "-c", command], stdin=pipe, stdout=pipe, stderr=pipe)
        assert child.stdin
        assert child.stdout
        assert child.stderr
        feed = threading.Thread(target=_feed, args=(channel, child.stdin), daemon=True)
        feed.start()
        errors = threading.Thread(target=_drain, args=(child.stderr.fileno(), channel.sendall_stderr))
        errors.start()
        _drain(child.stdout.fileno(), channel.sendall)
        errors.join()
        return child.wait()

    def _run_in_terminal(self, channel: Any, command: bytes) -> int:
        self.master, slave = pty.openpty()
        ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", self.size[1], self.size[0], 0, 0))
        child = subprocess.Popen(
            ["setsid", "-c", "sh", "-c", command],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, "PS1": "$ "},
        )
        os.close(slave)

        def up() -> None:
            with contextlib.suppress(OSError):
                while data := channel.recv(4096):
                    os.write(self.master, data)

        threading.Thread(target=up, daemon=True).start()
        _drain(self.master, channel.sendall)
        return child.wait()


def _feed(channel: Any, sink: Any) -> None:
    with contextlib.suppress(OSError):
        while data := channel.recv(65536):
            sink.write(data)
            sink.flush()
    with contextlib.suppress(OSError):
        sink.close()


def _drain(source: int, send: Any) -> None:
    with contextlib.suppress(OSError):
        while data := os.read(source, 65536):
            send(data)


def serve(stream: Any, host_key: CertificateKey, *, login: bool = True) -> None:
    """Serve one SSH connection on ``stream`` to its end. ``login`` False: nobody gets in."""
    ours, theirs = socket.socketpair()
    transport = _Transport(ours)
    transport.add_server_key(host_key)
    transport.start_server(event=threading.Event(), server=_Server(login))

    def up() -> None:
        with contextlib.suppress(Exception):  # however the stream ends, the connection does
            while data := stream.recv(65536):
                theirs.sendall(data)
        with contextlib.suppress(OSError):
            theirs.shutdown(socket.SHUT_RDWR)

    with contextlib.suppress(OSError):
        data = theirs.recv(65536)  # the identification, before the other side's end can close its socket
        threading.Thread(target=up, daemon=True).start()
        while data:
            stream.sendall(data)
            data = theirs.recv(65536)
    stream.shutdown(socket.SHUT_WR)
    transport.close()
    theirs.close()
