"""What the readers of access.yml share: where a value stands, the secrets it names, the problems so far."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from pam_common import config
from pam_common.errors import PamError
from pam_common.files import read_private

#: A password or a PEM key with its chain.
MAX_SECRET = 32 * 1024
#: A company's CA bundle; the agent takes no more.
MAX_PEM = 256 * 1024

#: The keys and indices that lead to a value.
At: TypeAlias = tuple[Any, ...]


class Source:
    """One access.yml; ``problems`` collects what is wrong, each with its line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems: list[str] = []
        self._lines = _lines(path)

    def problem(self, at: At, text: str) -> None:
        """Note that the value at ``at`` is wrong."""
        dotted = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in at).removeprefix(
            "."
        )
        self.problems.append(f"{self.path.name}:{self.line(at)}: {dotted}: {text}")

    def line(self, at: At) -> int:
        """The line of a value, or of what it should stand in."""
        while at and at not in self._lines:
            at = at[:-1]
        return self._lines.get(at, 1)

    def secret(self, item: dict[str, Any], key: str, at: At) -> bytes | None:
        """The secret that ``{file: …}`` or ``{env: …}`` points to, without the newline editors add."""
        if key not in item:
            return None
        where: dict[str, str] = item[key]
        try:
            value = _read_secret(self.path.parent, where)
            value.decode()
        except UnicodeDecodeError:
            value, problem = b"", "is not UTF-8"
        except FileNotFoundError:
            value, problem = b"", f"{where['file']} does not exist"
        except (PamError, OSError) as error:
            hint = getattr(error, "hint", "")
            value, problem = b"", f"{error}" + (f" ({hint})" if hint else "")
        else:
            problem = "" if value else "is empty"
            if b"\0" in value:
                problem = "holds a NUL byte"
        if problem:
            self.problem((*at, key), problem)
        return value

    def secrets(self, item: dict[str, Any], keys: tuple[str, ...], at: At) -> dict[str, bytes]:
        """Those of the secrets ``keys`` that are given, by key."""
        found = {key: self.secret(item, key, at) for key in keys}
        return {key: value for key, value in found.items() if value is not None}

    def pem(self, item: dict[str, Any], key: str, at: At) -> str:
        """A file with certificates: public, so anybody may read it."""
        if key not in item:
            return ""
        path = self.path.parent / item[key]["file"]
        try:
            data: bytes = path.read_bytes()[: MAX_PEM + 1]
        except OSError as error:
            self.problem((*at, key), f"{item[key]['file']}: {error.strerror}")
            return ""
        if b"-----BEGIN CERTIFICATE-----" not in data or len(data) > MAX_PEM or not data.isascii():
            self.problem((*at, key), f"{item[key]['file']} is not a PEM certificate file")
            return ""
        if b"PRIVATE KEY" in data:
            self.problem((*at, key), f"{item[key]['file']} holds a private key; that belongs in client_key")
        return data.decode()

    def duration(self, value: str | int, at: At) -> int:
        """Seconds."""
        return self._checked(config.parse_duration, value, at)

    def size(self, value: str | int, at: At, *, limit: int, shown: str) -> int:
        """Bytes, at most ``limit``, which is called ``shown``."""
        size = self._checked(config.parse_size, value, at)
        if size > limit:
            self.problem(at, f"expected at most {shown}")
        return size

    def _checked(self, parse: Callable[[str | int], int], value: str | int, at: At) -> int:
        try:
            return parse(value)
        except ValueError as error:
            self.problem(at, str(error))
            return 0


def _read_secret(folder: Path, where: dict[str, str]) -> bytes:
    if "env" in where:
        if where["env"] not in os.environ:
            raise PamError(f"the environment variable {where['env']} is not set")
        data = os.environ[where["env"]].encode()
    else:
        data = read_private(folder / where["file"], max_size=MAX_SECRET)
    return data.removesuffix(b"\n").removesuffix(b"\r")


def _lines(path: Path) -> dict[At, int]:
    """Line of every value, by its keys and indices."""
    found: dict[At, int] = {}

    def walk(node: yaml.Node | None, at: At) -> None:
        if node is None:
            return
        found[at] = node.start_mark.line + 1
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                walk(value, (*at, key.value))
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                walk(value, (*at, index))

    walk(yaml.compose(path.read_text(), Loader=yaml.SafeLoader), ())
    return found
