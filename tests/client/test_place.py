"""Where connect listens, also on systems that do not tell who connects to a TCP port."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pam_client import place
from pam_client.home import Home
from pam_client.launch import launch_for
from pam_common.errors import PamError

LAUNCH = launch_for("postgres")
LONG = "-".join(["production"] * 5) + "/" + "-".join(["readonly"] * 6)


@pytest.fixture
def home() -> Iterator[Home]:
    """Of a person's length: pytest's own folders take most of what a socket's path may have."""
    with tempfile.TemporaryDirectory(prefix="home-") as folder:
        made = Home(Path(folder))
        made.make()
        yield made


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS."""
    monkeypatch.setattr(place, "has_peer_check", lambda: False)


def listening(home: Home, account: str, wish: place.Wish | None = None) -> Any:
    session: Any = SimpleNamespace(account=account, user="me", database=None, gateway="dc1")
    return place.listening(home, "https://pam.test", session, LAUNCH, wish or place.Wish())


def test_a_tcp_port_is_refused_where_it_cannot_be_protected(elsewhere: None) -> None:
    with pytest.raises(PamError, match="other users could use it"):
        place.check(place.Wish(port=5432))
    place.check(place.Wish())


@pytest.mark.parametrize("account", ["prod-db/readonly", LONG])
def test_there_a_private_unix_socket_is_the_default(elsewhere: None, home: Home, account: str) -> None:
    with listening(home, account) as ((sock,), at):
        assert sock.family == socket.AF_UNIX
        path = sock.getsockname()
        assert path == f"{at.host}/.s.PGSQL.{at.port}"
        assert len(path) <= place.MAX_SOCKET_PATH
        sock.close()
    with listening(home, account) as ((sock,), again):
        assert again == at, "the same from day to day"
        sock.close()


def test_accounts_that_look_alike_have_folders_of_their_own(elsewhere: None, home: Home) -> None:
    with listening(home, "a-b/c") as ((one,), first), listening(home, "a/b-c") as ((two,), second):
        assert first.host != second.host
        one.close()
        two.close()
