"""Which targets may be dialled: the rules, and that what was checked is what is dialled."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from patience import Metronome

from pam_agent import target
from pam_agent.target import TargetRules, parse_rule
from pam_common.errors import RefusedError, UnavailableError


def permits(rules: list[str], host: str, port: int, address: str | None = None) -> bool:
    return TargetRules.parse(rules).permits(host, ipaddress.ip_address(address or host), port)


@pytest.mark.parametrize(
    ("rule", "host", "port", "allowed"),
    [
        ("10.0.0.0/8:5432", "10.1.2.3", 5432, True),
        ("10.0.0.0/8:5432", "10.1.2.3", 5433, False),
        ("10.0.0.0/8:5432", "11.1.2.3", 5432, False),
        ("10.0.0.0/8:*", "10.1.2.3", 1, True),
        ("10.1.2.3:22", "10.1.2.3", 22, True),
        ("[fd00::/8]:5432", "fd12::1", 5432, True),
        ("[fd00::/8]:5432", "fe12::1", 5432, False),
        ("127.0.0.1:5432", "127.0.0.1", 5432, True),
        ("127.0.0.0/8:5432", "127.0.0.2", 5432, True),
        ("[::1]:5432", "::1", 5432, True),
        # A network that merely contains the agent's own host does not open it.
        ("0.0.0.0/0:*", "127.0.0.1", 5432, False),
        ("0.0.0.0/0:*", "0.0.0.0", 5432, False),
        ("0.0.0.0/0:*", "169.254.169.254", 80, False),
        ("0.0.0.0/0:*", "224.0.0.1", 80, False),
        ("126.0.0.0/7:*", "127.0.0.1", 5432, False),
        ("[::/0]:*", "::1", 5432, False),
        ("[::/0]:*", "fe80::1", 5432, False),
        ("169.254.169.254:80", "169.254.169.254", 80, True),
        # The kernel takes a mapped address for the IPv4 one, so the rules do too.
        ("0.0.0.0/0:*", "::ffff:127.0.0.1", 5432, False),
        ("[::/0]:*", "::ffff:127.0.0.1", 5432, False),
        ("127.0.0.1:5432", "::ffff:127.0.0.1", 5432, True),
        ("[::/0]:*", "::ffff:10.0.0.1", 5432, False),
    ],
)
def test_addresses(rule: str, host: str, port: int, allowed: bool) -> None:
    assert permits([rule], host, port) is allowed


@pytest.mark.parametrize(
    ("rule", "host", "address", "allowed"),
    [
        ("db.internal:5432", "db.internal", "10.0.0.5", True),
        ("db.internal:5432", "DB.Internal.", "10.0.0.5", True),
        ("db.internal:5432", "evil.internal", "10.0.0.5", False),
        ("db.internal:5432", "10.0.0.5", "10.0.0.5", False),
        # Rebinding: a listed name never opens the agent's own host.
        ("db.internal:5432", "db.internal", "127.0.0.1", False),
        ("db.internal:5432", "db.internal", "169.254.169.254", False),
        ("db.internal:5432", "db.internal", "::1", False),
        # A name that is not listed is judged by where it leads.
        ("10.0.0.0/8:5432", "anything.example", "10.0.0.5", True),
        ("10.0.0.0/8:5432", "anything.example", "8.8.8.8", False),
    ],
)
def test_names(rule: str, host: str, address: str, allowed: bool) -> None:
    assert permits([rule], host, 5432, address) is allowed


@pytest.mark.parametrize(
    "entry",
    [
        "",
        "10.0.0.1",
        ":5432",
        "10.0.0.1:0",
        "10.0.0.1:65536",
        "10.0.0.1:+1",
        "10.0.0.1: 1",
        "10.0.0.1:٣",
        "10.0.0.0/33:1",
        "10.0.0.1/8:1",  # host bits set: was 10.0.0.1 meant, or the network?
        "::1:5432",
        "[10.0.0.1]:1",
        "[::ffff:10.0.0.1]:1",
        "[fe80::1%eth0]:1",
        "[::1:5432",
        "*:5432",
        "db_.internal$:1",
        "-db:1",
        "0x7f000001:1",
        "db.1:1",
        "127.1:1",
        "2130706433:1",
        "a" * 64 + ":1",
    ],
)
def test_what_is_no_rule(entry: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f'"{entry}": ')):
        parse_rule(entry)


networks = st.one_of(
    st.builds(
        lambda address, prefix: str(ipaddress.ip_network((address, prefix), strict=False)),
        st.integers(0, 2**32 - 1),
        st.integers(0, 32),
    ),
    st.builds(
        lambda address, prefix: f"[{ipaddress.ip_network((address, prefix), strict=False)}]",
        st.integers(2**64, 2**128 - 1),
        st.integers(0, 128),
    ),
)
ports = st.one_of(st.just("*"), st.integers(1, 65535).map(str))


@given(networks, ports)
def test_a_rule_says_what_it_was_read_from(network: str, port: str) -> None:
    rule = parse_rule(f"{network}:{port}")
    assert parse_rule(str(rule)) == rule


@given(st.text(max_size=60))
def test_any_text_is_a_rule_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert parse_rule(str(parse_rule(text))) == parse_rule(text)


@given(networks, st.integers(0, 2**32 - 1), st.integers(1, 65535))
def test_a_permitted_address_lies_in_a_listed_network(network: str, number: int, port: int) -> None:
    address = ipaddress.IPv4Address(number)
    if permits([f"{network}:*"], str(address), port):
        assert address in ipaddress.ip_network(network.strip("[]"))


# -- dialling ------------------------------------------------------------------------------------------


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


LOCAL = TargetRules.parse(["127.0.0.0/8:*"])


def test_dial_gives_a_blocking_socket_without_delay(listener) -> None:
    with target.dial("127.0.0.1", listener.getsockname()[1], LOCAL) as sock:
        assert sock.gettimeout() is None
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_the_name_is_resolved_once_and_the_checked_address_is_dialled(listener, monkeypatch) -> None:
    port = listener.getsockname()[1]
    asked = []

    def rebinding(host, port, **_options):
        asked.append(host)
        address = "127.0.0.1" if len(asked) == 1 else "127.0.0.99"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    with target.dial("db.internal", port, TargetRules.parse(["127.0.0.1:*"])) as sock:
        assert sock.getpeername()[0] == "127.0.0.1"
    assert asked == ["db.internal"]


def test_of_several_addresses_only_permitted_ones_are_dialled(listener, monkeypatch) -> None:
    port = listener.getsockname()[1]
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in ("127.0.0.9", "127.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_options: found)
    with target.dial("db.internal", port, TargetRules.parse(["127.0.0.1:*"])) as sock:
        assert sock.getpeername()[0] == "127.0.0.1"


def test_of_many_addresses_the_first_few_are_dialled_only(listener, monkeypatch) -> None:
    port = listener.getsockname()[1]
    addresses = ["127.0.0.9"] * target.MAX_ADDRESSES + ["127.0.0.1"]
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_options: found)
    with pytest.raises(RefusedError, match="may not dial"):
        target.dial("db.internal", port, TargetRules.parse(["127.0.0.1:*"]))


def test_what_is_not_permitted_is_not_dialled(listener) -> None:
    rules = TargetRules.parse(["10.0.0.0/8:*"])
    with pytest.raises(RefusedError, match="may not dial") as caught:
        target.dial("localhost", listener.getsockname()[1], rules)
    assert "allow_targets" in caught.value.hint
    listener.setblocking(False)
    with pytest.raises(BlockingIOError):
        listener.accept()


@pytest.mark.parametrize("host", ["", "a b", "host\nname", "fe80::1%lo", "-x", "a" * 300, "a/b", "%00"])
def test_what_is_no_host(host: str) -> None:
    with pytest.raises(RefusedError, match="neither"):
        target.dial(host, 5432, LOCAL)


def test_a_closed_port_is_named() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and nobody else is given it meanwhile
        port = closed.getsockname()[1]
        with pytest.raises(UnavailableError, match=f"127.0.0.1:{port} cannot be reached: connection refused"):
            target.dial("127.0.0.1", port, LOCAL)


@pytest.fixture
def full_listener():
    """A port whose backlog is full: a connect to it hangs."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        fillers = []
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(server.getsockname())
            fillers.append(filler)
        yield server.getsockname()[1]
        for filler in fillers:
            filler.close()


def test_a_dial_that_hangs_ends_with_its_session(full_listener) -> None:
    ended = threading.Event()
    threading.Timer(0.3, ended.set).start()
    with Metronome() as beat:
        started = time.monotonic()
        with pytest.raises(RefusedError, match="ended"):
            target.dial("127.0.0.1", full_listener, LOCAL, cancelled=ended.is_set)
        assert time.monotonic() - started - beat.lost() < 1


def test_a_dial_has_a_deadline(full_listener) -> None:
    with pytest.raises(UnavailableError, match="timed out"):
        target.dial("127.0.0.1", full_listener, LOCAL, timeout=0.3)


def test_abuse_11_what_another_host_is_to_dial_is_an_address_that_was_checked(monkeypatch) -> None:
    """A jump host's own resolver would answer as it likes."""
    found = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 22)) for address in ("127.0.0.1", "10.1.2.3")
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_options: found)
    rules = TargetRules.parse(["10.0.0.0/8:22"])
    assert target.permitted("web.internal", 22, rules) == "10.1.2.3"
    with pytest.raises(RefusedError, match="may not dial"):
        target.permitted("web.internal", 23, rules)
    with pytest.raises(RefusedError, match="may not dial"):
        target.permitted("web.internal", 22, TargetRules.parse(["11.0.0.0/8:22"]))
