"""How SSH's programs are told where the listener is."""

from __future__ import annotations

import shlex
from pathlib import Path

from pam_client.home import Home
from pam_client.launch.base import Launch
from pam_client.session import Session
from pam_client.ssh import known_hosts, native
from pam_client.ssh.refusal import HEAD, SshRefusal, starts_ssh


def _trust(home: Home, platform: str, session: Session) -> Path:
    return known_hosts.write(home, platform, session.interceptor_host_ca)


def _socket_port(name: str) -> int | None:
    number = name.removeprefix(_SOCKET_PREFIX)
    return int(number) if number != name and number.isdecimal() and 0 < int(number) < 65536 else None


_SOCKET_PREFIX = ".s.SSH."

SSH = Launch(
    program="ssh",
    # A COMMAND is run by the server; what it finds there is not ours to set.
    variables=lambda place: {},
    removed=frozenset(),
    usage=lambda place: shlex.join(native.call(place)),
    socket_name=lambda port: f"{_SOCKET_PREFIX}{port}",
    socket_port=_socket_port,
    default_port=22,
    head=HEAD,
    accepts=starts_ssh,
    refusal=SshRefusal,
    trust=_trust,
    native=native.run,
)
