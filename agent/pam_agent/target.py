"""Which targets this agent may dial, and the dialling.

The rules are local: whatever the platform asks for, nothing outside ``allow_targets`` is dialled. A name
is resolved once; the address found is checked and that very address is dialled, so a name that changes
its answer between the check and the connect (DNS rebinding) gains nothing.

    10.0.0.0/8:5432      any address of the network, one port
    10.1.2.3:*           one address, any port
    [fd00::/8]:5432      IPv6 in brackets
    db.internal:5432     a name, at whatever address this host's resolver gives for it

Loopback, link-local (cloud metadata lives there), multicast and unspecified addresses are dialled only
when a rule lies inside that range itself: neither ``0.0.0.0/0:*`` nor a name that resolves to 127.0.0.1
opens the agent's own host.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import re
import select
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from pam_common.errors import RefusedError, UnavailableError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

#: A database in the same network answers within milliseconds; ten seconds covers a lost SYN or two.
DIAL_TIMEOUT = 10.0
#: How soon a dial notices that its session has ended.
CANCEL_POLL = 0.1
#: More answers than this for one name is no database.
MAX_ADDRESSES = 8

_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")

#: Ranges that reach the agent's own host or its link: only a rule inside one of them opens it.
_SPECIAL: tuple[Network, ...] = tuple(
    ipaddress.ip_network(text)
    for text in (
        "0.0.0.0/8",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "224.0.0.0/4",
        "255.255.255.255/32",
        "::/128",
        "::1/128",
        "fe80::/10",
        "ff00::/8",
    )
)


@dataclass(frozen=True)
class TargetRule:
    """One entry of ``allow_targets``: a network or a name, and a port (None: any)."""

    network: Network | None
    name: str | None
    port: int | None

    def __str__(self) -> str:
        host = self.name or str(self.network)
        host = f"[{host}]" if ":" in host else host
        return f"{host}:{'*' if self.port is None else self.port}"


class TargetRules:
    """The parsed ``allow_targets``."""

    def __init__(self, rules: Iterable[TargetRule]) -> None:
        self.rules = tuple(rules)

    @classmethod
    def parse(cls, entries: Iterable[str]) -> TargetRules:
        """Raises ValueError naming the first bad entry."""
        return cls(parse_rule(entry) for entry in entries)

    def permits(self, host: str, address: Address, port: int) -> bool:
        """May ``address`` be dialled on ``port``, being what ``host`` (a name or itself) resolved to?"""
        address = _plain(address)
        special = [network for network in _SPECIAL if address in network]
        for rule in self.rules:
            if rule.port not in (None, port):
                continue
            if rule.network is not None:
                if address in rule.network and all(_inside(rule.network, range_) for range_ in special):
                    return True
            elif rule.name == _canonical(host) and not special:
                return True
        return False


def parse_rule(entry: str) -> TargetRule:
    """Parse ``host-or-network:port``. Raises ValueError with words for the person who wrote it."""
    text, separator, port_text = entry.rpartition(":")
    if not separator or not text:
        raise ValueError(f'"{entry}": expected host:port or host:*')
    port = None if port_text == "*" else _port(entry, port_text)
    if text.startswith("[") and text.endswith("]"):
        network = _network(entry, text[1:-1])
        if network.version != 6:
            raise ValueError(f'"{entry}": brackets are for IPv6')
        return TargetRule(network, None, port)
    if ":" in text:
        raise ValueError(f'"{entry}": put IPv6 addresses in brackets, such as [::1]:5432')
    if re.fullmatch(r"[0-9./]+", text):
        return TargetRule(_network(entry, text), None, port)
    name = _canonical(text)
    # A name whose last label is a number (or 0x…) is an address to the resolver, never a name.
    if len(name) > 253 or not _NAME.fullmatch(name) or re.fullmatch(r"[0-9]+|0x.*", name.rsplit(".", 1)[-1]):
        raise ValueError(f'"{entry}": not an address, a network or a host name')
    return TargetRule(None, name, port)


def dial(
    host: str,
    port: int,
    rules: TargetRules,
    *,
    cancelled: Callable[[], bool] = lambda: False,
    timeout: float = DIAL_TIMEOUT,
) -> socket.socket:
    """Connect to ``host:port`` if ``rules`` permit it; the socket is blocking, with TCP_NODELAY.

    Gives up within ``CANCEL_POLL`` once ``cancelled()`` is true. Raises RefusedError (not permitted) and
    UnavailableError (no such name, no answer); both messages are for the user.
    """
    deadline = time.monotonic() + timeout
    failure: OSError = TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
    for family, kind, protocol, _, address in _permitted(host, port, rules):
        sock = socket.socket(family, kind, protocol)
        try:
            _connect(sock, address, deadline, cancelled)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            return sock
        except OSError as error:
            sock.close()
            failure = error
        except BaseException:
            sock.close()
            raise
    reason = (failure.strerror or str(failure)).lower()
    raise UnavailableError(
        f"the target {host}:{port} cannot be reached: {reason}",
        hint="is it running, and does a firewall let the agent's host in?",
    )


def permitted(host: str, port: int, rules: TargetRules) -> str:
    """The first address of ``host`` that ``rules`` permit, for a jump host to dial in our stead.

    Resolved here: a name would be whatever the jump host's resolver makes of it, past the rules. Raises
    RefusedError and UnavailableError as ``dial`` does.
    """
    return str(_address(_permitted(host, port, rules)[0]))


def _permitted(host: str, port: int, rules: TargetRules) -> list[Any]:
    found = _resolve(host, port)
    permitted = [entry for entry in found if rules.permits(host, _address(entry), port)]
    if not permitted:
        where = ", ".join(sorted({str(_address(entry)) for entry in found}))
        raise RefusedError(
            f"the agent may not dial {host}:{port} ({where})",
            hint="an administrator of the agent can add it to allow_targets in agent.yml.",
        )
    return permitted


def _connect(sock: socket.socket, address: Any, deadline: float, cancelled: Callable[[], bool]) -> None:
    """Connect in slices: a connect that waits for a lost SYN cannot be woken otherwise."""
    sock.setblocking(False)
    code = sock.connect_ex(address)
    if code == errno.EINPROGRESS:
        poll = select.poll()
        poll.register(sock, select.POLLOUT)
        while not poll.poll(CANCEL_POLL * 1000):
            if cancelled():
                raise RefusedError("the session has ended")
            if time.monotonic() > deadline:
                raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        raise OSError(code, os.strerror(code))
    sock.setblocking(True)


def _resolve(host: str, port: int) -> list[Any]:
    """``getaddrinfo`` once; the answers are what is checked and what is dialled."""
    if not 1 <= port <= 65535:
        raise RefusedError(f"port {port} is not one that can be dialled")
    if "%" in host or not _is_host(host):
        raise RefusedError("the target's host is neither an address nor a host name")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "not a host name"
        raise UnavailableError(
            f"the agent cannot resolve {host}: {reason.lower()}",
            hint="does the agent's host use the right DNS server?",
        ) from None
    return found[:MAX_ADDRESSES]


def _is_host(host: str) -> bool:
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(host)
        return True
    return len(host) <= 253 and _NAME.fullmatch(_canonical(host)) is not None


def _address(entry: Any) -> Address:
    return _plain(ipaddress.ip_address(entry[4][0].partition("%")[0]))


def _plain(address: Address) -> Address:
    """``::ffff:127.0.0.1`` is 127.0.0.1 to the kernel, so it is to the rules."""
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def _inside(network: Network, range_: Network) -> bool:
    return network.version == range_.version and (
        network.network_address in range_ and network.prefixlen >= range_.prefixlen
    )


def _canonical(name: str) -> str:
    return name.lower().removesuffix(".")


def _network(entry: str, text: str) -> Network:
    if "%" in text:
        raise ValueError(f'"{entry}": a scope has no place in a rule')
    try:
        network = ipaddress.ip_network(text)
    except ValueError as error:
        raise ValueError(f'"{entry}": {error}') from None
    if isinstance(network, ipaddress.IPv6Network) and network.network_address.ipv4_mapped is not None:
        raise ValueError(f'"{entry}": write an IPv4-mapped address as IPv4')
    return network


def _port(entry: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 1 <= int(text) <= 65535:
        raise ValueError(f'"{entry}": expected a port of 1-65535 or *, got "{text}"')
    return int(text)
