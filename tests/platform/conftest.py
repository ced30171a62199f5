"""A platform in a temporary folder: real settings from a real platform.yml, a migrated SQLite database.

``db`` gives each test the database as it is after ``migrate``: a copy of one file, which also works for
what other threads see and for tables whose triggers refuse to be emptied.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

_FOLDER = Path(tempfile.mkdtemp(prefix="pam-platform-test-"))
atexit.register(shutil.rmtree, _FOLDER, ignore_errors=True)


def _set_up_django() -> None:
    config = _FOLDER / "platform.yml"
    config.write_text(f"public_url: http://127.0.0.1\nstate_dir: {_FOLDER}/state\nlisten: 127.0.0.1:1\n")
    (_FOLDER / "state").mkdir(mode=0o700)
    os.environ["PAM_PLATFORM_CONFIG"] = str(config)
    os.environ["DJANGO_SETTINGS_MODULE"] = "pam_platform.settings"
    import django
    from django.db import connection
    from django.test.utils import setup_test_environment

    django.setup()
    # Nothing here need survive a power loss, and a commit without a sync is ten times faster.
    connection.settings_dict["OPTIONS"]["init_command"] = "PRAGMA journal_mode=WAL; PRAGMA synchronous=OFF"
    setup_test_environment()


_set_up_django()


class Settings:
    """Assigning to an attribute overrides that Django setting until the test ends."""

    def __init__(self) -> None:
        object.__setattr__(self, "_overrides", [])

    def __setattr__(self, name: str, value: object) -> None:
        from django.test.utils import override_settings

        override = override_settings(**{name: value})
        override.enable()
        self._overrides.append(override)

    def undo(self) -> None:
        for override in reversed(self._overrides):
            override.disable()


@pytest.fixture
def settings() -> Iterator[Settings]:
    overrides = Settings()
    yield overrides
    overrides.undo()


@pytest.fixture(scope="session")
def _migrated() -> Path:
    """The database file after ``migrate``, closed."""
    from django.core.management import call_command
    from django.db import connection

    call_command("migrate", verbosity=0)
    call_command("createcachetable", verbosity=0)
    with connection.cursor() as cursor:
        cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    template = _FOLDER / "template.sqlite3"
    shutil.copyfile(connection.settings_dict["NAME"], template)
    return template


@pytest.fixture
def db(_migrated: Path, settings: Settings, tmp_path: Path) -> Iterator[None]:
    """The migrated, empty database, and an empty folder for recordings."""
    from django.db import connection, connections

    connections.close_all()
    # Every thread's connection is made from this dict. A file of its own for each test: a thread of the
    # one before may still have its own open.
    connection.settings_dict["NAME"] = tmp_path / "platform.sqlite3"
    shutil.copyfile(_migrated, tmp_path / "platform.sqlite3")
    settings.PAM_RECORDINGS_DIR = tmp_path / "recordings"
    # Each real hash costs 0.3 s, by design.
    settings.PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
    yield
    connections.close_all()


@pytest.fixture
def audit_trail(db: None) -> Callable[[], list[tuple[Any, ...]]]:
    """What was recorded, oldest first: (actor, action, object, outcome, details)."""
    from pam_platform.audit.models import AuditEvent

    fields = ("actor", "action", "object", "outcome", "details")
    return lambda: list(AuditEvent.objects.order_by("id").values_list(*fields))


@pytest.fixture(scope="session")
def oidc_key() -> str:
    """An RSA key in PEM, as ``init`` makes one."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    return (
        rsa.generate_private_key(65537, 2048)
        .private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        .decode()
    )


@pytest.fixture
def live_url(db: None, settings: Settings, oidc_key: str) -> Iterator[str]:
    """The platform behind a real HTTP socket on a loopback port; its address."""
    from django.contrib.staticfiles.handlers import StaticFilesHandler
    from django.test.testcases import LiveServerThread

    settings.IDP_OIDC_PRIVATE_KEY = oidc_key
    server = LiveServerThread("127.0.0.1", StaticFilesHandler)
    server.start()
    server.is_ready.wait()
    if server.error:
        raise server.error
    settings.PAM_ISSUER = f"http://127.0.0.1:{server.port}"
    yield f"http://127.0.0.1:{server.port}"
    server.terminate()


@pytest.fixture
def recording_key(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The private key that opens recordings here."""
    from pam_platform.vault import keys

    monkeypatch.setattr(keys, "recording_private_keys", lambda: [b"k" * 32])
    return b"k" * 32


@pytest.fixture
def new_session(db: None) -> Callable[..., Any]:
    """Stores a session of ``user`` (default: alice, made if missing) that is granted now for 8 h."""
    from django.utils import timezone

    from pam_common.keys import new_session_id
    from pam_platform.access.models import Session
    from pam_platform.accounts.models import User

    def new(user: User | None = None, **fields: Any) -> Session:
        user = user or User.objects.get_or_create(username="alice")[0]
        now = timezone.now()
        values = {
            "user": user,
            "user_name": user.username,
            "account_name": "prod-db/readonly",
            "protocol": "postgres",
            "gateway_name": "dc1",
            "policy_name": "everything",
            "client_key": "c" * 43,
            "granted": now,
            "grant_expires": now + timedelta(seconds=120),
            "session_end": now + timedelta(hours=8),
            "idle_limit": 0,
        }
        return Session.objects.create(id=new_session_id(), **{**values, **fields})

    return new


# --- an initialised platform, and those who talk to it -------------------------------------------------


class Snapshots:
    """Databases as they were, so that what many tests begin with is made once."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}

    def restore(self, name: str, make: Callable[[], Any]) -> Any:
        """Make the current database what ``make`` made of it the first time; what that returned."""
        from django.db import connection, connections

        file = _FOLDER / f"{name}.sqlite3"
        if name not in self._values:
            value = make()
            with connection.cursor() as cursor:
                cursor.execute("VACUUM INTO %s", [str(file)])
            self._values[name] = value
            return value
        connections.close_all()
        database = Path(connection.settings_dict["NAME"])
        for leftover in database.parent.glob(f"{database.name}-*"):
            leftover.unlink()
        shutil.copyfile(file, database)
        return self._values[name]


@pytest.fixture(scope="session")
def _snapshots() -> Snapshots:
    return Snapshots()


@pytest.fixture
def platform(db: None, _snapshots: Snapshots) -> Iterator[None]:
    """The database as ``init`` leaves it: a vault key and the platform's own keys."""
    from pam_platform.accounts.oauth import ensure_clients
    from pam_platform.config import current
    from pam_platform.fleet import inbox
    from pam_platform.vault import keys, master

    def init() -> Any:
        current().keys_dir.mkdir(mode=0o700, exist_ok=True)
        vault_keys = [master.generate()]
        master.write(master.source(), vault_keys)
        for purpose in keys.PURPOSES:
            keys.ensure(purpose)
        ensure_clients()
        return vault_keys

    master.write(master.source(), _snapshots.restore("init", init))
    yield
    inbox.stop_waiting()
    inbox._waiting, inbox._ending = None, False


class Peer:
    """An agent or relay with real keys, which signs each of its requests; through Django's test client."""

    def __init__(self, kind: str, name: str) -> None:
        from django.test import Client

        from pam_common.keys import SigningKey
        from pam_common.secure_channel import generate_x25519

        self.kind, self.name = kind, name
        self.identity = SigningKey.generate()
        self.noise, self.sealing = generate_x25519(), generate_x25519()
        self.host = SigningKey.generate()
        self._client = Client()

    def public(self) -> dict[str, str]:
        from pam_common.keys import b64encode
        from pam_common.secure_channel import x25519_public

        named = {"identity_key": self.identity.public, "host_key": self.host.public}
        if self.kind == "agent":
            named = {
                "identity_key": self.identity.public,
                "noise_key": x25519_public(self.noise),
                "sealing_key": x25519_public(self.sealing),
            }
        return {name: b64encode(key) for name, key in named.items()}

    def token(self, **changes: Any) -> str:
        """A request's JWT; ``changes`` spoil it: claims, or typ, lifetime, now, key."""
        from django.conf import settings

        from pam_common import tokens

        typ = changes.pop("typ", {"agent": tokens.AGENT_REQUEST, "relay": tokens.RELAY_REQUEST}[self.kind])
        key, lifetime = changes.pop("key", self.identity), changes.pop("lifetime", 60)
        now = changes.pop("now", None)
        claims = {"iss": self.name, "sub": self.name, "aud": settings.PAM_ISSUER, "jti": os.urandom(8).hex()}
        return tokens.sign(key, typ, {**claims, **changes}, lifetime=lifetime, now=now)

    def enrol(self, token: str, **changes: Any) -> Any:
        body = {"token": token, "name": self.name, "version": "1.0", **self.public(), **changes}
        return self.call("POST", f"/{self.kind}/enrol", body, token=self.token(aud="pam-enrol"))

    def call(
        self, method: str, path: str, body: Any = None, *, token: str | None = None, **query: Any
    ) -> Any:
        """One request; Django's test response."""
        return self._client.generic(
            method,
            f"/api/v1{path}",
            json.dumps({} if body is None else body),
            content_type="application/json",
            query_params=query or None,
            headers={"Authorization": f"Bearer {token or self.token()}"},
        )


@pytest.fixture
def new_peer(platform: None) -> Callable[[str, str], Peer]:
    """Makes a Peer that is not enrolled: ``new_peer("agent", "dc1-a")``."""
    return Peer


@pytest.fixture
def enrolled(new_peer: Callable[[str, str], Peer]) -> Callable[..., Peer]:
    """Enrols an agent (of ``gateway``, made if missing) or a relay through the real endpoint."""
    from pam_platform.fleet.enrolment import create_token
    from pam_platform.fleet.models import Gateway, Relay

    def enrol(kind: str, name: str, gateway: str = "dc1") -> Peer:
        if kind == "agent":
            Gateway.objects.get_or_create(name=gateway)
        else:
            Relay.objects.get_or_create(name=name, defaults={"host": "relay.example.com", "port": 2222})
        token, _ = create_token(kind, name, gateway if kind == "agent" else None, actor="test")
        peer = new_peer(kind, name)
        assert peer.enrol(token).status_code == 200
        return peer

    return enrol


class Person:
    """Somebody with an access token, calling the API through Django's test client."""

    def __init__(self, user: Any) -> None:
        from allauth.idp.oidc.models import Token
        from django.test import Client
        from django.utils import timezone

        self.user = user
        self.value = os.urandom(20).hex()
        token = Token(
            type=Token.Type.ACCESS_TOKEN,
            user=user,
            client_id="pam-client",
            expires_at=timezone.now() + timedelta(minutes=5),
        )
        token.set_value(self.value)
        token.save()
        self._client = Client()

    def call(self, method: str, path: str, body: Any = None, **query: Any) -> Any:
        return self._client.generic(
            method,
            f"/api/v1{path}",
            json.dumps({} if body is None else body),
            content_type="application/json",
            query_params=query or None,
            headers={"Authorization": f"Bearer {self.value}"},
        )

    def connect(self, resource: str = "prod-db", account: str | None = "readonly", **changes: Any) -> Any:
        """``POST /connect`` with fresh keys."""
        from pam_common.keys import SigningKey, b64encode
        from pam_common.secure_channel import generate_x25519, x25519_public

        self.ssh, self.noise = SigningKey.generate(), generate_x25519()
        body = {
            "resource": resource,
            "account": account,
            "ssh_key": b64encode(self.ssh.public),
            "noise_key": b64encode(x25519_public(self.noise)),
        }
        return self.call("POST", "/connect", {**body, **changes})


@pytest.fixture
def person(platform: None) -> Callable[..., Person]:
    """Makes (or finds) a user and logs them in: ``person("alice", groups=["dba"], is_admin=True)``."""
    from pam_platform.accounts.models import Group, User

    def make(name: str, groups: tuple[str, ...] = (), **fields: Any) -> Person:
        user, _ = User.objects.get_or_create(username=name, defaults=fields)
        for group in groups:
            user.groups.add(Group.objects.get_or_create(name=group)[0])
        return Person(user)

    return make


ACCESS = """
groups: [{name: dba}, {name: audit}]
users:
  - {name: alice, groups: [dba]}
  - {name: bob}
  - {name: root, roles: [admin]}
gateways: [{name: dc1}, {name: dc2}]
relays: [{name: r1, host: relay.example.com, port: 2222}]
resources:
  - name: prod-db
    protocol: postgres
    gateway: dc1
    host: 10.0.0.5
    port: 5432
    tls: {mode: require}
    accounts:
      - {name: readonly, user: app_ro, password: {file: ro}, databases: [app, stats]}
      - {name: owner, user: app_rw, password: {file: rw}, allow_replication: true}
  - name: other-db
    protocol: postgres
    gateway: dc2
    host: 10.9.0.5
    port: 5432
    tls: {mode: disable}
    accounts: [{name: readonly, password: {file: ro}}]
policies:
  - name: dba-prod
    groups: [dba]
    accounts: ["prod-db/*"]
    max_duration: 8h
    idle_limit: 30m
    review: [audit]
"""


@pytest.fixture
def access_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes access.yml beside its secrets; ``change`` edits the parsed document first."""
    import yaml

    def write(change: Callable[[Any], None] = lambda document: None) -> Path:
        folder = tmp_path / "access"
        folder.mkdir(mode=0o700, exist_ok=True)
        for name in ("ro", "rw"):
            secret = folder / name
            if not secret.exists():
                secret.touch(mode=0o600)
                secret.write_text(f"password-of-{name}\n")
        document = yaml.safe_load(ACCESS)
        change(document)
        path = folder / "access.yml"
        path.write_text(yaml.safe_dump(document, sort_keys=False))
        return path

    return write


@pytest.fixture
def apply(platform: None, access_file: Callable[..., Path]) -> Callable[..., list[Any]]:
    """Applies access.yml (see ``access_file``); the changes."""
    from pam_platform.access.apply.document import load
    from pam_platform.access.apply.run import apply as run

    def do(
        change: Callable[[Any], None] = lambda document: None, *, prune: bool = False, dry_run: bool = False
    ) -> list[Any]:
        return run(load(access_file(change)), prune=prune, dry_run=dry_run, actor="test")

    return do


@pytest.fixture
def fleet(
    apply: Callable[..., list[Any]], enrolled: Callable[..., Peer], _snapshots: Snapshots
) -> dict[str, Peer]:
    """access.yml applied, and enrolled: agents dc1-a and dc1-b of dc1, dc2-a of dc2, relay r1."""

    def make() -> dict[str, Peer]:
        apply()
        agents = {"dc1-a": "dc1", "dc1-b": "dc1", "dc2-a": "dc2"}
        found = {name: enrolled("agent", name, gateway) for name, gateway in agents.items()}
        return {**found, "r1": enrolled("relay", "r1")}

    from django.utils import timezone

    from pam_platform.fleet.models import Agent

    found: dict[str, Peer] = _snapshots.restore("fleet", make)
    # The snapshot may be minutes old; the agents are alive.
    Agent.objects.update(last_seen=timezone.now())
    return found
