"""`make bench`: direct, an OpenSSH double tunnel (aes128-gcm) and the chain, interleaved in one run.

`bare` are three processes in Python that only receive, encrypt and send: about the least a chain can cost.
Absolute times are noise on a shared machine; the ratios are what to read. Exit code 0 unless something
failed: a missed aim is a verdict, not an error. Results: tables on stdout, all values in a JSON file.

    make bench
    .venv/bin/python tests/bench/bench.py --runs 3 --only pgbench --json results.json
    .venv/bin/python tests/bench/bench.py --only web           # a web application alone
    .venv/bin/python tests/bench/bench.py --only ssh           # a Linux server alone
    .venv/bin/python tests/bench/bench.py --profile agent      # where the agent's time goes on small queries
    .venv/bin/python tests/bench/bench.py --soak 20            # minutes of mixed load: failures, growth
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

import measures  # noqa: E402 - after the path, like the others
import report  # noqa: E402
import ssh  # noqa: E402
import web  # noqa: E402
from measures import MIB, Measure  # noqa: E402
from profiles import profile  # noqa: E402
from soak import soak  # noqa: E402
from ways import Bench, Way, running  # noqa: E402

FOLDER = ROOT / ".bench"


def main() -> int:
    options = arguments()
    folder: Path = options.folder
    if folder == FOLDER:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    with contextlib.ExitStack() as cleanup:
        for name in ("stack", "tunnel", "echo-tunnel"):
            cleanup.callback(shutil.rmtree, folder / name, ignore_errors=True)
        if options.profile:
            return profile(folder, options.profile, options.scale, options.seconds)
        if options.only.startswith(("ssh", "web")):
            with_others(options, {}, {})
            return 0
        bench = cleanup.enter_context(running(folder, options.scale))
        if options.soak:
            return soak(bench, folder, options.soak)
        compare(bench, options)
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="interleaved runs per measure (default 5)")
    parser.add_argument("--seconds", type=int, default=3, help="length of each pgbench run (default 3)")
    parser.add_argument("--scale", type=int, default=10, help="pgbench scale (default 10)")
    parser.add_argument("--copy-mib", type=int, default=1024, help="size of a COPY (default 1024)")
    parser.add_argument("--bulk-mib", type=int, default=256, help="size of a bulk transfer (default 256)")
    parser.add_argument("--only", default="", help="measures whose title contains this")
    parser.add_argument(
        "--folder", type=Path, default=FOLDER, help="a new one to work in (default .bench, emptied)"
    )
    parser.add_argument("--json", type=Path, help="where all values go (default results.json in there)")
    parser.add_argument("--profile", choices=("agent", "relay", "client"), help="profile one part instead")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="mixed load instead")
    return parser.parse_args()


def compare(bench: Bench, options: argparse.Namespace) -> None:
    copy, bulk = options.copy_mib * MIB, options.bulk_mib * MIB
    rows = [
        measure
        for measure in measures.of_ways(bench.server, options.seconds, copy, bulk)
        if options.only in measure.title
    ]
    _direct, tunnel, bare, chain = bench.ways
    recording = [bench.unrecorded, bench.rowless, chain]
    costs = [
        measure
        for measure in measures.of_recording(bench.server, options.seconds, copy)
        if options.only in measure.title
    ]
    for run in range(options.runs):
        interleave(run, options.runs, rows, bench.ways)
        interleave(run, options.runs, costs, recording)
    phases = measures.connect_phases(chain)
    cpu = measures.cpu([tunnel, bare, chain], bench.server, options.seconds, copy)
    idle = measures.idle_memory([tunnel, chain])  # the bare one keeps nothing
    print(f"\nmedians of {options.runs} interleaved runs [extremes]; chain: encrypted and recorded\n")
    report.table(rows, [way.name for way in bench.ways], ["direct", "tunnel", "bare"])
    print("\nwhat recording costs\n")
    report.table(costs, [way.name for way in recording], ["unrecorded", "rowless"])
    print("\nconnect to first row, ms: " + ", ".join(f"{name} {ms:.1f}" for name, ms in phases.items()))
    report.costs(cpu)
    print("\nKiB per idle connection: " + ", ".join(f"{name} {kib:.0f}" for name, kib in idle.items()))
    more = {"connect_phases_ms": phases, "cpu": cpu, "idle_kib": idle}
    with_others(options, {"ways": rows, "recording": costs}, more)


def with_others(
    options: argparse.Namespace, sections: dict[str, Sequence[Measure]], more: dict[str, Any]
) -> None:
    """Servers and web applications, which need no database; then write all values, the given ones too."""
    shell, spent = ssh.compare(options.folder / "ssh", options, interleave)
    if shell:
        print("\na Linux server\n")
        report.table(shell, ["direct", "jump", "chain"], ["direct", "jump"])
        print("CPU s per GiB of scp down: " + ", ".join(f"{name} {s:.2f}" for name, s in spent.items()))
    served, requests = web.compare(options.folder / "web", options, interleave)
    if served:
        print("\na web application\n")
        report.table(served, ["direct", "tunnel", "chain"], ["direct", "tunnel"])
    for way, each in requests.items():
        print(f"CPU µs per request, {way}: " + ", ".join(f"{name} {us:.0f}" for name, us in each.items()))
    given = {name: str(value) for name, value in vars(options).items()}
    sections = {**sections, "ssh": shell, "web": served}
    report.write(
        options.json or options.folder / "results.json",
        given,
        sections,
        **more,
        ssh_cpu=spent,
        web_cpu=requests,
    )


def interleave(run: int, runs: int, rows: Sequence[Measure], ways: list[Way]) -> None:
    """Each measure of all ways in a row, another first each time: what disturbs, disturbs all of them."""
    for measure in rows:
        turn = run % len(ways)
        for way in ways[turn:] + ways[:turn]:
            measure.values.setdefault(way.name, []).append(measure.take(way))
        print(f"run {run + 1}/{runs}: {measure.title}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
