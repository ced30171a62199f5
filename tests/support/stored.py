"""The platform's stored recordings, read from outside the product.

The files are read by the independent reader of ``tests/common/recording``; the product is asked for one
thing only, the private recording key, in a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from stack import Stack

_READER = Path(__file__).parents[1] / "common" / "recording" / "independent_reader.py"

_KEYS = """
import json, django
django.setup()
from pam_platform.vault import keys
print(json.dumps([key.hex() for key in keys.recording_private_keys()]))
"""


class StoredRecordings:
    """What the platform of ``stack`` has stored, decrypted with its own key."""

    def __init__(self, stack: Stack, agent: str = "dc1-a") -> None:
        self.folder = stack.folder / "platform" / "recordings"
        self._read = _independent_reader().read
        (self._private,) = _recording_keys(stack.folder / "platform.yml")
        seed = (stack.folder / agent / "identity.key").read_bytes()
        self._identity = Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()

    def parts(self, session: str) -> Iterator[tuple[list[dict[str, Any]], str]]:
        """The events and the end of each part, in order; every part's chain and signature are checked."""
        for path in self.files(session):
            header, events, end = self._read(path.read_bytes(), self._private, self._identity)
            assert path.name == f"{session}.{header['part']}.pamrec"
            yield events, end

    def read(self, path: Path) -> list[dict[str, Any]]:
        """The events of one file, wherever it lies."""
        events: list[dict[str, Any]] = self._read(path.read_bytes(), self._private, self._identity)[1]
        return events

    def header(self, path: Path) -> dict[str, Any]:
        header: dict[str, Any] = self._read(path.read_bytes(), self._private, self._identity)[0]
        return header

    def files(self, session: str = "*") -> list[Path]:
        return sorted(self.folder.glob(f"*/{session}.*.pamrec"), key=lambda path: int(path.suffixes[-2][1:]))

    def events(self, sessions: Iterable[str]) -> list[dict[str, Any]]:
        """All events of the sessions; ids of queries are made unique by what they are ids in."""
        found = []
        for session in sessions:
            for number, (events, _) in enumerate(self.parts(session), 1):
                found += [{**event, "place": (session, number, event["c"])} for event in events]
        return found


def _independent_reader() -> Any:
    spec = importlib.util.spec_from_file_location("independent_reader", _READER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _recording_keys(config: Path) -> list[bytes]:
    env = {
        **os.environ,
        "PAM_PLATFORM_CONFIG": str(config),
        "DJANGO_SETTINGS_MODULE": "pam_platform.settings",
    }
    done = subprocess.run([sys.executable, "-c", _KEYS], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [bytes.fromhex(key) for key in json.loads(done.stdout.splitlines()[-1])]


def spooled(stack: Stack, agent: str = "dc1-a") -> list[str]:
    """Every file that the agent keeps of recordings, wherever in its spool."""
    root = stack.folder / agent / "spool"
    # In the order in which files move on: one that moves between two looks is seen by the second.
    found = {
        path
        for folder in (root / "active", root / "ready", root)
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("lock", "receipts")
    }
    return sorted(str(path.relative_to(root)) for path in found)
