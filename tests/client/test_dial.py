"""The one connection to a relay that all local connections share."""

from __future__ import annotations

import socket
import time
from types import SimpleNamespace
from typing import Any

import pytest

from pam_client import dial
from pam_client.dial import Dialer
from pam_common.errors import UnavailableError


class Link:
    """What a kept connection to a relay looks like to a Dialer."""

    def __init__(self, *, heard: bool, active: bool = True) -> None:
        self._heard, self._active = heard, active

    @property
    def heard(self) -> float:
        return time.monotonic() if self._heard else 0.0

    def is_active(self) -> bool:
        return self._active

    def close(self) -> None:
        self._active = False


@pytest.fixture
def dialer() -> Dialer:
    relay = SimpleNamespace(name="r1", host="127.0.0.1", port=1)
    session = SimpleNamespace(id="s-x", gateway="dc1", relays=(relay,))
    grants: Any = SimpleNamespace(current=session, for_use=lambda **_: session)
    return Dialer(grants, time.time, lambda: None)


def kept(dialer: Dialer, monkeypatch: pytest.MonkeyPatch, link: Any) -> list[Any]:
    """``link`` is kept and answers no open; returns those that were made instead of it."""
    made: list[Any] = []

    def connect(_session: Any, _relay: Any) -> Any:
        made.append(Link(heard=True))
        return made[-1]

    def opened(transport: Any, _gateway: str) -> Any:
        if transport is link:
            raise UnavailableError("no channel could be opened: no answer in time")
        return "channel"

    monkeypatch.setattr(dial, "open_direct", opened)
    monkeypatch.setattr(dialer, "_connect", connect)
    dialer._transports["r1"] = link
    return made


def test_a_connection_that_lives_is_not_cut_because_an_agent_does_not_answer(
    dialer: Dialer, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = Link(heard=True)
    made = kept(dialer, monkeypatch, link)
    with pytest.raises(UnavailableError, match="no answer in time"):
        dialer._channel(*_what(dialer))
    assert link.is_active()
    assert not made


@pytest.mark.parametrize("link", [Link(heard=False), Link(heard=True, active=False)])
def test_a_connection_that_is_dead_is_made_anew(
    dialer: Dialer, monkeypatch: pytest.MonkeyPatch, link: Link
) -> None:
    made = kept(dialer, monkeypatch, link)
    assert dialer._channel(*_what(dialer)) == "channel"  # type: ignore[comparison-overlap]
    assert len(made) == 1
    assert not link.is_active()


def test_the_dialer_says_which_relay_does_not_answer(dialer: Dialer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    session, relay = _what(dialer)
    relay.port = port
    with pytest.raises(UnavailableError, match=rf"relay r1 does not answer at 127.0.0.1:{port}: .*refused"):
        dialer._connect(session, relay)


def _what(dialer: Dialer) -> tuple[Any, Any]:
    session: Any = dialer._session
    return session, session.relays[0]
