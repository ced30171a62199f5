"""Queries a second with one and with two agents of a gateway, and what each costs in CPU.

    .venv/bin/python tests/bench/agents.py

Sixteen sessions ask as fast as they are answered. The target answers without a database, so agent and relay
are what is measured: on a machine with fewer cores than processes, go by the CPU times.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from crowd import Crowd

SESSIONS = 16
SECONDS = 10.0


def measure(agents: int) -> None:
    with tempfile.TemporaryDirectory(prefix="pam-agents-") as folder:
        with Crowd(Path(folder), SESSIONS, agents=agents) as crowd:
            crowd.open()
            crowd.query(2, every=0)  # caches, buffers
            before = {name: crowd.uses(name).cpu for name in crowd.parts}
            answers = crowd.query(SECONDS, every=0)
            spent = {name: crowd.uses(name).cpu - before[name] for name in crowd.parts}
        assert not answers.failures, answers.failures[:3]
        each = "  ".join(f"{name} {seconds / answers.count * 1e6:.0f}" for name, seconds in spent.items())
        print(
            f"{agents} agents: {answers.count / SECONDS:.0f} queries/s, p50 {answers.p50 * 1e3:.1f} ms,"
            f" p99 {answers.p99 * 1e3:.1f} ms; CPU µs/query: {each}"
        )


def main() -> None:
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    for agents in (1, 2, 1, 2):
        measure(agents)


if __name__ == "__main__":
    main()
