"""What failed once may pass alone; what fails twice, or with many others, has failed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

AGAIN = Path(__file__).parent / "again.py"
ONCE = """
from pathlib import Path
import pytest

@pytest.mark.parametrize("number", range({failures}))
def test_late(number):
    seen = Path(f"seen-{{number}}")
    before, _ = seen.exists(), seen.touch()
    assert before

def test_well():
    Path("well").open("a").write("x")
"""


def run(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_it.py").write_text(text)
    command = [sys.executable, AGAIN, "2", "--", sys.executable, "-m", "pytest", "-q", "-p", "no:xdist"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_what_failed_once_passes_and_is_named(tmp_path: Path) -> None:
    done = run(tmp_path, ONCE.format(failures=2))
    assert done.returncode == 0, done.stdout
    assert "FLAKY, to be mended:\n    test_it.py::test_late[0]\n    test_it.py::test_late[1]" in done.stdout
    assert (tmp_path / "well").read_text() == "x", "only what failed ran again"


@pytest.mark.parametrize(
    "text",
    [
        ONCE.format(failures=3),
        "def test_it():\n    assert False\n",
        "def broken(:\n",
        "import nothing_of_that\n",
    ],
    ids=["many", "twice", "syntax", "import"],
)
def test_a_failure_is_one(tmp_path: Path, text: str) -> None:
    done = run(tmp_path, text)
    assert done.returncode != 0
    assert "FLAKY" not in done.stdout


def test_nothing_is_run_again_when_all_is_well(tmp_path: Path) -> None:
    assert run(tmp_path, ONCE.format(failures=0)).returncode == 0
    assert (tmp_path / "well").read_text() == "x"
