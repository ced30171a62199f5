"""The bounds of witness, uploader and receipts, against a platform that says nothing or no."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest

from pam_agent import receipts as receipts_module
from pam_agent import uploader as uploader_module
from pam_agent import witness as witness_module
from pam_agent.receipts import Receipts
from pam_agent.uploader import Uploader
from pam_agent.witness import Witness
from pam_common.errors import RefusedError, UnavailableError
from pam_common.keys import new_session_id
from pam_common.platform_client import PlatformClient
from pam_common.recording.format import HASH_SIZE, Head


def head(session: str | None = None) -> Head:
    return Head(session or new_session_id(), 1, 3, 900, bytes(HASH_SIZE), 1_900_000_000, signature=bytes(64))


class Script:
    """A platform whose posts do what ``post`` does; ``waits`` are the timeouts it was given."""

    def __init__(self, post: Any) -> None:
        self.waits: list[float] = []
        self._post = post

    def post(self, path: str, *, timeout: float, **_rest: object) -> object:
        self.waits.append(timeout)
        return self._post()


@pytest.fixture
def silent_url() -> Any:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        yield f"http://127.0.0.1:{silent.getsockname()[1]}"


def test_a_head_is_not_posted_for_ever(silent_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(witness_module, "POST_TIMEOUT", 0.1)
    assert Witness(PlatformClient(silent_url))._post(head()) is False


def test_a_final_head_is_not_waited_for_for_ever(
    silent_url: str, spool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploader_module, "FINAL_TIMEOUT", 0.1)
    with pytest.raises(UnavailableError, match="timed out"):
        Uploader(spool, PlatformClient(silent_url))._close("/agent/recordings/x/1", head())


def test_waits_grow_to_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    def away() -> None:
        raise UnavailableError("away")

    waits: list[float] = []
    witness = Witness(Script(away))  # type: ignore[arg-type]
    condition = witness._condition

    class Noting:
        """The condition, whose timed waits are noted and not waited for."""

        def __enter__(self) -> None:
            condition.acquire()

        def __exit__(self, *_error: object) -> None:
            condition.release()

        def notify_all(self) -> None:
            """Nobody waits."""

        def wait_for(self, _predicate: object, timeout: float | None = None) -> None:
            if timeout is not None:
                waits.append(timeout)
                witness._stopping = len(waits) == 20

    witness._condition = Noting()  # type: ignore[assignment]
    witness.offer(head())
    witness._run()
    assert 0.5 <= waits[0] <= witness_module.FIRST_WAIT
    assert max(waits) <= witness_module.LONGEST_WAIT
    assert min(waits[-5:]) >= witness_module.LONGEST_WAIT / 2


def test_refusals_noted_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RefusedError("no")

    monkeypatch.setattr(witness_module, "MAX_NOTED", 3)
    witness = Witness(Script(refuse))  # type: ignore[arg-type]
    for _ in range(10):
        assert witness._post(head()) is True
        assert len(witness._refused) <= 3


def test_receipts_are_asked_for_again_after_their_time(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = threading.Semaphore(0)
    platform = Script(lambda: asked.release() or {"lost": []})
    platform.post = lambda *_args, **_rest: platform._post()  # type: ignore[method-assign]
    now = [1000.0]
    monkeypatch.setattr(receipts_module.time, "monotonic", lambda: now[0])
    receipts = Receipts(tmp_path / "receipts", platform)  # type: ignore[arg-type]
    receipts.add(head())
    receipts.check()
    assert asked.acquire(blocking=False)
    now[0] += receipts_module.CHECK_INTERVAL - 1
    receipts.check()
    assert not asked.acquire(blocking=False)
    now[0] += 2
    receipts.check()
    assert asked.acquire(blocking=False)
