"""access.yml as typed values. No database: what refers to something outside the file is left to ``run``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from pam_common import config
from pam_common.errors import ConfigError
from pam_platform.access.apply import http, ssh
from pam_platform.access.apply.source import At, Source

#: Longest policy duration: sessions are re-authorised at least weekly.
MAX_DURATION = 7 * 24 * 3600
DEFAULT_ROWS_BUDGET = 16 * 1024
#: A client that vanished without a word must not leave its session open for days.
DEFAULT_IDLE_LIMIT = 3600
#: The largest event a recording takes is 1 MiB.
MAX_ROWS_BUDGET = 1 << 20

#: Reads what is the protocol's own in a resource or account; gives its options and its secrets by name.
_Read: TypeAlias = Callable[[dict[str, Any], At, Source], tuple[dict[str, Any], dict[str, bytes]]]
#: By protocol, for resources and accounts. PostgreSQL has no options.
_RESOURCE_OPTIONS: dict[str, _Read] = {"ssh": ssh.resource, "http": http.resource}
_ACCOUNT_OPTIONS: dict[str, _Read] = {"ssh": ssh.account, "http": http.account}
#: Keys that not every protocol has a use for; what would be ignored is refused.
_RESOURCE_KEYS = {
    "tls": ("postgres", "http"),
    "rows_budget": ("postgres", "ssh"),
    "ssh": ("ssh",),
    "http": ("http",),
}
_ACCOUNT_KEYS = {
    "client_key": ("postgres",),
    "databases": ("postgres",),
    "allow_replication": ("postgres",),
    "private_key": ("ssh",),
    "passphrase": ("ssh",),
    "certificate": ("ssh",),
    "ssh": ("ssh",),
    "token": ("http",),
    "client_cert": ("http",),
    "http": ("http",),
}


@dataclass(frozen=True)
class User:
    name: str
    email: str
    groups: tuple[str, ...]
    roles: tuple[str, ...]
    service: bool
    password: str | None = field(repr=False)
    client_secret: str | None = field(repr=False)


@dataclass(frozen=True)
class Relay:
    name: str
    host: str
    port: int


@dataclass(frozen=True)
class Account:
    resource: str
    name: str
    user: str
    databases: tuple[str, ...]
    allow_replication: bool
    password: bytes | None = field(repr=False)
    client_key: bytes | None = field(repr=False)
    # What only its protocol knows: for the agent as it is, and secrets by name for the vault.
    options: dict[str, Any]
    secrets: dict[str, bytes] = field(repr=False)


@dataclass(frozen=True)
class Resource:
    name: str
    protocol: str
    gateway: str
    host: str
    port: int
    tls_mode: str
    server_name: str
    tls_ca: str
    client_cert: str
    rows_budget: int
    options: dict[str, Any]
    secrets: dict[str, bytes] = field(repr=False)


@dataclass(frozen=True)
class Policy:
    name: str
    users: tuple[str, ...]
    groups: tuple[str, ...]
    accounts: tuple[str, ...]
    max_duration: int
    idle_limit: int
    review_groups: tuple[str, ...]


@dataclass(frozen=True)
class Document:
    """Everything a file says. ``line(kind, name)`` is where it says it, for messages."""

    groups: tuple[str, ...]
    users: tuple[User, ...]
    gateways: tuple[str, ...]
    relays: tuple[Relay, ...]
    resources: tuple[Resource, ...]
    accounts: tuple[Account, ...]
    policies: tuple[Policy, ...]
    line: Callable[[str, str], str] = field(repr=False)


def load(path: Path) -> Document:
    """Read and check the file and the secrets it points to. Raises ConfigError with every problem."""
    values = config.load(path, "access")
    return _Reader(path, values).document()


class _Reader:
    """Turns checked YAML into a Document, collecting problems with their lines."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self._source = Source(path)
        self._values = values

    def document(self) -> Document:
        for kind in ("groups", "users", "gateways", "relays", "resources", "policies"):
            self._require_distinct(self._list(kind), (kind,))
        found = Document(
            groups=tuple(item["name"] for item in self._list("groups")),
            users=tuple(self._user(item, at) for item, at in self._items("users")),
            gateways=tuple(item["name"] for item in self._list("gateways")),
            relays=tuple(
                Relay(item["name"], item["host"], item["port"]) for item, _ in self._items("relays")
            ),
            resources=tuple(self._resource(item, at) for item, at in self._items("resources")),
            accounts=tuple(
                account for item, at in self._items("resources") for account in self._accounts(item, at)
            ),
            policies=tuple(self._policy(item, at) for item, at in self._items("policies")),
            line=self._line_of,
        )
        if self._source.problems:
            raise ConfigError(self._source.problems)
        return found

    def _list(self, kind: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._values.get(kind, [])
        return found

    def _items(self, kind: str) -> Iterator[tuple[dict[str, Any], At]]:
        for index, item in enumerate(self._list(kind)):
            yield item, (kind, index)

    def _user(self, item: dict[str, Any], at: At) -> User:
        service = item.get("service", False)
        if service and "password" in item:
            self._source.problem((*at, "password"), "a service user has a client_secret, no password")
        if "client_secret" in item and not service:
            self._source.problem((*at, "client_secret"), "only a user with service: true has one")
        return User(
            name=item["name"],
            email=item.get("email", ""),
            groups=tuple(sorted(item.get("groups", []))),
            roles=tuple(sorted(item.get("roles", []))),
            service=service,
            password=self._text_secret(item, "password", at),
            client_secret=self._text_secret(item, "client_secret", at),
        )

    def _resource(self, item: dict[str, Any], at: At) -> Resource:
        tls = item.get("tls", {})
        mode = tls.get("mode", "disable" if item["protocol"] == "ssh" else "verify-full")
        if mode in ("disable", "require") and "ca" in tls:
            self._source.problem(
                (*at, "tls", "ca"), f"tls mode {mode} checks no certificate: the ca would be ignored"
            )
        self._require_keys(item, _RESOURCE_KEYS, item["protocol"], at)
        options, secrets = _RESOURCE_OPTIONS.get(item["protocol"], _no_options)(item, at, self._source)
        return Resource(
            name=item["name"],
            protocol=item["protocol"],
            gateway=item["gateway"],
            host=item["host"],
            port=item["port"],
            tls_mode=mode,
            server_name=tls.get("server_name", ""),
            tls_ca=self._source.pem(tls, "ca", (*at, "tls")),
            client_cert=self._source.pem(tls, "client_cert", (*at, "tls")),
            rows_budget=self._source.size(
                item.get("rows_budget", DEFAULT_ROWS_BUDGET),
                (*at, "rows_budget"),
                limit=MAX_ROWS_BUDGET,
                shown="1MiB",
            ),
            options=options,
            secrets=secrets,
        )

    def _accounts(self, item: dict[str, Any], at: At) -> Iterator[Account]:
        self._require_distinct(item["accounts"], (*at, "accounts"))
        for index, account in enumerate(item["accounts"]):
            here = (*at, "accounts", index)
            self._require_keys(account, _ACCOUNT_KEYS, item["protocol"], here)
            read = _ACCOUNT_OPTIONS.get(item["protocol"], _no_options)
            options, secrets = read(account, here, self._source)
            yield Account(
                resource=item["name"],
                name=account["name"],
                user=account.get("user", account["name"]),
                databases=tuple(account.get("databases", [])),
                allow_replication=account.get("allow_replication", False),
                password=self._source.secret(account, "password", here),
                client_key=self._source.secret(account, "client_key", here),
                options=options,
                secrets=secrets,
            )

    def _policy(self, item: dict[str, Any], at: At) -> Policy:
        if not item.get("users") and not item.get("groups"):
            self._source.problem(at, "names neither users nor groups, so it is about nobody")
        duration = self._source.duration(item["max_duration"], (*at, "max_duration"))
        if duration > MAX_DURATION:
            self._source.problem((*at, "max_duration"), "expected at most 7d")
        wanted = item.get("idle_limit", DEFAULT_IDLE_LIMIT)
        idle = 0 if wanted == "none" else self._source.duration(wanted, (*at, "idle_limit"))
        return Policy(
            name=item["name"],
            users=tuple(sorted(item.get("users", []))),
            groups=tuple(sorted(item.get("groups", []))),
            accounts=tuple(sorted(item["accounts"])),
            max_duration=duration,
            # An idle limit beyond the session's end would say nothing.
            idle_limit=min(idle, duration),
            review_groups=tuple(sorted(item.get("review", []))),
        )

    def _text_secret(self, item: dict[str, Any], key: str, at: At) -> str | None:
        value = self._source.secret(item, key, at)
        return value.decode() if value is not None else None

    def _require_keys(
        self, item: dict[str, Any], keys: Mapping[str, tuple[str, ...]], protocol: str, at: At
    ) -> None:
        for key in item:
            if protocol not in keys.get(key, (protocol,)):
                self._source.problem((*at, key), f"has no meaning for the protocol {protocol}")

    def _require_distinct(self, items: list[dict[str, Any]], at: At) -> None:
        seen: set[str] = set()
        for index, item in enumerate(items):
            if item["name"] in seen:
                self._source.problem((*at, index), f'"{item["name"]}" is given twice')
            seen.add(item["name"])

    def _line_of(self, kind: str, name: str) -> str:
        for index, item in enumerate(self._list(kind)):
            if item["name"] == name:
                return f"{self._source.path.name}:{self._source.line((kind, index))}: {kind}[{index}]"
        return self._source.path.name


def _no_options(_item: dict[str, Any], _at: At, _source: Source) -> tuple[dict[str, Any], dict[str, bytes]]:
    return {}, {}
