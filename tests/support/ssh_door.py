"""A small SSH server of paramiko's, for ways to log in that an unprivileged sshd cannot check.

It lets in who gives ``PASSWORD`` in the way it was made for; ``exec`` answers with the command.
"""

from __future__ import annotations

import socket
import threading
from typing import Any

import paramiko

PASSWORD = "correct horse battery"


class Door(paramiko.ServerInterface):
    """``way``: password, keyboard-interactive, or both (one after the other)."""

    def __init__(self, way: str, prompts: tuple[tuple[str, bool], ...]) -> None:
        self.way = way
        self.prompts = prompts
        self.given: list[str] = []
        self.hangs_up = False  # after the first command, as some appliances do

    def get_allowed_auths(self, username: str) -> str:
        return self.way

    def check_auth_password(self, username: str, password: str) -> int:
        self.given.append(password)
        good = self.way == "password" and password == PASSWORD
        return paramiko.common.AUTH_SUCCESSFUL if good else paramiko.common.AUTH_FAILED

    def check_auth_interactive(self, username: str, submethods: str) -> Any:
        if self.way != "keyboard-interactive":
            return paramiko.common.AUTH_FAILED
        return paramiko.InteractiveQuery("", "", *self.prompts)

    def check_auth_interactive_response(self, responses: list[str]) -> int:
        self.given += responses
        return paramiko.common.AUTH_SUCCESSFUL if PASSWORD in responses else paramiko.common.AUTH_FAILED

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return paramiko.common.OPEN_SUCCEEDED

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        def answer() -> None:
            channel.sendall(command)
            channel.send_exit_status(3)
            channel.close()
            if self.hangs_up:
                channel.get_transport().close()

        threading.Timer(0.05, answer).start()
        return True


class DoorServer:
    """Serves connections one after the other on a free port."""

    def __init__(
        self, way: str, prompts: tuple[tuple[str, bool], ...] = (("Password: ", False),), key: Any = None
    ) -> None:
        self.key = key or paramiko.ECDSAKey.generate()
        self.door = Door(way, prompts)
        self.user = "door"
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._transports: list[paramiko.Transport] = []
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def host_keys(self) -> list[str]:
        return [f"{self.key.get_name()} {self.key.get_base64()}"]

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            transport = paramiko.Transport(sock)
            transport.add_server_key(self.key)
            self._transports.append(transport)
            try:
                transport.start_server(server=self.door)
            except (paramiko.SSHException, EOFError):
                transport.close()

    def stop(self) -> None:
        self._listener.close()
        for transport in self._transports:
            transport.close()
