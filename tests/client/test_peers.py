"""Abuse case 27: other users of the workstation use the local listener."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import wait_for

from pam_client import peers
from pam_client.launch import POSTGRES
from pam_client.listener import Listener
from pam_common.stream import SocketStream

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists the owners of TCP sockets")

OTHER_UID = 65534

CONNECT = """
import os, socket, sys
if sys.argv[3] != "-": os.setuid(int(sys.argv[3]))
s = socket.socket(getattr(socket, sys.argv[1]), socket.SOCK_STREAM)
s.connect(eval(sys.argv[2]))
s.sendall(bytes.fromhex("0000000d00030000") + b"user\\0")
print(s.recv(100).hex(), flush=True)
sys.stdin.read()
"""

Accepted = Callable[[str, str, str], tuple[socket.socket, socket.socket]]


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made


@pytest.fixture
def connect() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """A process of its own that connects, as ``uid`` if given."""
    started = []

    def connect(family: str, address: object, uid: int | None = None) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", CONNECT, family, repr(address), "-" if uid is None else str(uid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        started.append(process)
        return process

    yield connect
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("family", ["AF_INET", "AF_INET6"])
def test_own_process_is_found(listener: socket.socket, connect: Callable[..., object], family: str) -> None:
    port = listener.getsockname()[1]
    connect(family, ("127.0.0.1" if family == "AF_INET" else "::ffff:127.0.0.1", port))
    accepted, _ = listener.accept()
    with accepted:
        assert peers.tcp_peer_uid(accepted) == os.geteuid()
        assert peers.is_own(accepted)


@pytest.mark.parametrize(
    "uid",
    [
        None,
        pytest.param(
            OTHER_UID,
            marks=pytest.mark.skipif(
                os.geteuid() != 0, reason="only root can start a process of another user"
            ),
        ),
    ],
)
def test_over_ipv6_the_user_is_found_too(connect: Callable[..., object], uid: int | None) -> None:
    with socket.socket(socket.AF_INET6) as listener:
        listener.bind(("::1", 0))
        listener.listen()
        connect("AF_INET6", listener.getsockname()[:2], uid)
        accepted, _ = listener.accept()
        with accepted:
            assert peers.tcp_peer_uid(accepted) == (os.geteuid() if uid is None else uid)
            assert peers.is_own(accepted) == (uid is None)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a process of another user")
def test_other_user_is_refused(listener: socket.socket, connect: Callable[..., object]) -> None:
    connect("AF_INET", listener.getsockname(), OTHER_UID)
    accepted, _ = listener.accept()
    with accepted:
        assert peers.tcp_peer_uid(accepted) == OTHER_UID
        assert not peers.is_own(accepted)


def test_root_is_refused_by_another_user(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody but the user: also root's processes may be someone else's doing."""
    with socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        monkeypatch.setattr(os, "geteuid", lambda: 4711)
        assert not peers.is_own(accepted)
        accepted.close()


def test_gone_peer_is_refused(listener: socket.socket) -> None:
    program = socket.create_connection(listener.getsockname())
    accepted, _ = listener.accept()
    program.close()
    with accepted:
        assert not peers.is_own(accepted)


def test_unix_peer(connect: Callable[..., object], tmp_path: object) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(f"{tmp_path}/s")
        made.listen()
        connect("AF_UNIX", f"{tmp_path}/s")
        accepted, _ = made.accept()
        with accepted:
            assert peers.is_own(accepted)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a process of another user")
def test_listener_serves_own_user_only(connect: Callable[..., subprocess.Popen[str]]) -> None:
    said: list[str] = []
    dials: list[str] = []
    made = socket.create_server(("127.0.0.1", 0))
    address = made.getsockname()

    def dial() -> SocketStream:
        dials.append(threading.current_thread().name)
        near, far = socket.socketpair()
        threading.Thread(target=lambda: far.sendall(far.recv(100)), daemon=True).start()
        return SocketStream(near)

    class Heard:
        def report(self, message: str, hint: str) -> None:
            said.append(message)

        def far_end(self) -> None: ...

    listener = Listener([made], dial=dial, launch=POSTGRES, observer=Heard(), session="s-x")
    listener.start()
    try:
        other = connect("AF_INET", address, OTHER_UID)
        assert other.stdout is not None
        assert other.stdout.readline().strip() == ""  # it heard nothing, or was reset
        assert dials == []
        wait_for(lambda: bool(said), "the report")  # which may come after the reset
        assert said == ["a connection that is not of this user was refused"]
        own = connect("AF_INET", address)
        assert own.stdout is not None
        assert own.stdout.readline().strip().startswith("0000000d")
        assert len(dials) == 1
    finally:
        listener.stop(1)


ROW = "   0: {} {} 01 00000000:00000000 00:00000000 00000000  {} 0 {} 1 0000000000000000 20 0 0 10 -1\n"


@given(
    port=st.integers(1, 65535),
    ours=st.integers(1, 65535),
    uid=st.integers(0, 2**32 - 2),
    v6=st.booleans(),
    noise=st.lists(st.binary(max_size=80), max_size=5),
)
def test_row_is_found_among_others(port: int, ours: int, uid: int, v6: bool, noise: list[bytes]) -> None:
    program, listener = ("127.0.0.1", port), ("127.0.0.1", ours)
    here = peers.encode(*program, v6=v6).decode()
    there = peers.encode(*listener, v6=v6).decode()
    rows = [*noise, ROW.format(there, here, 1, 11).encode(), ROW.format(here, there, uid, 12).encode()]
    expected = 1 if port == ours else uid
    assert peers.find_owner(rows, local=program, remote=listener) == expected
    orphan = ROW.format(here, there, 0, 0).encode()
    assert peers.find_owner([orphan], local=program, remote=listener) is None


def test_addresses_as_the_kernel_prints_them() -> None:
    if sys.byteorder != "little":
        pytest.skip("the example is from a little-endian machine")
    assert peers.encode("127.0.0.1", 5432, v6=False) == b"0100007F:1538"
    assert peers.encode("127.0.0.1", 5432, v6=True) == b"0000000000000000FFFF00000100007F:1538"
    assert peers.encode("::1", 5432, v6=True) == b"00000000000000000000000001000000:1538"
