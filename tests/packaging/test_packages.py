"""The packages as files: what is in them, that they are the same each time, and that the linters agree."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from apps import app

from pam_packages import building
from pam_packages.parts import COMPONENTS, PACKAGING, PARTS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

_VALIDATE = """
import sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
for name in sys.argv[1:]:
    if wrong := JsonStrictValidator(SchemaVersion.V1_6).validate_str(open(name).read()):
        print(name, wrong)
"""


def run(*words: str | Path, **environment: str) -> str:
    command = [str(word) for word in words]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def deb(folder: Path, name: str) -> Path:
    (found,) = folder.glob(f"{name}_*_amd64.deb")
    return found


def listing(package: Path) -> dict[str, str]:
    """Path → mode and owner, of a .deb."""
    lines = [line.split() for line in run("dpkg-deb", "--contents", package).splitlines()]
    return {words[5].removeprefix("."): f"{words[0]} {words[1]}" for words in lines}


def test_the_same_commit_gives_the_same_bytes(packages, build) -> None:
    again = build("again", TZ="Asia/Kathmandu", LC_ALL="C", HOSTNAME="elsewhere")
    names = sorted(path.name for path in packages.iterdir() if path.is_file())
    assert len(names) == 2 * len(PARTS) + 1
    for name in names:
        assert (packages / name).read_bytes() == (again / name).read_bytes(), name


def test_the_checksums_are_those_of_the_files(packages) -> None:
    lines = (packages / "SHA256SUMS").read_text().splitlines()
    assert len(lines) == 3 * len(PARTS), "a .deb, an .rpm and a bill of materials of each"
    for line in lines:
        digest, name = line.split("  ")
        assert hashlib.sha256((packages / name).read_bytes()).hexdigest() == digest


def test_a_given_key_signs_the_checksums_and_each_rpm(packages, tmp_path, monkeypatch) -> None:
    home = tmp_path / "gnupg"
    home.mkdir(mode=0o700)
    monkeypatch.setenv("GNUPGHOME", str(home))
    run("gpg", "--batch", "--passphrase", "", "--quick-generate-key", "packager@pam.invalid", "ed25519")
    shutil.copy(packages / "SHA256SUMS", tmp_path)
    building._sign(tmp_path / "SHA256SUMS", "packager@pam.invalid")
    (tmp_path / "public.gpg").write_bytes(
        subprocess.run(["gpg", "--export"], capture_output=True, check=True).stdout
    )
    check = [
        "gpgv",
        "--keyring",
        tmp_path / "public.gpg",
        tmp_path / "SHA256SUMS.asc",
        tmp_path / "SHA256SUMS",
    ]
    run(*check)
    with (tmp_path / "SHA256SUMS").open("a") as file:
        file.write("0" * 64 + "  pam-agent_9_amd64.deb\n")
    assert subprocess.run(check, capture_output=True, check=False).returncode != 0
    rpm = tmp_path / next(packages.glob("pam-common-*.rpm")).name
    shutil.copy(packages / rpm.name, rpm)
    (tmp_path / "public.asc").write_text(run("gpg", "--armor", "--export"))
    database = ("--define", f"_dbpath {tmp_path}/rpmdb")
    run("rpmkeys", *database, "--import", tmp_path / "public.asc")
    must = ("--define", "_pkgverify_level signature", "--checksig")
    assert subprocess.run(["rpmkeys", *database, *must, rpm], capture_output=True, check=False).returncode
    building._sign_rpms([rpm], "packager@pam.invalid")
    assert "digests signatures OK" in run("rpmkeys", *database, *must, rpm)
    subprocess.run(["gpgconf", "--kill", "gpg-agent"], check=False)


@pytest.mark.parametrize("part", COMPONENTS, ids=lambda part: part.name)
def test_a_package_holds_its_part_and_nothing_else(packages, part) -> None:
    files = listing(deb(packages, part.package))
    name = part.package
    for path in (
        f"/usr/bin/{name}",
        f"/etc/{name}/{part.name}.yml",
        f"/usr/lib/pam/{part.name}/pam_{part.name}/__main__.py",
        f"/usr/share/man/man{part.section}/{name}.{part.section}.gz",
        f"/usr/share/bash-completion/completions/{name}",
        f"/usr/share/zsh/vendor-completions/_{name}",
        f"/usr/share/fish/vendor_completions.d/{name}.fish",
        f"/usr/share/doc/{name}/copyright",
    ):
        assert path in files, path
    others = [other.name for other in COMPONENTS if other is not part]
    assert not [path for path in files if any(f"/pam_{other}/" in path for other in others)]
    assert not [path for path in files if "__pycache__" in path or path.endswith((".pyc", ".po"))]
    assert {entry.split()[1] for entry in files.values()} == {"root/root"}
    modes = {entry.split()[0] for path, entry in files.items() if not path.startswith("/usr/bin/")}
    assert modes <= {"drwxr-xr-x", "-rw-r--r--"}, "what root installs, nobody else changes"
    units = [path for path in files if path.startswith("/usr/lib/systemd/system/")]
    assert bool(units) == (part.name != "client")


def test_each_part_carries_only_what_it_needs(packages) -> None:
    homes = {"django": "platform", "gunicorn": "platform", "rich": "client", "keyring": "client",
             "prometheus_client": "relay", "scramp": "agent", "paramiko": "common"}  # fmt: skip
    for part in PARTS:
        files = listing(deb(packages, part.package))
        for library, home in homes.items():
            assert (f"{part.tree}/{library}/__init__.py" in files) == (home == part.name), library


def test_one_tree_serves_every_python(packages) -> None:
    files = listing(deb(packages, "pam-common"))
    for tag in ("311", "312", "313", "314"):
        assert f"/usr/lib/pam/lib/_cffi_backend.cpython-{tag}-x86_64-linux-gnu.so" in files


def test_configuration_is_the_administrators(packages) -> None:
    for part in COMPONENTS:
        path = f"/etc/{part.package}/{part.name}.yml"
        conffiles = run("dpkg-deb", "--info", deb(packages, part.package), "conffiles")
        assert conffiles.split() == [path]
        (rpm,) = packages.glob(f"{part.package}-*.rpm")
        assert run("rpm", "-qpc", rpm).split() == [path]


def test_the_packages_are_clean_by_lintian_and_rpmlint(packages) -> None:
    debs, rpms = sorted(packages.glob("*.deb")), sorted(packages.glob("*.rpm"))
    assert run("lintian", "--allow-root", "--fail-on", "error,warning", *debs) == ""
    assert "0 errors, 0 warnings" in run("rpmlint", "--config", PACKAGING / "rpmlint.toml", *rpms)


def test_the_bill_of_materials_is_cyclonedx_and_complete(packages) -> None:
    files = {part: packages / f"sbom/{part.package}.cdx.json" for part in PARTS}
    assert run(app("python"), "-c", _VALIDATE, *files.values()) == ""
    for part in PARTS:
        document = json.loads(files[part].read_text())
        named = {component["name"]: component["version"] for component in document["components"]}
        carried = {
            line.rpartition("/")[2].removesuffix(".dist-info").rpartition("-")
            for line in (path.rstrip("/") for path in listing(deb(packages, part.package)))
            if line.endswith(".dist-info")
        }
        for name, _, version in carried - {("pam_bundle", "-", document["metadata"]["component"]["version"])}:
            assert named[name.lower().replace("_", "-").replace(".", "-")] == version
