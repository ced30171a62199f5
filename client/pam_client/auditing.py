"""Recordings that are sealed to an auditor's own key: fetched encrypted, opened here.

The key never leaves this machine, and what is decrypted is not written to a disk.
"""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pam_client.api import Api
from pam_common.errors import PamError
from pam_common.files import read_private, write_private
from pam_common.keys import KEY_SIZE, b64decode, b64encode, key_id
from pam_common.recording import PartReader, RecordingError
from pam_common.secure_channel import x25519_public


def make_key(path: Path) -> dict[str, str]:
    """Make a key pair: the private key into ``path`` (0600), which must not exist; returns the public
    ``{kid, key}``, as platform.yml and agent.yml want it."""
    if path.exists() or path.is_symlink():
        raise PamError(f"{path} exists already", hint="a key that is lost opens nothing any more: keep it.")
    private = secrets.token_bytes(KEY_SIZE)
    write_private(path, b64encode(private).encode("ascii") + b"\n")
    public = x25519_public(private)
    return {"kid": key_id(public), "key": b64encode(public)}


def read_key(path: Path) -> bytes:
    """The private key in ``path``. Raises PamError; no message quotes its content."""
    try:
        return b64decode(read_private(path).decode("ascii").strip(), KEY_SIZE)
    except FileNotFoundError:
        raise PamError(f"{path} does not exist") from None
    except ValueError:
        raise PamError(f"{path} holds no key", hint="pam-client recording-key makes one.") from None


def decrypted(api: Api, session: str, key: bytes) -> Iterator[dict[str, Any]]:
    """The events of all parts of a session, as ``Api.events`` gives them; a damage becomes the last one."""
    for number in _parts(api.verify(session)):
        # Without a name, and only the ciphertext.
        with tempfile.TemporaryFile() as file:
            api.raw_part(session, number, file)
            file.seek(0)
            try:
                for event in PartReader(file, [key]).events():
                    yield {"part": number, **event}
            except RecordingError as error:
                yield {"part": number, "kind": "problem", "problem": str(error), "hint": error.hint}


def _parts(report: dict[str, Any]) -> list[int]:
    parts = report.get("parts")
    numbers = (
        [part.get("part") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    )
    return [number for number in numbers if type(number) is int]
