"""From staged folders to .deb and .rpm, by nfpm."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from pam_packages import documents, sbom, staging, wheels
from pam_packages.parts import CACHE, MAINTAINER, PACKAGING, PARTS, ROOT, Part, project_version

FORMATS = ("deb", "rpm")
SCRIPTS = {"deb": ("postinst", "prerm", "postrm"), "rpm": ("post", "preun", "postun")}
_NFPM_NAMES = ("postinstall", "preremove", "postremove")
#: Folders that only our packages have; all others are the system's.
_OURS = ("usr/lib/pam", "etc/pam-", "usr/share/doc/pam-", "usr/share/licenses/pam-")


def build(out: Path, version: str | None, key: str | None) -> list[Path]:
    """Build every package into ``out``, which holds nothing else of ours afterwards; returns the files.

    ``key`` names a secret key of the caller's GnuPG, which then signs SHA256SUMS, and each .rpm by itself, as
    dnf wants it of a repository's packages.
    """
    version = version or project_version()
    CACHE.mkdir(exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        # Two builds at once would fill the same stage.
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build(out, version, key)


def _build(out: Path, version: str, key: str | None) -> list[Path]:
    files = wheels.fetch()
    out.mkdir(parents=True, exist_ok=True)
    for old in [*out.glob("pam-*.deb"), *out.glob("pam-*.rpm"), *out.glob("SHA256SUMS*")]:
        old.unlink()
    bills = []
    for part in PARTS:
        staging.stage(part, _work(part, version) / "root", files, version, source_time())
        bills.append(sbom.write(part, out / "sbom", version, source_time()))
    # Compressing is what takes the time; nfpm uses one core for it.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(_package, part, kind, out, version) for part in PARTS for kind in FORMATS]
        made = [job.result() for job in jobs]
    if key:
        _sign_rpms([path for path in made if path.suffix == ".rpm"], key)
    sums = "".join(f"{_sha256(path)}  {path.relative_to(out)}\n" for path in sorted([*made, *bills]))
    (out / "SHA256SUMS").write_text(sums)
    if key:
        _sign(out / "SHA256SUMS", key)
    return made


def source_time() -> datetime:
    """The time that everything in the packages has: SOURCE_DATE_EPOCH, else the last commit's."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    if not epoch:
        command = ["git", "-C", str(ROOT), "log", "-1", "--format=%ct"]
        epoch = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return datetime.fromtimestamp(int(epoch), UTC)


def _work(part: Part, version: str) -> Path:
    return CACHE / "stage" / version / part.package


def _package(part: Part, kind: str, out: Path, version: str) -> Path:
    work = _work(part, version)
    description = yaml.safe_load(_filled(PACKAGING / "nfpm" / f"{part.name}.yml", part, version))
    config = {
        "name": part.package,
        "arch": "amd64",
        "platform": "linux",
        "version": version,
        "version_schema": "none",
        "release": "" if kind == "deb" else "1",
        "section": "net",
        "priority": "optional",
        "maintainer": MAINTAINER,
        "homepage": "https://pam.invalid",
        "license": "Apache-2.0",
        "vendor": "PAM",
        "description": f"{description['summary']}\n{description['description']}",
        "mtime": source_time().isoformat(),
        "depends": description["depends"][kind],
        "scripts": _scripts(part, work, kind, version),
        "contents": _contents(work / "root", kind),
        "deb": {"compression": "gzip"},
        "rpm": {
            "buildhost": "reproducible",
            "compression": "zstd",
            "summary": description["summary"],
            "group": "System Environment/Daemons",
        },
    }
    if kind == "rpm":
        config["changelog"] = str(_rpm_changelog(work, version))
    path = work / f"nfpm.{kind}.yml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    name = (
        f"{part.package}_{version}_amd64.deb" if kind == "deb" else f"{part.package}-{version}-1.x86_64.rpm"
    )
    nfpm = shutil.which("nfpm", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") or "nfpm"
    command = [nfpm, "package", "--config", str(path), "--packager", kind, "--target", str(out / name)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (out / name).chmod(0o644)  # apt's own user must be able to read it
    return out / name


def _rpm_changelog(work: Path, version: str) -> Path:
    entry = {
        "semver": f"{version}-1",
        "date": source_time().isoformat(),
        "packager": MAINTAINER,
        "changes": [{"note": "What changed in this version is in the release notes."}],
    }
    path = work / "changelog.yml"
    path.write_text(yaml.safe_dump([entry]))
    return path


def _contents(root: Path, kind: str) -> list[dict[str, Any]]:
    """An entry for each file, and for each folder that is ours."""
    entries: list[dict[str, Any]] = []
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if any(name.startswith(ours) for other in FORMATS if other != kind for ours in documents.ONLY[other]):
            continue
        entry: dict[str, Any] = {
            "dst": f"/{name}",
            "file_info": {"mode": path.stat().st_mode & 0o777, "owner": "root", "group": "root"},
        }
        if path.is_dir():
            if name.startswith(_OURS):
                entries.append({**entry, "type": "dir"})
        else:
            entries.append({**entry, "src": str(path), "type": _type(name, kind)})
    return entries


def _type(name: str, kind: str) -> str:
    """How the package manager treats a file."""
    if name.startswith("etc/"):
        return "config|noreplace"
    if kind == "rpm" and name.startswith("usr/share/man/"):
        return "doc"
    return "license" if name.startswith("usr/share/licenses/") else "file"


def _scripts(part: Part, work: Path, kind: str, version: str) -> dict[str, str]:
    found: dict[str, str] = {}
    daemon = "daemon." if part.section == 8 else ""
    for name, nfpm_name in zip(SCRIPTS[kind], _NFPM_NAMES, strict=True):
        source = PACKAGING / "scripts" / kind / f"{daemon}{name}"
        if source.exists():
            target = work / f"{kind}.{name}"
            target.write_text(_filled(source, part, version))
            found[nfpm_name] = str(target)
    return found


def _filled(template: Path, part: Part, version: str) -> str:
    """``template`` with what varies between the parts."""
    purge = PACKAGING / "scripts" / f"purge.{part.name}"
    units = [path.name for path in sorted(staging.UNITS.glob(f"{part.package}.s*")) if _is_unit(path)]
    # A socket first: stopped after its service it could start it again.
    units.sort(key=lambda name: not name.endswith(".socket"))
    instances = f"'{part.package}@*.service'" if (staging.UNITS / f"{part.package}@.service").exists() else ""
    values = {
        "PACKAGE": part.package,
        "VERSION": version,
        "TREE": part.tree,
        "UNITS": " ".join(units),
        "INSTANCES": instances,
        "STOPPED": " ".join([*units, instances]).strip(),
        "PURGE": purge.read_text().rstrip() if purge.exists() else "",
    }
    text = template.read_text()
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    return text


def _is_unit(path: Path) -> bool:
    return path.suffix in (".service", ".socket")


def _sign(path: Path, key: str) -> None:
    command = ["gpg", "--batch", "--yes", "--armor", "--local-user", key, "--detach-sign", str(path)]
    subprocess.run(command, check=True)


def _sign_rpms(paths: list[Path], key: str) -> None:
    program, gpg = shutil.which("rpmsign"), shutil.which("gpg")
    if program is None or gpg is None:
        raise SystemExit(
            "error: rpmsign or gpg is missing\nHINT: apt-get install rpm gpg (dnf install rpm-sign)"
        )
    # Debian's rpm does not know where its gpg is.
    macros = ["--define", f"__gpg {gpg}", "--define", f"_gpg_name {key}"]
    command = [program, *macros, "--addsign", *map(str, paths)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
