"""Fuzzes one target in this process: ``one.py NAME [libFuzzer options] CORPUS…``. ``run.py`` starts it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import atheris

#: Where coverage is looked for: what is under test, and the libraries that it gives the bytes to.
INSTRUMENTED = [
    "pam_common",
    "pam_agent.protocols",
    "h11",
    "jwt",
    "scramp",
    "wsproto",
    "yaml",
    "cryptography.hazmat.primitives.serialization.ssh",
]


def main() -> None:
    name = sys.argv.pop(1)
    sys.path.insert(0, str(Path(__file__).parent))
    with atheris.instrument_imports(include=INSTRUMENTED):
        target = importlib.import_module(f"fuzz_{name}")
    atheris.Setup(sys.argv, target.TestOneInput)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
