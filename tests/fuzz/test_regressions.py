"""Every input that is kept, and every seed, through its target; without the fuzzer itself."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent
TARGETS = sorted(path.stem for path in HERE.glob("fuzz_*.py"))


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    # The targets share `material`; the folder is no package, and they are not for anyone else to import.
    monkeypatch.syspath_prepend(str(HERE))
    return importlib.import_module(request.param)


def test_what_once_failed_does_not_fail_again(target: ModuleType) -> None:
    for path in sorted((HERE / "corpus" / target.__name__.removeprefix("fuzz_")).iterdir()):
        try:
            target.TestOneInput(path.read_bytes())
        except BaseException as error:
            error.add_note(f"input: {path.relative_to(HERE)}")
            raise


def test_the_seeds_pass(target: ModuleType) -> None:
    seeds = list(target.seeds())
    assert seeds
    for seed in (b"", b"\0", b"\1" * 60, *seeds):
        target.TestOneInput(seed)


def test_every_corpus_has_its_target() -> None:
    corpora = {path.name for path in (HERE / "corpus").iterdir()}
    assert corpora == {name.removeprefix("fuzz_") for name in TARGETS}


def test_the_targets_need_no_fuzzer() -> None:
    assert "atheris" not in sys.modules
