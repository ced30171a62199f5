"""Very many sessions and tunnels on one relay, in numbers that a CI machine bears.

The full forms: ``PAM_SCALE_SESSIONS=1000 PAM_SCALE_SECONDS=600 PAM_SCALE_TUNNELS=2000`` before
``pytest -s tests/e2e/test_scale.py`` (see docs/performance.md).
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from crowd import Crowd
from fleet import Fleet
from patience import Metronome

SESSIONS = int(os.environ.get("PAM_SCALE_SESSIONS", "200"))
SECONDS = float(os.environ.get("PAM_SCALE_SECONDS", "10"))
TUNNELS = int(os.environ.get("PAM_SCALE_TUNNELS", "200"))
#: KiB of a session, in relay and agent together. 198 were measured; it depends on the C library.
MOST_KIB = 240
#: A query through a crowd on a machine that does other things as well; the point is that it is answered.
PATIENCE = 30.0


@pytest.mark.timeout(SECONDS + 600)
def test_many_sessions_cost_little_and_all_are_answered(tmp_path: Path) -> None:
    with Crowd(tmp_path, SESSIONS) as crowd:
        print(f"{SESSIONS} sessions opened in {crowd.open():.1f} s")
        costs = crowd.costs(20)
        print(costs)
        assert costs["relay"].kib + costs["agent"].kib < MOST_KIB
        assert (costs["relay"].threads, costs["agent"].threads) <= (1, 2)
        assert costs["relay"].descriptors <= 1.1
        assert costs["agent"].descriptors <= 4.1
        assert costs["relay"].core < 0.03
        assert costs["agent"].core < 0.03

        # Twice, since the first queries of a session make it grow: buffers, the compressor's window.
        first = crowd.query(SECONDS / 2)
        before = {name: crowd.uses(name) for name in ("relay", "agent")}
        second = crowd.query(SECONDS / 2)
        after = {name: crowd.uses(name) for name in ("relay", "agent")}
        print(first, second, {name: after[name].kib - before[name].kib for name in after}, sep="\n")
        for answers in (first, second):
            assert not answers.failures
            assert answers.count >= SESSIONS * (SECONDS / 2 - 1) * 0.8
            assert answers.p99 < PATIENCE
        for name, use in after.items():
            assert use.kib < before[name].kib * 1.05 + 4096, name
            assert use.threads <= before[name].threads + 2

        crowd.close()
        end = time.monotonic() + 120
        while any(crowd.uses(name).threads > 40 for name in ("relay", "agent")):
            assert time.monotonic() < end, "threads of closed sessions are left"
            time.sleep(0.2)


@pytest.mark.timeout(1200)
def test_all_tunnels_come_back_after_a_restart_of_the_relay(tmp_path: Path) -> None:
    with Fleet(tmp_path, TUNNELS) as fleet:
        print(f"{TUNNELS} tunnels up in {fleet.wait_up(240)} s")
        # Twice in quick succession: that must not make anybody slow to return.
        for downtime in (1.0, 3.0):
            fleet.restart_relay(downtime)
            with Metronome() as beat:
                seconds = fleet.wait_up(240)
                print(f"all back after {seconds} s")
                assert seconds - beat.lost() < 30
