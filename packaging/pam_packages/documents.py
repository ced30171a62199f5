"""What a package brings for people: manual page, shell completion, licences, changelog, SBOM."""

from __future__ import annotations

import gzip
import importlib
from datetime import datetime
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from pam_packages import manual, sbom
from pam_packages.locking import read_lock
from pam_packages.parts import COMMON, MAINTAINER, PACKAGING, Part

#: Where each shell looks, and under which name; zsh's folder is Debian's in one format only.
COMPLETIONS = {
    "bash": ("usr/share/bash-completion/completions/{}",),
    "zsh": ("usr/share/zsh/vendor-completions/_{}", "usr/share/zsh/site-functions/_{}"),
    "fish": ("usr/share/fish/vendor_completions.d/{}.fish",),
}
#: Only one of the formats wants these.
ONLY = {
    "deb": ("usr/share/zsh/vendor-completions", "usr/share/lintian", "usr/share/doc"),
    "rpm": ("usr/share/zsh/site-functions", "usr/share/licenses"),
}


def stage(part: Part, root: Path, version: str, when: datetime) -> None:
    """Add the documents of ``part``'s package below ``root``."""
    if part is not COMMON:
        command = command_of(part)
        _pack(root / f"usr/share/man/man{part.section}/{part.package}.{part.section}.gz",
              manual.page(part, command, version, when))  # fmt: skip
        for shell, places in COMPLETIONS.items():
            for place in places:
                _write(root / place.format(part.package), completion(part, command, shell))
    documents = root / "usr/share/doc" / part.package
    _write(documents / "copyright", _copyright(part))
    _pack(documents / "changelog.gz", _changelog(part, version, when))
    _write(root / "usr/share/licenses" / part.package / "copyright", _copyright(part))
    overrides = PACKAGING / "lintian" / part.package
    if overrides.exists():
        _write(root / "usr/share/lintian/overrides" / part.package, overrides.read_text())


def command_of(part: Part) -> click.Command:
    """The click command of a component."""
    module = importlib.import_module(f"pam_{part.name}.__main__")
    names = {"agent": "main_command", "relay": "cli", "client": "cli", "platform": "group"}
    command = getattr(module, names[part.name])
    assert isinstance(command, click.Command)
    return command


def completion(part: Part, command: click.Command, shell: str) -> str:
    """click's own completion script; it asks the program, so that it never goes stale."""
    kind = get_completion_class(shell)
    assert kind is not None
    variable = f"_{part.package.upper().replace('-', '_')}_COMPLETE"
    maker = kind(command, {}, part.package, variable)
    return maker.source_template % maker.source_vars()


def _copyright(part: Part) -> str:
    carried = sorted({(release.name, release.version) for release in read_lock(part)})
    listed = "".join(f"  {name} {version}: {sbom.licence(name, version)}\n" for name, version in carried)
    text = (PACKAGING / "files/copyright").read_text()
    return text.replace("@PACKAGE@", part.package).replace("@TREE@", part.tree).replace("@CARRIED@", listed)


def _changelog(part: Part, version: str, when: datetime) -> str:
    return (
        f"{part.package} ({version}) unstable; urgency=medium\n\n"
        "  * What changed in this version is in the release notes.\n\n"
        f" -- {MAINTAINER}  {when:%a, %d %b %Y %H:%M:%S} +0000\n"
    )


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _pack(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
