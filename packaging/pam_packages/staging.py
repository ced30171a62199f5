"""What each package installs, laid out below a folder as it will be on the host."""

from __future__ import annotations

import shutil
from datetime import datetime
from pathlib import Path

from pam_packages import documents, sbom, wheels
from pam_packages.locking import read_lock
from pam_packages.parts import COMMON, PACKAGING, ROOT, Part

FILES = PACKAGING / "files"
UNITS = ROOT / "systemd"
_EXECUTABLE = ("usr/bin/", "usr/lib/pam/python", "usr/lib/pam/compile")


def stage(part: Part, root: Path, files: dict[str, Path], version: str, when: datetime) -> None:
    """Fill ``root`` with the files of ``part``'s package."""
    shutil.rmtree(root, ignore_errors=True)
    tree = root / part.tree.lstrip("/")
    wheels.unpack(read_lock(part), files, tree)
    shutil.copytree(part.source, tree / part.source.name, ignore=shutil.ignore_patterns("__pycache__"))
    if part is COMMON:
        _stage_common(root, tree, version)
    else:
        _stage_component(part, root)
    sbom.note_metadata(tree)
    documents.stage(part, root, version, when)
    _set_modes(root)


def _stage_common(root: Path, tree: Path, version: str) -> None:
    for name in ("python", "compile"):
        shutil.copy(FILES / name, root / "usr/lib/pam" / name)
    # Where `--version` looks: the packages are one distribution, whose modules they share out.
    info = tree / f"pam_bundle-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: pam-bundle\nVersion: {version}\n")


def _stage_component(part: Part, root: Path) -> None:
    for source, target in (
        ("launcher", f"usr/bin/{part.package}"),
        ("start", f"{part.tree[1:]}/start.py"),
    ):
        text = (FILES / source).read_text().replace("@NAME@", part.name)
        _write(root / target, text)
    _write(root / f"etc/{part.package}/{part.name}.yml", (FILES / "etc" / f"{part.name}.yml").read_text())
    for unit in sorted(UNITS.glob(f"{part.package}*")):
        kind = unit.suffix.removeprefix(".")
        folder = {"sysusers": "sysusers.d", "tmpfiles": "tmpfiles.d"}.get(kind, "systemd/system")
        name = unit.with_suffix(".conf").name if folder.endswith(".d") else unit.name
        _write(root / "usr/lib" / folder / name, unit.read_text())


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _set_modes(root: Path) -> None:
    """Whatever umask and clone made of them: 0755 for folders and programs, 0644 for the rest."""
    for path in [root, *root.rglob("*")]:
        name = str(path.relative_to(root))
        path.chmod(0o755 if path.is_dir() or name.startswith(_EXECUTABLE) else 0o644)
