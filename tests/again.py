"""``again.py MOST -- pytest …``: runs pytest; if at most MOST tests failed, those once more, alone.

For the shared machines of CI, where a pause of some seconds can make one of six thousand tests late. What
then passes is still a bug, of the test or of the product: it is named at the end, its failure is shown above.
Exit code: 0 when everything passed, if need be at the second time, else pytest's own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

#: Where pytest notes what failed.
NOTE = Path(".pytest_cache/v/cache/lastfailed")
TESTS_FAILED = 1


def main(most: int, command: list[str]) -> int:
    NOTE.unlink(missing_ok=True)
    code = subprocess.run(command, check=False).returncode
    failed = sorted(json.loads(NOTE.read_text())) if NOTE.exists() else []
    if code != TESTS_FAILED or not 0 < len(failed) <= most:
        return code
    print(f"==> {len(failed)} failed; once more, alone:", *failed, sep="\n    ", flush=True)
    program = command[: command.index("pytest") + 1]
    code = subprocess.run([*program, "-q", *failed], check=False).returncode
    if code == 0:
        print("==> FLAKY, to be mended:", *failed, sep="\n    ", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[3:]))
