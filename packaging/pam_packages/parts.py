"""What there is to package: the parts, their folders and the interpreters they run on."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGING = ROOT / "packaging"
#: Downloads and stages; kept between builds so that the second one needs no network.
CACHE = ROOT / ".packaging"

MAINTAINER = "PAM maintainers <maintainers@pam.invalid>"
#: The interpreters that one tree serves; pyproject's requires-python says the same.
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
#: PyNaCl's wheel needs glibc 2.34, so nothing older can be wanted: Debian 12, Ubuntu 22.04, RHEL 9.
GLIBC = (2, 34)


@dataclass(frozen=True)
class Part:
    """One package: ``pam-<name>``, with the source package of that name and one extra of pyproject.toml."""

    name: str
    section: int  # of its manual page

    @property
    def package(self) -> str:
        return f"pam-{self.name}"

    @property
    def source(self) -> Path:
        return ROOT / self.name / f"pam_{self.name}"

    @property
    def lock(self) -> Path:
        return PACKAGING / "lock" / f"{self.name}.txt"

    @property
    def tree(self) -> str:
        """Where its modules are installed."""
        return "/usr/lib/pam/lib" if self.name == "common" else f"/usr/lib/pam/{self.name}"


COMMON = Part("common", 0)
COMPONENTS = (Part("agent", 8), Part("relay", 8), Part("client", 1), Part("platform", 8))
PARTS = (COMMON, *COMPONENTS)


def requirements(part: Part) -> list[str]:
    """What pyproject.toml says that ``part`` needs, in its own words."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found: list[str] = (
        project["dependencies"] if part is COMMON else project["optional-dependencies"][part.name]
    )
    return found


def project_version() -> str:
    """The version in pyproject.toml."""
    version: str = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    return version
