"""The locked dependencies: fetched into a cache by pip, checked by hash, unpacked into one tree.

One tree serves all Pythons: extension modules carry the version in their names or are abi3, and everything
else is the same in each wheel of a release. Where it is not, the build stops.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from pam_packages.locking import SOURCE_ONLY, Release, pip, platforms, read_lock
from pam_packages.parts import CACHE, PARTS, PYTHONS

WHEELS = CACHE / "wheels"
#: Differ between the wheels of one release, and are of no use without pip.
_METADATA_LEFT_OUT = ("RECORD", "WHEEL", "INSTALLER", "REQUESTED", "direct_url.json", "top_level.txt")
#: Translations, which the platform does not use, and what only people who build a library need.
_SUFFIXES_LEFT_OUT = (".mo", ".po", ".pot", ".c", ".h", ".pyx", ".pxd", ".pyi", ".pyc", ".map")


def fetch() -> dict[str, Path]:
    """The files of all locks by sha256, fetched if they are not in the cache yet."""
    WHEELS.mkdir(parents=True, exist_ok=True)
    wanted = {digest for part in PARTS for release in read_lock(part) for digest in release.hashes}
    missing = wanted - _cached().keys()
    for part in PARTS:
        if releases := [release for release in read_lock(part) if release.hashes & missing]:
            _download(releases)
    found = _cached()
    if lost := wanted - found.keys():
        raise SystemExit(f"error: {len(lost)} files of packaging/lock could not be fetched")
    return {digest: found[digest] for digest in wanted}


def unpack(releases: list[Release], files: dict[str, Path], target: Path) -> None:
    """Write the files of ``releases`` below ``target``. Two that disagree about a file stop the build."""
    for release in releases:
        for digest in sorted(release.hashes):
            for name, data in _members(files[digest]):
                if _is_left_out(name):
                    continue
                path = target / name
                if path.exists():
                    if path.read_bytes() != data:
                        raise SystemExit(f"error: {release.name}: {name} differs between its wheels")
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)


def _cached() -> dict[str, Path]:
    return {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in sorted(WHEELS.iterdir())}


def _download(releases: list[Release]) -> None:
    """Let pip fetch ``releases``; with --require-hashes it refuses everything but the locked files."""
    lines = {True: "", False: ""}
    for release in releases:
        hashes = "".join(f" --hash=sha256:{digest}" for digest in sorted(release.hashes))
        lines[release.name in SOURCE_ONLY] += f"{release.name}=={release.version}{hashes}\n"
    common = ["download", "-qq", "--no-deps", "--require-hashes", "--dest", str(WHEELS)]
    listing = CACHE / "wanted.txt"
    if lines[True]:
        listing.write_text(lines[True])
        pip(*common, "--no-binary=:all:", "--requirement", str(listing))
    if lines[False]:
        listing.write_text(lines[False])
        for python in PYTHONS:
            pip(*common, "--only-binary=:all:", "--python-version", python, *platforms(),
                "--requirement", str(listing))  # fmt: skip


def _members(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Names, as below site-packages, and contents."""
    if archive.name.endswith(".tar.gz"):
        yield from _source_members(archive)
        return
    with zipfile.ZipFile(archive) as wheel:
        for info in wheel.infolist():
            name = info.filename
            first, _, rest = name.partition("/")
            if first.endswith(".data"):
                kind, _, name = rest.partition("/")
                if kind not in ("purelib", "platlib"):
                    continue  # scripts, headers and documents of the library
            if not info.is_dir():
                yield _checked(name), wheel.read(info)


def _source_members(archive: Path) -> Iterator[tuple[str, bytes]]:
    """The package of a source-only library, which is of Python alone, and its licence."""
    name, _, version = archive.name.removesuffix(".tar.gz").rpartition("-")
    with tarfile.open(fileobj=io.BytesIO(archive.read_bytes())) as source:
        for member in source:
            inner = member.name.partition("/")[2]
            file = source.extractfile(member) if member.isfile() else None
            if file is None:
                continue
            if inner.startswith(f"{name}/"):
                yield _checked(inner), file.read()
            elif inner in ("PKG-INFO", "LICENSE.txt", "LICENSE"):
                inner = "METADATA" if inner == "PKG-INFO" else inner
                yield f"{name}-{version}.dist-info/{inner}", file.read()


def _checked(name: str) -> str:
    if name.startswith("/") or ".." in name.split("/"):
        raise SystemExit(f"error: an archive holds {name}")
    return name


def _is_left_out(name: str) -> bool:
    folder, _, last = name.rpartition("/")
    if ".dist-info" in folder and (last in _METADATA_LEFT_OUT or folder.endswith("/sboms")):
        return True
    return name.endswith(_SUFFIXES_LEFT_OUT) or "/tests/" in f"/{name}"
