"""What an account may ask of its app: methods, paths, sizes. No I/O.

Rules see what is in the request's head. What an app does behind an address is its own: a method given in a
query or a form (``_method=DELETE``) is not seen; the headers that carry one, or another path, are dropped
where there are rules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pam_agent.protocols.base import ClientProtocolError
from pam_agent.protocols.http.paths import AmbiguousPathError, Path, Pattern, normalise, split

#: Headers by which some frameworks take another method or path than the request line's.
OVERRIDES: Final = frozenset(
    {
        "x-http-method",
        "x-http-method-override",
        "x-method-override",
        "x-original-url",
        "x-rewrite-url",
        "x-original-uri",
        "x-forwarded-uri",
        "x-forwarded-path",
    }
)


class RuleError(ClientProtocolError):
    """A rule of the account refuses the request. ``rule`` names it, ``status`` is HTTP's."""

    def __init__(self, message: str, rule: str, status: int = 403) -> None:
        super().__init__(message, hint="an administrator can change the account's rules.")
        self.rule = rule
        self.status = status


@dataclass(frozen=True)
class Rule:
    """One entry of allow or deny; None stands for any method, any path."""

    methods: frozenset[str] | None = None
    paths: tuple[Pattern, ...] | None = None

    def __str__(self) -> str:
        methods = "any method" if self.methods is None else ", ".join(sorted(self.methods))
        paths = "any path" if self.paths is None else ", ".join(pattern.text for pattern in self.paths)
        return f"{methods}: {paths}"

    def allows(self, method: str, path: Path) -> bool:
        return self._method(method) and (
            self.paths is None or any(pattern.allows(path) for pattern in self.paths)
        )

    def denies(self, method: str, path: Path) -> bool:
        # Methods are told apart by case (RFC 9110, 9.1), but many frameworks take "delete" for "DELETE".
        return self._method(method.upper()) and (
            self.paths is None or any(pattern.denies(path) for pattern in self.paths)
        )

    def _method(self, method: str) -> bool:
        return self.methods is None or method in self.methods


@dataclass(frozen=True)
class Rules:
    """``allow`` None allows what is not denied; an empty one allows nothing. ``max_request`` in bytes."""

    allow: tuple[Rule, ...] | None = None
    deny: tuple[Rule, ...] = ()
    max_request: int | None = None

    @property
    def restrict(self) -> bool:
        return self.allow is not None or bool(self.deny)

    def check(self, method: str, target: str) -> str:
        """The address to ask the app for. Raises RuleError, or ClientProtocolError for what is no address."""
        raw, query = split(target)
        if not self.restrict:
            return target
        try:
            path = normalise(raw)
        except AmbiguousPathError as error:
            raise RuleError(str(error), "ambiguous path", 400) from None
        for rule in self.deny:
            if rule.denies(method, path):
                raise RuleError("the account's rules do not allow this", f"deny {rule}")
        if self.allow is not None and not any(rule.allows(method, path) for rule in self.allow):
            raise RuleError("the account's rules do not allow this", "no allow rule")
        return path.sent + query

    def check_size(self, size: int) -> None:
        """``size`` bytes of a body so far. Raises RuleError."""
        if self.max_request is not None and size > self.max_request:
            message = f"the request is larger than the account's rules allow ({self.max_request} bytes)"
            raise RuleError(message, f"max_request {self.max_request}", 413)
