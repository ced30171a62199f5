"""What a connection to a real PostgreSQL keeps while nobody uses it."""

from __future__ import annotations

import time

import psycopg
import pytest

from pam_agent import target_tls
from pam_agent.protocols.base import TlsPolicy
from pam_agent.protocols.postgres import downward
from pam_common.buffer import ReadBuffer

pytestmark = pytest.mark.slow


def until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


class Noting(ReadBuffer):
    """Also knows that it was in use, however soon that is over."""

    filled = False

    def note(self, end: int) -> None:
        super().note(end)
        self.filled = self.filled or self.used


@pytest.fixture
def buffers(monkeypatch) -> list[Noting]:
    """Every buffer that the agent reads a target with."""
    made: list[Noting] = []

    def make(size: int) -> Noting:
        made.append(Noting(size))
        return made[-1]

    for module in (downward, target_tls):
        monkeypatch.setattr(module, "ReadBuffer", make)
    return made


@pytest.mark.parametrize("mode", ["disable", "require"])
def test_postgres_an_idle_connection_gives_its_buffers_back(pg15, make_gate, monkeypatch, buffers, mode):
    monkeypatch.setattr(downward, "IDLE", 1.0)
    gate = make_gate(pg15, tls=TlsPolicy(mode=mode))
    with psycopg.connect(gate.url(), autocommit=True) as connection:
        for _ in range(3):
            assert connection.execute("select repeat('x', 1000000)").fetchone() == ("x" * 1_000_000,)
            assert len(buffers) == (1 if mode == "disable" else 2)
            assert any(buffer.filled for buffer in buffers)
            until(lambda: not any(buffer.used for buffer in buffers))
            for buffer in buffers:
                buffer.filled = False
        assert connection.execute("select 1").fetchone() == (1,)
        time.sleep(0.1)
        assert not any(buffer.filled for buffer in buffers)
