"""The protocols this agent speaks: one line per protocol."""

from __future__ import annotations

from collections.abc import Iterable

from pam_agent.protocols.base import Interceptor
from pam_agent.protocols.http import HttpInterceptor
from pam_agent.protocols.postgres import PostgresInterceptor
from pam_agent.protocols.ssh import SshInterceptor


def registry(entries: Iterable[tuple[str, type[Interceptor]]]) -> dict[str, type[Interceptor]]:
    """A mapping of protocol name to Interceptor. Raises ValueError for a name given twice."""
    found: dict[str, type[Interceptor]] = {}
    for name, interceptor in entries:
        if name in found:
            raise ValueError(f"two interceptors for {name}")
        found[name] = interceptor
    return found


PROTOCOLS: dict[str, type[Interceptor]] = registry(
    [
        ("http", HttpInterceptor),
        ("postgres", PostgresInterceptor),
        ("ssh", SshInterceptor),
    ]
)
