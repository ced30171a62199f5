"""What an apply changes, as values and as lines for a person."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Action = Literal["add", "change", "remove", "disable", "end", "keep"]

#: How a secret shows: that it changed, never what it is.
SECRET = "(secret)"  # noqa: S105  # the word that is shown instead of one


@dataclass(frozen=True)
class Change:
    """One thing: ``fields`` maps a field to what it was (None when added) and what it becomes."""

    action: Action
    kind: str
    name: str
    fields: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As ``apply --json`` prints it."""
        fields = {name: {"from": old, "to": new} for name, (old, new) in self.fields.items()}
        return {"action": self.action, "kind": self.kind, "name": self.name, "fields": fields}

    def lines(self) -> list[tuple[str, str]]:
        """``(style, text)`` for a terminal: the thing itself, then each field that changes."""
        sign, style = _SIGNS[self.action]
        suffix = _WORDS.get(self.action, "")
        found = [(style, f"{sign} {self.kind} {self.name}{suffix}")]
        for name, (old, new) in self.fields.items():
            if new == SECRET:
                found.append((style, f"    {name}: {'set' if old is None else 'changed'}"))
            elif self.action == "add":
                found.append((style, f"    {name}: {_shown(new)}"))
            else:
                found.append((style, f"    {name}: {_shown(old)} -> {_shown(new)}"))
        return found


_SIGNS = {
    "add": ("+", "green"),
    "change": ("~", "yellow"),
    "remove": ("-", "red"),
    "disable": ("-", "red"),
    "end": ("!", "red"),
    "keep": ("=", "bright_black"),
}
_WORDS = {
    "disable": ": disabled",
    "end": ": ended",
    "keep": ": not in the file, kept (--prune removes it)",
}
#: Longer values (certificates) are not for a line.
_MAX_SHOWN = 100


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_plain, value)) + "]"
    return _plain(value)


def _plain(value: Any) -> str:
    """Values come from a file that somebody may have been sent: nothing in them steers the terminal."""
    text = "".join(char if char.isprintable() else "?" for char in str(value).strip())
    if len(text) > _MAX_SHOWN:
        return f"({len(text)} characters)"
    return text or "none"
