"""The client's bounds that no other test goes past."""

from __future__ import annotations

import io
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pam_client import api, dial, oauth, ports, watch
from pam_client.carry import MAX_SEEN, Carrier
from pam_client.commands import replay as replay_command
from pam_client.dial import Dialer
from pam_client.home import Home
from pam_client.launch import POSTGRES
from pam_client.login import MARGIN, find_login
from pam_client.oauth import Authority
from pam_client.replay import MAX_ROWS, MAX_TEXT, MAX_VALUE, lines
from pam_client.session import _list
from pam_client.watch import Watch
from pam_common.errors import AuthenticationError, PamError, ProtocolError, RefusedError, UnavailableError
from pam_common.stream import SocketStream

STARTUP = bytes.fromhex("0000000d00030000") + b"user\0"


# -- carrying ------------------------------------------------------------------------------------------


def test_a_program_that_says_too_much_hears_no_refusal() -> None:
    """What is kept for a refusal is bounded: beyond it the program sees an end, the person why."""
    said: list[str] = []
    observer = SimpleNamespace(report=lambda message, _hint: said.append(message), far_end=lambda: None)
    program, local = socket.socketpair()
    near, far = socket.socketpair()

    channel = SocketStream(near)  # refuses once its peer has heard all that the program said
    heard = threading.Event()

    def recv(_size: int) -> bytes:
        assert heard.wait(60)
        raise RefusedError("killed")

    channel.recv = recv  # type: ignore[assignment]  # bound once, as the parent does
    carrier = Carrier(1, local, dial=lambda: channel, launch=POSTGRES, observer=observer)  # type: ignore[arg-type]
    thread = threading.Thread(target=carrier.run)
    thread.start()
    sent = STARTUP + bytes(MAX_SEEN)
    program.sendall(sent)
    far.settimeout(60)
    received = 0
    while received < len(sent):
        received += len(far.recv(65536))
    heard.set()
    program.settimeout(60)
    assert program.recv(100) == b""
    thread.join(60)
    assert said == ["killed"]
    for sock in (program, near, far):
        sock.close()


# -- relays, gateways, sessions ------------------------------------------------------------------------


def test_a_relay_that_cannot_be_reached_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dial, "CONNECT_TIMEOUT", 0.1)
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:  # its backlog is full, so a connect to it hangs
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        relay = SimpleNamespace(name="r1", host="127.0.0.1", port=full.getsockname()[1])
        with pytest.raises(UnavailableError, match="timed out"):
            Dialer._connect(SimpleNamespace(), SimpleNamespace(), relay)  # type: ignore[arg-type]
        for filler in fillers:
            filler.close()


def test_a_gateway_that_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dial, "HANDSHAKE_TIMEOUT", 0.1)
    near, far = socket.socketpair()
    session = SimpleNamespace(
        gateway="dc1", keys=SimpleNamespace(noise=bytes(range(32))), grant="grant", id="s-x"
    )
    relay = SimpleNamespace(name="r1")
    with pytest.raises(PamError, match=r"handshake with gateway dc1|did not answer"):
        Dialer._secure(SimpleNamespace(), session, SocketStream(near), relay)  # type: ignore[arg-type]
    far.close()


def test_a_session_names_a_bounded_number_of_relays_and_agents() -> None:
    assert len(_list([{}] * 100)) == 100
    with pytest.raises(ValueError, match="at most 100"):
        _list([{}] * 101)


def test_an_idle_session_that_was_ended_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "POLL", 0.05)
    session = SimpleNamespace(id="s-x", session_end=time.time() + 3600)
    grants = SimpleNamespace(current=session, is_open=lambda: True)
    answers = iter([{"state": "active"}, {"state": "ended", "end_reason": "killed"}])
    watching = Watch(grants, ask=lambda _id: next(answers), now=time.time)  # type: ignore[arg-type]
    watching.start()
    assert watching.ended.wait(60)
    assert watching.reason == "the session was ended: killed"


def test_when_every_port_is_taken_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server((ports.HOST, 0)) as held:
        port = held.getsockname()[1]
        monkeypatch.setattr(ports, "FIRST", port)
        monkeypatch.setattr(ports, "COUNT", 1)
        with pytest.raises(PamError, match=f"no free port between {port} and {port}"):
            ports.listen(Home(tmp_path / "home"), "https://pam.test", "a/b")


# -- logging in ----------------------------------------------------------------------------------------


def test_an_endless_answer_to_a_login_is_not_read(platform: Any) -> None:
    platform.answers["POST", "/o/device/code"] = (200, b'{"x": "' + b"x" * oauth._MAX_ANSWER + b'"}')
    with pytest.raises(PamError):
        Authority(platform.url).start_device()


def test_a_login_is_not_waited_for_as_long_as_the_platform_likes(platform: Any) -> None:
    code = {"device_code": "d", "user_code": "u", "verification_uri": f"{platform.url}/device"}
    platform.answers["POST", "/o/device/code"] = (200, {**code, "expires_in": 10**9, "interval": 10**9})
    started = Authority(platform.url).start_device()
    assert (started.expires_in, started.interval) == (3600, 60)
    platform.answers["POST", "/o/device/code"] = (200, {**code, "expires_in": 600})
    assert Authority(platform.url).start_device().interval == 5


def test_who_does_not_answer_is_asked_at_most_once_a_minute(
    platform: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform.answers["POST", "/o/token"] = (503, {})
    code = oauth.DeviceCode("d", "u", platform.url, platform.url, expires_in=3600, interval=5)
    waits: list[float] = []
    now = [1000.0]

    def wait(seconds: float) -> None:
        waits.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(oauth, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    with pytest.raises(AuthenticationError, match="expired before"):
        Authority(platform.url).wait_for_device(code, wait=wait)
    assert waits[:5] == [5, 10, 20, 40, 60]
    assert max(waits) == 60
    assert sum(waits) <= 3600


def test_a_token_is_renewed_before_its_end(platform: Any, home: Home) -> None:
    answer = {"access_token": "access-2", "refresh_token": "refresh-2", "token_type": "Bearer"}
    platform.answers["POST", "/o/token"] = (200, {**answer, "expires_in": 900})
    for left, expected in ((MARGIN + 30, "access-1"), (MARGIN - 1, "access-2")):
        entry = {"access": "access-1", "expires": time.time() + left, "refresh": "refresh-1"}
        home.write_json("tokens.json", {platform.url: entry})
        assert find_login(home, home.settings(), {}).token() == expected


# -- replay --------------------------------------------------------------------------------------------


def test_what_replay_shows_is_bounded() -> None:
    event = {"t": 1, "c": 1, "kind": "query", "sql": "s" * 50_000, "tag": "v" * 5000}
    event["rows"] = [["r" * 5000]] * (MAX_ROWS + 7)
    shown = list(lines(event))
    text = "\n".join(shown)
    assert text.count("s" * MAX_TEXT) == 1
    assert "s" * (MAX_TEXT + 1) not in text
    assert "v" * MAX_VALUE in text
    assert "v" * (MAX_VALUE + 1) not in text
    assert "r" * (MAX_VALUE + 1) not in text
    assert shown[-1].endswith("… 7 more")
    assert sum("rrr" in line for line in shown) == MAX_ROWS


def test_replay_keeps_no_lunch_break(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(replay_command, "time", SimpleNamespace(sleep=waits.append))
    events = iter([{"t": 1.0}, {"t": 5000.0}, {"t": 5001.0}])
    assert len(list(replay_command._paced(events, 1.0, replay_command._LONGEST_PAUSE))) == 3
    assert waits == [5, 1]


def test_a_part_that_does_not_end_is_not_stored(
    platform: Any, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "MAX_PART", 1000)
    platform.answers["GET", "/api/v1/sessions/s-x/parts/1/raw"] = (200, b"x" * 1001)
    with io.BytesIO() as file, pytest.raises(ProtocolError, match="more than 1000"):
        api.Api.open(home, None).raw_part("s-x", 1, file)
