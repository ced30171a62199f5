"""The local port of an account: the same from day to day, the next free one while it is taken."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pam_client import ports
from pam_client.home import Home
from pam_common.errors import PamError

PLATFORM, ACCOUNT = "https://pam.test", "prod-db/readonly"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def port_of(listener: socket.socket) -> int:
    return int(listener.getsockname()[1])


@given(platform=st.text(max_size=40), account=st.text(max_size=40))
def test_preferred_port_is_in_range_and_stable(platform: str, account: str) -> None:
    port = ports.preferred(platform, account)
    assert ports.FIRST <= port < ports.FIRST + ports.COUNT
    assert port == ports.preferred(platform, account)


def test_same_port_again(home: Home) -> None:
    with ports.listen(home, PLATFORM, ACCOUNT) as listener:
        first = port_of(listener)
        assert listener.getsockname()[0] == "127.0.0.1"
    with ports.listen(Home(home.folder), PLATFORM, ACCOUNT) as listener:
        assert port_of(listener) == first


def test_next_free_while_taken_and_back_again(home: Home) -> None:
    with ports.listen(home, PLATFORM, ACCOUNT) as first, ports.listen(home, PLATFORM, ACCOUNT) as second:
        own = port_of(first)
        assert port_of(second) != own
    with ports.listen(home, PLATFORM, ACCOUNT) as again:
        assert port_of(again) == own


def test_accounts_do_not_take_each_others_port(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "preferred", lambda platform, account: ports.FIRST + 7)
    with ports.listen(home, PLATFORM, "a/x") as listener:
        first = port_of(listener)
    with ports.listen(home, PLATFORM, "b/x") as listener:
        assert port_of(listener) != first


def test_spoiled_memory_is_no_obstacle(home: Home) -> None:
    home.make()
    for content in (b"{", b"[]", b'{"https://pam.test prod-db/readonly": "x"}'):
        (home.folder / "ports.json").write_bytes(content)
        (home.folder / "ports.json").chmod(0o600)
        with ports.listen(home, PLATFORM, ACCOUNT) as listener:
            assert ports.FIRST <= port_of(listener) < ports.FIRST + ports.COUNT


def test_chosen_port_that_is_taken(home: Home) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(PamError, match="address already in use") as caught,
    ):
        ports.listen_on(port_of(taken))
    assert "--port" in caught.value.hint
