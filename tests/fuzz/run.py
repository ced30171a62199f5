"""Coverage-guided fuzzing of every reader of untrusted bytes: ``make fuzz [MINUTES=10] [TARGET=tokens]``.

Each target is a file ``fuzz_*.py`` here and runs in a process of its own, two at a time. It starts from
``corpus/NAME`` (kept in the repository), what its ``seeds`` makes of real artefacts, and what earlier runs
found in ``.fuzz/NAME``. An input that fails, hangs or takes too much memory is written to ``corpus/NAME``,
where ``test_regressions.py`` replays it for ever; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha1
from pathlib import Path

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
FOUND = HERE.parents[1] / ".fuzz"
TARGETS = sorted(path.stem.removeprefix("fuzz_") for path in HERE.glob("fuzz_*.py"))
#: Seconds for one input. The slowest ones, long texts for the redaction, take one on a busy machine.
TIMEOUT = 20
#: An interpreter with everything loaded takes 100 MiB; a reader that needs ten times that has no bound.
MEMORY_MB = 1024
#: Bytes of one input. More finds nothing sooner: what is long is made long by the targets.
LONGEST = 8192
#: Processor cores in use.
PARALLEL = 2


@dataclass
class Outcome:
    """What a run of one target came to. ``coverage`` counts edges, ``features`` their combinations."""

    name: str
    failed: bool
    executions: int
    coverage: int
    features: int
    log: Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="for each target")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"{', '.join(TARGETS)} (default: all)")
    options = parser.parse_args()
    if unknown := set(options.targets) - set(TARGETS):
        parser.error(f"no such target: {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    if importlib.util.find_spec("atheris") is None:
        parser.error("atheris is not installed; it exists for Linux on x86_64 only")
    names = options.targets or TARGETS
    print(f"==> {len(names)} targets, {options.minutes:g} minutes each, {PARALLEL} at a time", flush=True)
    with ThreadPoolExecutor(PARALLEL) as pool:
        outcomes = list(pool.map(lambda name: _fuzz(name, options.minutes), names))
    failed = [outcome for outcome in outcomes if outcome.failed]
    print(f"==> {sum(outcome.executions for outcome in outcomes)} executions, {len(failed)} failed")
    return 1 if failed else 0


def _fuzz(name: str, minutes: float) -> Outcome:
    found, kept = FOUND / name, CORPUS / name
    for folder in (found, kept):
        folder.mkdir(parents=True, exist_ok=True)
    write_seeds(name, found)
    log = FOUND / f"{name}.log"
    command = [
        sys.executable,
        str(HERE / "one.py"),
        name,
        f"-max_total_time={max(1, round(minutes * 60))}",
        f"-timeout={TIMEOUT}",
        f"-rss_limit_mb={MEMORY_MB}",
        f"-max_len={LONGEST}",
        f"-artifact_prefix={kept}/",
        "-print_final_stats=1",
        "-report_slow_units=10",
        str(found),
        str(kept),
    ]
    with log.open("wb") as file:
        code = subprocess.run(command, stdout=file, stderr=file, env=_environment(), check=False).returncode
    outcome = _outcome(name, code, log)
    _say(outcome)
    return outcome


def write_seeds(name: str, folder: Path) -> None:
    """Write what the target's ``seeds`` makes, each under its digest, so that it is there once."""
    sys.path.insert(0, str(HERE))
    for seed in importlib.import_module(f"fuzz_{name}").seeds():
        (folder / sha1(seed, usedforsecurity=False).hexdigest()).write_bytes(seed)


def _environment() -> dict[str, str]:
    # The same order of sets and dicts in each run: an input that fails once fails again.
    return {**os.environ, "PYTHONHASHSEED": "0"}


def _outcome(name: str, code: int, log: Path) -> Outcome:
    text = log.read_text(errors="replace")
    executions = re.findall(r"number_of_executed_units: (\d+)", text) or re.findall(r"^#(\d+)", text, re.M)
    progress = re.findall(r"cov: (\d+) ft: (\d+)", text)
    coverage, features = progress[-1] if progress else (0, 0)
    return Outcome(
        name, code != 0, int(executions[-1]) if executions else 0, int(coverage), int(features), log
    )


def _say(outcome: Outcome) -> None:
    state = "FAILED" if outcome.failed else "ok"
    print(
        f"{outcome.name:14} {state:7} {outcome.executions:>9} executions  "
        f"{outcome.coverage:>6} edges  {outcome.features:>7} features",
        flush=True,
    )
    if outcome.failed:
        text = outcome.log.read_text(errors="replace")
        print("\n".join(line for line in text.splitlines() if not line.startswith("#"))[-3000:], flush=True)


if __name__ == "__main__":
    sys.exit(main())
