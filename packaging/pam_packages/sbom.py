"""The bill of materials of each package, in CycloneDX 1.6, from the lock and the wheels' own metadata."""

from __future__ import annotations

import json
import uuid
from datetime import datetime
from email import message_from_string
from email.message import Message
from functools import cache
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name

from pam_packages.locking import read_lock
from pam_packages.parts import COMMON, Part

#: Makes the serial number of a bill a function of its package and version: the same commit, the same bytes.
_NAMESPACE = uuid.UUID("5f0f7d5c-3f0e-4a51-9d0e-6a1c1f1f6a55")
#: The distributions that are staged, by name and version.
_METADATA: dict[tuple[str, str], Message] = {}


def note_metadata(tree: Path) -> None:
    """Take the names, versions and licences of the libraries in ``tree``."""
    for path in sorted(tree.glob("*.dist-info/METADATA")):
        message = message_from_string(path.read_text())
        _METADATA[canonicalize_name(message["Name"]), message["Version"]] = message


@cache
def licence(name: str, version: str) -> str:
    """The licence that a library states, as an SPDX expression where it has one."""
    message = _METADATA[name, version]
    stated = message["License-Expression"] or ""
    if not stated:
        classifiers: list[str] = message.get_all("Classifier") or []
        named = [text.rpartition(" :: ")[2] for text in classifiers if text.startswith("License ::")]
        stated = ", ".join(named) or (message["License"] or "").partition("\n")[0]
    return stated.strip() or "see its dist-info folder"


def write(part: Part, folder: Path, version: str, when: datetime) -> Path:
    """Write ``folder/<package>.cdx.json`` and return it."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{part.package}.cdx.json"
    path.write_text(json.dumps(_document(part, version, when), indent=2) + "\n")
    return path


def _document(part: Part, version: str, when: datetime) -> dict[str, Any]:
    main = {
        "type": "application",
        "bom-ref": part.package,
        "name": part.package,
        "version": version,
        "licenses": [{"license": {"id": "Apache-2.0"}}],
    }
    libraries = [
        {
            "type": "library",
            "bom-ref": f"pkg:pypi/{release.name}@{release.version}",
            "name": release.name,
            "version": release.version,
            "purl": f"pkg:pypi/{release.name}@{release.version}",
            "licenses": [{"license": {"name": licence(release.name, release.version)}}],
            "hashes": [{"alg": "SHA-256", "content": digest} for digest in sorted(release.hashes)],
        }
        for release in read_lock(part)
    ]
    needed = [f"pkg:pypi/{release.name}@{release.version}" for release in read_lock(part)]
    if part is not COMMON:
        libraries.append(
            {"type": "library", "bom-ref": COMMON.package, "name": COMMON.package, "version": version}
        )
        needed.append(COMMON.package)
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, f'{part.package} {version}')}",
        "version": 1,
        "metadata": {"timestamp": f"{when:%Y-%m-%dT%H:%M:%SZ}", "component": main},
        "components": libraries,
        "dependencies": [{"ref": part.package, "dependsOn": needed}],
    }
