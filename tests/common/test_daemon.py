import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pam_common import daemon
from pam_common.daemon import Notifier, StatusSocket, read_status
from pam_common.errors import ProtocolError, UnavailableError


def test_status_answers_over_a_private_socket(tmp_path: Path) -> None:
    server = StatusSocket(tmp_path / "run" / "status.sock", lambda: {"tunnels": 2})
    server.start()
    try:
        assert (tmp_path / "run" / "status.sock").stat().st_mode & 0o777 == 0o600
        assert read_status(tmp_path / "run" / "status.sock") == {"tunnels": 2}
    finally:
        server.stop()
    with pytest.raises(UnavailableError) as caught:
        read_status(tmp_path / "run" / "status.sock")
    assert "running" in caught.value.hint


def test_one_failing_status_does_not_end_the_answers(tmp_path: Path) -> None:
    answers = iter([RuntimeError("once"), {"ok": True}])

    def status() -> dict[str, object]:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    server = StatusSocket(tmp_path / "status.sock", status)
    server.start()
    try:
        with pytest.raises(ProtocolError):
            read_status(tmp_path / "status.sock")
        assert read_status(tmp_path / "status.sock") == {"ok": True}
    finally:
        server.stop()


@pytest.fixture
def answering(tmp_path: Path) -> Iterator[Callable[[bytes], Path]]:
    """A status socket whose answer is given, and which is left open after it."""
    open_ones: list[socket.socket] = []

    def begin(answer: bytes) -> Path:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        open_ones.append(listener)
        listener.bind(str(tmp_path / "status.sock"))
        listener.listen()

        def say() -> None:
            peer, _ = listener.accept()
            open_ones.append(peer)
            with contextlib.suppress(OSError):
                peer.sendall(answer)

        threading.Thread(target=say, daemon=True).start()
        return tmp_path / "status.sock"

    yield begin
    for one in open_ones:
        one.close()


def test_an_endless_status_is_not_read_to_its_end(answering: Callable[[bytes], Path]) -> None:
    path = answering(b"[" + b"1," * daemon.MAX_STATUS)
    with pytest.raises(ProtocolError, match="not a status"):
        read_status(path)


def test_a_daemon_that_says_nothing_is_not_waited_for(
    answering: Callable[[bytes], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon, "STATUS_TIMEOUT", 0.1)
    with pytest.raises(UnavailableError, match="timed out"):
        read_status(answering(b""))


def test_who_asks_and_does_not_read_does_not_keep_others_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon, "STATUS_TIMEOUT", 0.1)
    asked = threading.Event()

    def status() -> dict[str, object]:
        if asked.is_set():
            return {"ok": True}
        asked.set()
        return {"big": "x" * 1_000_000}

    server = StatusSocket(tmp_path / "status.sock", status)
    server.start()
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as deaf:
            deaf.connect(str(tmp_path / "status.sock"))
            assert asked.wait(60)
            monkeypatch.setattr(daemon, "STATUS_TIMEOUT", 60.0)  # for who asks next
            assert read_status(tmp_path / "status.sock") == {"ok": True}
    finally:
        server.stop()


def test_systemd_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "4000000")
        notifier = Notifier()
        notifier.ready()
        notifier.status("1 tunnel")
        notifier.status("1 tunnel")  # said once
        notifier.alive()
        assert [systemd.recv(100) for _ in range(3)] == [b"READY=1", b"STATUS=1 tunnel", b"WATCHDOG=1"]
        assert notifier.watchdog_interval() == 2.0


PROGRAM = """
import json, threading
from pam_common.daemon import Notifier, run_until_signal
from pam_common.errors import PamError
def reload():
    print("reload", flush=True)
    raise PamError("the new file is wrong")
print("up", flush=True)
reason = run_until_signal(reload, healthy=lambda: True, notifier=Notifier(), status=lambda: "fine")
print(json.dumps({"reason": reason}), flush=True)
"""


def test_hangup_reloads_and_a_refused_reload_changes_nothing_and_term_stops() -> None:
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True)
    with process:
        timer = threading.Timer(60, process.kill)
        timer.start()
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        # "up" comes just before the signals are taken over; ask until they are.
        while not (_catches(process.pid, signal.SIGHUP) and _catches(process.pid, signal.SIGTERM)):
            os.sched_yield()
        process.send_signal(signal.SIGHUP)
        assert process.stdout.readline() == "reload\n"
        process.send_signal(signal.SIGTERM)
        assert json.loads(process.stdout.readline()) == {"reason": "SIGTERM"}
        timer.cancel()
    assert process.returncode == 0


def _catches(pid: int, number: int) -> bool:
    caught = int(Path(f"/proc/{pid}/status").read_text().split("SigCgt:\t")[1].split()[0], 16)
    return bool(caught >> (number - 1) & 1)


PASSED = """
import json, os
from pam_common.daemon import passed_sockets
from pam_common.errors import PamError
try:
    found = [[sock.getsockname(), sock.get_inheritable()] for sock in passed_sockets()]
except PamError as error:
    found = str(error)
print(json.dumps([found, len(passed_sockets()), os.environ.get("LISTEN_FDS")]))
"""


def _passed(sock: socket.socket, pid: str = "$$") -> list[object]:
    script = f'exec 3<&{sock.fileno()}; export LISTEN_FDS=1 LISTEN_PID={pid}; exec "$@"'
    words = ["bash", "-c", script, "bash", sys.executable, "-c", PASSED]
    done = subprocess.run(words, pass_fds=[sock.fileno()], capture_output=True, check=True, timeout=60)
    return list(json.loads(done.stdout))


def test_sockets_are_taken_over_from_systemd_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = list(listener.getsockname())
        assert _passed(listener) == [[[address, False]], 0, None]
        assert _passed(listener, pid="1") == [[], 0, None], "meant for another process"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        assert "something else" in str(_passed(other)[0])


def test_a_systemd_that_does_not_read_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon, "NOTIFY_TIMEOUT", 0.01)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        notifier = Notifier()
        for _ in range(100):
            notifier.alive()  # the kernel keeps ten or so
        systemd.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                assert systemd.recv(100) == b"WATCHDOG=1"
        notifier.ready()
        assert systemd.recv(100) == b"READY=1"


def test_systemd_is_asked_for_the_time_that_a_drain_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        Notifier().stopping(330)
        assert systemd.recv(100) == b"STOPPING=1\nEXTEND_TIMEOUT_USEC=330000000"
