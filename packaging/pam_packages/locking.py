"""``make lock``: which release of every dependency goes into the packages, with the hash of each file.

All parts are resolved together, so that one host never has two releases of one library. What pip finds for
the oldest Python is the constraint for the others. pip looks at environment markers with the interpreter
that runs it, so the dependencies of each release are gone through once more here, for each Python.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pam_packages.parts import COMMON, COMPONENTS, GLIBC, PARTS, PYTHONS, Part, requirements

#: Published as source only, and of Python alone: its modules are taken from the source archive.
SOURCE_ONLY = frozenset({"sdnotify"})

HEADER = """\
# Made by `make lock` from pyproject.toml; not to be edited. The files are those for CPython {pythons}
# on x86-64 Linux with glibc {glibc} or newer.
"""


@dataclass
class Release:
    """One release of a library: the sha256 of its files for all Pythons, and what it needs on each."""

    name: str
    version: str
    hashes: set[str] = field(default_factory=set)
    needs: dict[str, list[Requirement]] = field(default_factory=dict)


def platforms() -> list[str]:
    """pip's options for every wheel that a host with GLIBC can load."""
    tags = [f"manylinux_{GLIBC[0]}_{minor}_x86_64" for minor in range(GLIBC[1], 4, -1)]
    tags += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]
    return [word for tag in tags for word in ("--platform", tag)]


def pip(*words: str) -> None:
    """Run this interpreter's pip; raises CalledProcessError after it has said why on stderr."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def write_locks() -> None:
    """Resolve anew and write ``packaging/lock/*.txt``."""
    releases = _resolve_all()
    common = _closure(releases, requirements(COMMON))
    contents = {COMMON: common}
    for part in COMPONENTS:
        contents[part] = _closure(releases, requirements(part)) - common
    for part, names in contents.items():
        part.lock.parent.mkdir(exist_ok=True)
        part.lock.write_text(_text(releases[name] for name in sorted(names)))


def read_lock(part: Part) -> list[Release]:
    """The releases that ``part`` carries."""
    found: list[Release] = []
    for line in part.lock.read_text().splitlines():
        words = line.removesuffix("\\").split()
        if not words or words[0].startswith("#"):
            continue
        if words[0].startswith("--hash=sha256:"):
            found[-1].hashes.add(words[0].removeprefix("--hash=sha256:"))
        else:
            name, _, version = words[0].partition("==")
            found.append(Release(name, version))
    return found


def _text(releases: Iterable[Release]) -> str:
    blocks = [HEADER.format(pythons=f"{PYTHONS[0]} to {PYTHONS[-1]}", glibc=".".join(map(str, GLIBC)))]
    for release in releases:
        lines = [f"{release.name}=={release.version}"]
        lines += [f"    --hash=sha256:{digest}" for digest in sorted(release.hashes)]
        blocks.append(" \\\n".join(lines) + "\n")
    return "".join(blocks)


def _resolve_all() -> dict[str, Release]:
    wanted = [text for part in PARTS for text in requirements(part)]
    binary = [text for text in wanted if canonicalize_name(Requirement(text).name) not in SOURCE_ONLY]
    source = sorted(set(wanted) - set(binary))
    releases: dict[str, Release] = {}
    for python in PYTHONS:
        pins = [f"{release.name}=={release.version}" for release in releases.values()]
        _take(releases, python, _report(binary, pins, python, "--only-binary=:all:", *platforms()))
    for python in PYTHONS:
        _take(releases, python, _report(source, [], "", "--no-deps", "--no-binary=:all:"))
    return releases


def _report(wanted: list[str], pins: list[str], python: str, *options: str) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        constraints, report = Path(folder) / "pins.txt", Path(folder) / "report.json"
        constraints.write_text("\n".join(pins))
        target = ["--python-version", python, "--target", folder] if python else []
        pip("install", "--dry-run", "--ignore-installed", "-qq", "--report", str(report),
            "--constraint", str(constraints), *target, *options, *wanted)  # fmt: skip
        installed: list[dict[str, Any]] = json.loads(report.read_text())["install"]
    return installed


def _take(releases: dict[str, Release], python: str, installed: list[dict[str, Any]]) -> None:
    for item in installed:
        name, version = canonicalize_name(item["metadata"]["name"]), item["metadata"]["version"]
        release = releases.setdefault(name, Release(name, version))
        if release.version != version:
            raise SystemExit(f"error: {name} is {release.version} on one Python, {version} on {python}")
        release.hashes.add(item["download_info"]["archive_info"]["hashes"]["sha256"])
        release.needs[python] = [Requirement(text) for text in item["metadata"].get("requires_dist", [])]


def _closure(releases: dict[str, Release], wanted: list[str]) -> set[str]:
    """The names of all that ``wanted`` leads to, on any of the Pythons."""
    found: set[str] = set()
    for python in PYTHONS:
        environment = {name: str(value) for name, value in default_environment().items()}
        environment |= {"python_version": python, "python_full_version": f"{python}.0"}
        seen: set[tuple[str, frozenset[str]]] = set()
        waiting = [Requirement(text) for text in wanted]
        while waiting:
            requirement = waiting.pop()
            name = canonicalize_name(requirement.name)
            key = (name, frozenset(requirement.extras))
            if key in seen:
                continue
            seen.add(key)
            if name not in releases or python not in releases[name].needs:
                raise SystemExit(f"error: {name} is needed on Python {python}; add it to pyproject.toml")
            waiting += [
                need
                for need in releases[name].needs[python]
                if _applies(need, requirement.extras, environment)
            ]
        found |= {name for name, _ in seen}
    return found


def _applies(need: Requirement, extras: set[str], environment: dict[str, str]) -> bool:
    if need.marker is None:
        return True
    return any(need.marker.evaluate(environment | {"extra": extra}) for extra in (*extras, ""))
