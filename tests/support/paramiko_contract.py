"""What paramiko looked like when fast_ssh was written against it, function by function.

``python tests/support/paramiko_contract.py`` writes it down anew, after an upgrade that was read.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import paramiko
import paramiko.auth_handler
import paramiko.ed25519key
import paramiko.kex_curve25519
import paramiko.kex_mlkem

FILE = Path(__file__).with_name("paramiko_contract.json")
#: What runs, or is overridden, in a connection of ours.
MODULES: tuple[ModuleType, ...] = (
    paramiko.transport,
    paramiko.packet,
    paramiko.auth_handler,
    paramiko.message,
    paramiko.server,
    paramiko.pkey,
    paramiko.ed25519key,
    paramiko.kex_curve25519,
    paramiko.kex_mlkem,
)


def found() -> dict[str, str]:
    """A digest of every function's source and every plain attribute's value, by name."""
    digests: dict[str, str] = {}
    for module in MODULES:
        for name, value in vars(module).items():
            if getattr(value, "__module__", None) != module.__name__:
                continue
            if inspect.isclass(value) and not issubclass(value, Enum):
                digests |= {f"{name}.{part}": text for part, text in _parts(value)}
            elif inspect.isfunction(value):
                digests[name] = _digest(inspect.getsource(value))
    return digests


def _parts(kind: type) -> Iterator[tuple[str, str]]:
    for name, thing in vars(kind).items():
        function = thing.fget if isinstance(thing, property) else getattr(thing, "__func__", thing)
        if inspect.isfunction(function):
            if function.__code__.co_filename != "<string>":  # what a dataclass makes differs by Python
                yield name, _digest(inspect.getsource(function))
        elif not name.startswith("__"):
            yield name, _digest(_value(thing))


def _value(thing: Any) -> str:
    """As it is, where that is the same in every run."""
    if isinstance(thing, dict):
        return " ".join(sorted(map(str, thing)))
    if isinstance(thing, tuple | list):
        return " ".join(map(_value, thing))
    return repr(thing) if isinstance(thing, str | bytes | int | float | None) else type(thing).__name__


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def differences() -> str:
    """What is not as it was, in words; empty when all is."""
    known = json.loads(FILE.read_text())
    now = found()
    gone = sorted(known["names"].keys() - now.keys())
    new = sorted(now.keys() - known["names"].keys())
    changed = sorted(name for name in now.keys() & known["names"].keys() if now[name] != known["names"][name])
    if paramiko.__version__ == known["version"] and not (gone or new or changed):
        return ""
    told = "".join(
        f"; {what}: {', '.join(names)}"
        for what, names in (("gone", gone), ("changed", changed), ("new", new))
        if names
    )
    return (
        f"paramiko {paramiko.__version__} is not the {known['version']} that fast_ssh was written against"
        f"{told or '; nothing of what it uses has moved'}. Read these, run tests/common, tests/relay and "
        "tests/agent, then pin the version in pyproject.toml and run tests/support/paramiko_contract.py."
    )


def main() -> None:
    known = {"version": paramiko.__version__, "names": dict(sorted(found().items()))}
    FILE.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
