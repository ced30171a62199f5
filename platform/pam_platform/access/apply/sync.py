"""Compare one kind of thing with the database and write the difference."""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Iterator
from typing import Any

from allauth.idp.oidc.models import Client
from django.db.models import Model

from pam_common.errors import ConfigError
from pam_platform.access.apply import document
from pam_platform.access.apply.changes import SECRET, Change
from pam_platform.access.apply.hashes import Hashes
from pam_platform.access.apply.secrets import NamedSecrets
from pam_platform.access.models import Account, Policy, Resource
from pam_platform.accounts.models import Group, User
from pam_platform.accounts.oauth import ensure_service_client, revoke_tokens
from pam_platform.fleet.models import Gateway, Relay
from pam_platform.vault import keys, store
from pam_platform.vault.models import VaultEntry


def groups(names: Iterable[str]) -> Iterator[Change]:
    """Add missing groups."""
    have = set(Group.objects.values_list("name", flat=True))
    for name in names:
        if name not in have:
            Group.objects.create(name=name)
            yield Change("add", "group", name)


def gateways(names: Iterable[str]) -> Iterator[Change]:
    """Add missing gateways, each with the CA for logins to its SSH targets."""
    have = set(Gateway.objects.values_list("name", flat=True))
    for name in names:
        if name not in have:
            Gateway.objects.create(name=name)
            keys.ensure(keys.target_user_ca(name))
            yield Change("add", "gateway", name)


def relays(wanted: Iterable[document.Relay]) -> Iterator[Change]:
    """Relays by name; where they are reached."""
    for item in wanted:
        row = Relay.objects.filter(name=item.name).first()
        yield from _write(row or Relay(name=item.name), "relay", item.name, host=item.host, port=item.port)


def resources(wanted: Iterable[document.Resource]) -> Iterator[Change]:
    """Resources without their accounts."""
    places = {row.name: row for row in Gateway.objects.all()}
    for item in wanted:
        row = Resource.objects.select_related("gateway").filter(name=item.name).first()
        row = row or Resource(name=item.name)
        # Keys that a scan found belong to the place where it found them.
        stays = (row.protocol, row.host, row.port) == (item.protocol, item.host, item.port)
        named = NamedSecrets(row, item.secrets)
        yield from _write(
            row,
            "resource",
            item.name,
            shown=named.shown,
            protocol=item.protocol,
            gateway=places[item.gateway],
            host=item.host,
            port=item.port,
            tls_mode=item.tls_mode,
            server_name=item.server_name,
            tls_ca=item.tls_ca,
            client_cert=item.client_cert,
            rows_budget=item.rows_budget,
            options=item.options,
            scanned_keys=row.scanned_keys if stays else [],
        )
        named.save()


def accounts(wanted: Iterable[document.Account]) -> Iterator[Change]:
    """Accounts with their secrets, which the vault compares and keeps."""
    for item in wanted:
        resource = Resource.objects.get(name=item.resource)
        row = resource.accounts.select_related("password", "client_key").filter(name=item.name).first()
        row = row or Account(resource=resource, name=item.name)
        shown, dropped = _sync_secrets(row, item)
        named = NamedSecrets(row, item.secrets)
        yield from _write(
            row,
            "account",
            f"{item.resource}/{item.name}",
            shown={**shown, **named.shown},
            user=item.user,
            databases=list(item.databases),
            allow_replication=item.allow_replication,
            options=item.options,
        )
        named.save()
        VaultEntry.objects.filter(pk__in=dropped).delete()


def policies(wanted: Iterable[document.Policy]) -> Iterator[Change]:
    """Policies by name."""
    for item in wanted:
        row = Policy.objects.filter(name=item.name).first()
        yield from _write(
            row or Policy(name=item.name),
            "policy",
            item.name,
            users=list(item.users),
            groups=list(item.groups),
            accounts=list(item.accounts),
            max_duration=item.max_duration,
            idle_limit=item.idle_limit,
            review_groups=list(item.review_groups),
        )


def users(wanted: Iterable[document.User], hashes: Hashes) -> Iterator[Change]:
    """Users with groups, roles, password or client secret; one that was disabled stays so."""
    by_name = {group.name: group for group in Group.objects.all()}
    for item in wanted:
        row = User.objects.filter(username=item.name).first()
        if row is not None and row.is_service != item.service:
            raise ConfigError([f"user {item.name}: a person cannot become a service user, nor back"])
        shown: dict[str, tuple[Any, Any]] = {}
        had = tuple(sorted(row.group_names())) if row is not None else ()
        if had != item.groups:
            shown["groups"] = (list(had), list(item.groups))
        row = row or User(username=item.name, is_service=item.service)
        if item.password is not None and not hashes.match(item.password, row.password):
            shown["password"] = (None if row._state.adding else SECRET, SECRET)
            row.password = hashes.password(item)
            if not row._state.adding:
                # Whoever knew the old one may hold some; web sessions end with the hash they name.
                revoke_tokens(row)
        elif row._state.adding:
            row.set_unusable_password()
        yield from _write_user(row, item, by_name, shown, hashes)


def _write_user(
    row: User,
    item: document.User,
    by_name: dict[str, Group],
    shown: dict[str, tuple[Any, Any]],
    hashes: Hashes,
) -> Iterator[Change]:
    changes = list(
        _write(
            row,
            "user",
            item.name,
            shown=shown,
            email=item.email,
            is_auditor="auditor" in item.roles,
            is_admin="admin" in item.roles,
        )
    )
    row.groups.set([by_name[name] for name in item.groups])
    if item.client_secret is not None and _set_client_secret(row, item.client_secret, hashes):
        added = bool(changes) and changes[0].action == "add"
        fields = changes[0].fields if changes else {}
        old = None if added else SECRET
        changes = [
            Change(
                "add" if added else "change", "user", item.name, {**fields, "client_secret": (old, SECRET)}
            )
        ]
    yield from changes


def _set_client_secret(row: User, secret: str, hashes: Hashes) -> bool:
    """Whether that changed anything; `ensure_service_client` compares slowly, and only when it may."""
    client = Client.objects.filter(id=row.username, owner=row).first()
    if client is not None and hashes.match(secret, client.secret):
        return False
    return ensure_service_client(row, secret)


def _sync_secrets(row: Account, item: document.Account) -> tuple[dict[str, tuple[Any, Any]], list[str]]:
    """Put the account's secrets into the vault. Returns what to show, and entries no longer referred to."""
    shown: dict[str, tuple[Any, Any]] = {}
    dropped: list[str] = []
    for name in ("password", "client_key"):
        entry: VaultEntry | None = getattr(row, name)
        secret: bytes | None = getattr(item, name)
        if secret is None:
            if entry is not None:
                setattr(row, name, None)
                dropped.append(entry.pk)
                shown[name] = (SECRET, None)
        elif entry is None:
            setattr(row, name, store.put(secret))
            shown[name] = (None, SECRET)
        elif not hmac.compare_digest(store.reveal(entry), secret):
            store.replace(entry, secret)
            shown[name] = (SECRET, SECRET)
    return shown, dropped


def _write(
    row: Model, kind: str, name: str, *, shown: dict[str, tuple[Any, Any]] | None = None, **fields: Any
) -> Iterator[Change]:
    """Give ``row`` these fields and save it when anything differs; ``shown`` adds to what is reported."""
    new = row._state.adding
    differing: dict[str, tuple[Any, Any]] = {}
    for key, value in fields.items():
        old = None if new else getattr(row, key)
        if old != value:
            setattr(row, key, value)
            # An added thing shows what it has, not all it has not.
            for part, before, after in _each(key, old, value):
                if not new or after not in ("", [], False, 0, None):
                    differing[part] = (before, after)
    differing |= shown or {}
    if new or differing:
        row.save()
        yield Change("add" if new else "change", kind, name, differing)


def _each(key: str, old: Any, value: Any) -> Iterator[tuple[str, Any, Any]]:
    """What to show of a change: mappings key by key, ``options.jump.port``, and of those what differs."""
    if not isinstance(value, dict) and not isinstance(old, dict):
        yield key, _plain(old), _plain(value)
        return
    before, after = (one if isinstance(one, dict) else {} for one in (old, value))
    for name in sorted({*before, *after}):
        if before.get(name) != after.get(name):
            yield from _each(f"{key}.{name}", before.get(name), after.get(name))


def _plain(value: Any) -> Any:
    return value.name if isinstance(value, Gateway) else value
