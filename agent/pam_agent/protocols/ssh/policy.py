"""What an account may do over SSH, and how its target is known: the opening's options, checked.

Every list is an allow-list; nothing in it means nothing is allowed. An option that is not understood ends
the session: a rule that is skipped is worse than none.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final

from pam_common.errors import ProtocolError

#: What an account may do, by the words of access.yml.
RIGHTS: Final = frozenset({"shell", "exec", "sftp", "local-forward", "remote-forward"})
DEFAULT_RIGHTS: Final = ("shell", "exec", "sftp")
#: Rules, host keys or names in one list: more were not written by hand.
MAX_ENTRIES: Final = 256
#: What a recording keeps of each transferred file at most, whatever the account's ``transfer_budget``.
MAX_TRANSFER_BUDGET: Final = 16 << 20

_NAME = re.compile(r"[a-z0-9_](?:[a-z0-9_.-]{0,252})")
#: What a resolver takes for an address though it is not written as one: 2130706433, 0x7f.1, 127.1.
_NUMERIC = re.compile(r"[0-9]+|0x.*")


#: RFC 4254, 7.1: what these stand for. A rule for every interface is written as the address.
_BIND_ADDRESSES: Final = {"localhost": "127.0.0.1", "": "0.0.0.0", "*": "0.0.0.0"}  # noqa: S104 - compared only


@dataclass(frozen=True)
class Place:
    """Where a forwarded connection may go to, or a port may be bound: hosts, and a range of ports.

    ``10.0.0.0/8:443``, ``[fd00::1]:*``, ``db.internal:5432``, ``127.0.0.1:8000-8100``, ``*:22``.
    """

    network: ipaddress.IPv4Network | ipaddress.IPv6Network | None
    name: str  #: lower case, ``*`` for every host; empty where there is a network
    ports: range

    @classmethod
    def parse(cls, text: str) -> Place:
        """Raises ProtocolError."""
        host, separator, ports = text.rpartition(":")
        if not separator or not host:
            raise ProtocolError(f"the opening's place {text!r} is not host:port")
        plain = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        network = _network(plain)
        name = "" if network else plain.lower().removesuffix(".")
        if not network and name != "*" and (not _NAME.fullmatch(name) or _is_numeric(name)):
            raise ProtocolError(f"the opening's place {text!r} has no host")
        return cls(network, name, _ports(text, ports))

    def permits(self, host: str, port: int) -> bool:
        """Whether ``host`` as it was asked for, never resolved here, is one of these.

        A name is permitted by that name only: what it resolves to is the target's business. Loopback and
        link-local addresses of the target need a rule that lies within their range.
        """
        if port not in self.ports:
            return False
        address = _address(host)
        if address is None:
            name = host.lower().removesuffix(".")
            return bool(name) and self.name == name and not _is_numeric(name)
        if self.network is None or self.network.version != address.version or address not in self.network:
            return False
        if address.is_unspecified:
            return self.network.num_addresses == 1
        inside = self.network.network_address
        return all(
            getattr(inside, special) or not getattr(address, special)
            for special in ("is_loopback", "is_link_local", "is_multicast")
        )


@dataclass(frozen=True)
class Policy:
    """What an account may do."""

    rights: frozenset[str]
    forward_to: tuple[Place, ...]
    remote_bind: tuple[Place, ...]
    environment: tuple[str, ...]
    transfer_budget: int

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> Policy:
        """``options``: the account's. Raises ProtocolError."""
        rights = frozenset(texts(options, "allow", DEFAULT_RIGHTS))
        if not rights <= RIGHTS:
            raise ProtocolError(f"the opening allows what is not known: {sorted(rights - RIGHTS)}")
        budget = options.get("transfer_budget", 0)
        if type(budget) is not int or not 0 <= budget <= MAX_TRANSFER_BUDGET:
            raise ProtocolError(f"the opening's transfer_budget is not within 0 to {MAX_TRANSFER_BUDGET}")
        return cls(
            rights=rights,
            forward_to=tuple(map(Place.parse, texts(options, "forward_to"))),
            remote_bind=tuple(map(Place.parse, texts(options, "remote_bind"))),
            environment=tuple(texts(options, "env")),
            transfer_budget=budget,
        )

    def may_forward(self, host: str, port: int) -> bool:
        """May the target be asked to connect to ``host:port``?"""
        allowed = "local-forward" in self.rights
        return allowed and any(place.permits(host, port) for place in self.forward_to)

    def may_bind(self, address: str, port: int) -> bool:
        """May the target be asked to listen there? Port 0, any, is only for ``…:*``."""
        if "remote-forward" not in self.rights:
            return False
        host = _BIND_ADDRESSES.get(address, address)
        if port == 0:
            return any(1 in place.ports and 65535 in place.ports and place.permits(host, 1)
                       for place in self.remote_bind)  # fmt: skip
        return any(place.permits(host, port) for place in self.remote_bind)

    def may_set(self, variable: str) -> bool:
        """May the environment's ``variable`` reach the target?"""
        return any(fnmatchcase(variable, pattern) for pattern in self.environment)


def texts(options: Mapping[str, Any], name: str, default: Sequence[str] = ()) -> Sequence[str]:
    """A list of texts, or ``default``. Raises ProtocolError for anything else."""
    value = options.get(name)
    if value is None:
        return default
    if not isinstance(value, list) or len(value) > MAX_ENTRIES:
        raise ProtocolError(f"the opening's {name} is not a list of at most {MAX_ENTRIES}")
    if not all(isinstance(item, str) and item for item in value):
        raise ProtocolError(f"the opening's {name} does not hold texts")
    return value


def _ports(text: str, ports: str) -> range:
    if ports == "*":
        return range(1, 65536)
    if not re.fullmatch(r"[0-9]{1,5}(-[0-9]{1,5})?", ports):
        raise ProtocolError(f"the opening's place {text!r} has no ports")
    first, _, last = ports.partition("-")
    found = range(int(first), int(last or first) + 1)
    if not found or found[0] < 1 or found[-1] > 65535:
        raise ProtocolError(f"the opening's place {text!r} has no ports")
    return found


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(text)
    except ValueError:
        return None


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that ``host`` is, mapped ones as what the kernel makes of them."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None:
            return None
        return address.ipv4_mapped or address
    return address


def _is_numeric(name: str) -> bool:
    return _NUMERIC.fullmatch(name.rsplit(".", 1)[-1]) is not None
