"""The tables of the bench, and its results for machines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measures import Measure


def table(measures: Sequence[Measure], ways: Sequence[str], ratios: Sequence[str]) -> None:
    """Medians with their extremes, and the chain's ratio to each of ``ratios``."""
    heads = ["", *ways, *(f"chain/{way}" for way in ratios)]
    print(
        "".join(f"{head:>{30 if number else 28}}" for number, head in enumerate(heads[: len(ways) + 1])),
        end="",
    )
    print("".join(f"{head:>18}" for head in heads[len(ways) + 1 :]))
    for measure in measures:
        print(f"{f'{measure.title} ({measure.unit})':<28}", end="")
        print("".join(f"{spread(measure.values[way]):>30}" for way in ways), end="")
        print("".join(f"{measure.ratio('chain', way):>17.2f}×" for way in ratios), "", measure.verdict())


def spread(values: Sequence[float]) -> str:
    """Median and extremes."""
    middle = sorted(values)[len(values) // 2]
    return f"{middle:.4g} [{min(values):.3g}–{max(values):.3g}]"


def costs(cpu: dict[str, dict[str, float]]) -> None:
    print(f"\n{'CPU':<28}{'µs per small query':>20}{'s per GiB of COPY out':>24}")
    for name, spent in cpu.items():
        print(f"{name:<28}{spent['us_per_query']:>20.0f}{spent['s_per_gib']:>24.2f}")


def write(path: Path, options: dict[str, Any], sections: dict[str, Sequence[Measure]], **more: Any) -> None:
    """All values as JSON."""
    measures = {
        section: {m.title: {"unit": m.unit, "aim": m.aim, "values": m.values} for m in rows}
        for section, rows in sections.items()
    }
    path.write_text(json.dumps({"options": options, "measures": measures, **more}, indent=1))
    print(f"\nall values: {path}")
