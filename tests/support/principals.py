"""Everybody who may talk to a platform, with real logins, keys and a recorded session between them.

    with inhabited(folder, database) as world:
        world["owner"].call("GET", f"/api/v1/sessions/{world.session}")

The platform is a real ``pam-platform serve``; people log in through its forms and the device flow, programs
by client credentials, agents and relays enrol with keys of their own.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import requests
from postgres_server import PostgresServer
from stack import Stack, form_fields

from pam_common import tokens
from pam_common.keys import SigningKey, b64encode
from pam_common.recording import PartWriter, Recipient
from pam_common.secure_channel import generate_x25519, x25519_public

GATEWAYS = ("dc1", "dc2")
#: How often ``agent`` is heard of. One that was silent for a minute counts as not running.
HEARTBEAT = 5.0
#: After so long another access token is asked for; one lives 15 minutes, which the tests may take longer.
TOKEN_AGE = 300.0
#: Name in the tests -> user. ``reviewer`` is in the group that the policy lets review, ``auditor`` is not.
PEOPLE = {
    "owner": "alice",
    "other": "bob",
    "reviewer": "rita",
    "auditor": "arne",
    "admin": "root",
    "disabled": "dora",
}


class Town(Stack):
    """A stack of which only the platform runs: its access.yml names everybody the tests need."""

    def __init__(self, folder: Path, database: dict[str, str] | None) -> None:
        super().__init__(folder=folder, agents=(), people=(*PEOPLE.values(), "victim"), database_url=database)
        self.client_secret = secrets.token_urlsafe(32)

    def access(self) -> dict[str, Any]:
        groups = {"alice": ["dba"], "dora": ["dba"], "rita": ["audit"]}
        roles = {"rita": ["auditor"], "arne": ["auditor"], "root": ["admin"]}
        users: list[dict[str, Any]] = [
            {
                "name": name,
                "groups": groups.get(name, []),
                "roles": roles.get(name, []),
                "password": {"file": self._secret(name, self.passwords[name])},
            }
            for name in self.people
        ]
        secret = {"file": self._secret("robot", self.client_secret)}
        users.append({"name": "robot", "service": True, "groups": ["dba"], "client_secret": secret})
        return {
            "groups": [{"name": "dba"}, {"name": "audit"}],
            "users": users,
            "gateways": [{"name": name} for name in (*GATEWAYS, "doomed")],
            "relays": [
                {"name": name, "host": "127.0.0.1", "port": self.relay_port}
                for name in ("r1", "r2", "r3", "r4")
            ],
            "resources": [
                {
                    "name": "prod-db",
                    "protocol": "postgres",
                    "gateway": "dc1",
                    "host": "127.0.0.1",
                    "port": 5432,
                    "tls": {"mode": "disable"},
                    "accounts": [{"name": "readonly", "password": {"file": self._secret("ro", "hunter2")}}],
                },
                {
                    "name": "web-01",
                    "protocol": "ssh",
                    "gateway": "dc1",
                    "host": "127.0.0.1",
                    "port": 22,
                    "accounts": [{"name": "deploy", "password": {"file": self._secret("ro", "hunter2")}}],
                },
            ],
            "policies": [
                {
                    "name": "dba-prod",
                    "groups": ["dba"],
                    "accounts": ["prod-db/*"],
                    "max_duration": "8h",
                    "review": ["audit"],
                }
            ],
        }


@dataclass
class Principal:
    """Somebody who sends requests. Without Authorization: anonymous, or a browser by its cookies."""

    name: str
    url: str
    http: requests.Session = field(default_factory=requests.Session)

    def __post_init__(self) -> None:
        self.http.trust_env = False

    def authorization(self) -> str | None:
        return None

    def call(self, method: str, path: str, **options: Any) -> requests.Response:
        """One request; redirects are not followed. ``options`` as for requests; headers are added to ours."""
        headers = {**options.pop("headers", {})}
        if (value := self.authorization()) is not None:
            headers.setdefault("Authorization", value)
        options = {"timeout": 90, "allow_redirects": False, **options}
        return self.http.request(method, self.url + path, headers=headers, **options)


@dataclass
class Holder(Principal):
    """A person or program with an access token, which ``ask`` gets from the platform."""

    ask: Callable[[], str] = str

    def __post_init__(self) -> None:
        super().__post_init__()
        self._token, self._since = self.ask(), time.monotonic()

    def authorization(self) -> str:
        # Not of somebody who is disabled: theirs is refused, and they get no other.
        if self.name != "disabled" and time.monotonic() - self._since > TOKEN_AGE:
            self._token, self._since = self.ask(), time.monotonic()
        return f"Bearer {self._token}"


@dataclass
class Machine(Principal):
    """An agent or a relay, which signs each of its requests."""

    kind: str = "agent"
    label: str = ""
    identity: SigningKey = field(default_factory=SigningKey.generate)
    answer: dict[str, Any] = field(default_factory=dict)

    def authorization(self) -> str:
        return f"Bearer {self.request_token()}"

    def request_token(self, audience: str | None = None, **header: Any) -> str:
        typ = {"agent": tokens.AGENT_REQUEST, "relay": tokens.RELAY_REQUEST}[self.kind]
        claims = {"iss": self.label, "sub": self.label, "aud": audience or self.url}
        return tokens.sign(self.identity, typ, {**claims, "jti": secrets.token_hex(8)}, lifetime=60)

    def enrolment(self, token: str) -> dict[str, str]:
        """The body of an enrolment with fresh public keys."""
        body = {"token": token, "name": self.label, "identity_key": b64encode(self.identity.public)}
        others = ("noise_key", "sealing_key") if self.kind == "agent" else ("host_key",)
        return body | {name: b64encode(x25519_public(generate_x25519())) for name in others}

    def enrol(self, token: str) -> None:
        headers = {"Authorization": f"Bearer {self.request_token('pam-enrol')}"}
        answer = self.call("POST", f"/api/v1/{self.kind}/enrol", json=self.enrolment(token), headers=headers)
        assert answer.status_code == 200, answer.text
        self.answer = answer.json()


@dataclass
class World:
    """The platform, everybody by name, and the session that ``owner`` has and ``agent`` recorded."""

    town: Town
    principals: dict[str, Principal] = field(default_factory=dict)
    browsers: dict[str, Principal] = field(default_factory=dict)
    session: str = ""
    head: dict[str, Any] = field(default_factory=dict)  #: the final head of its recording
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def __getitem__(self, name: str) -> Principal:
        return self.principals[name]

    @property
    def url(self) -> str:
        return self.town.url

    def audit(self, **wanted: str) -> list[dict[str, Any]]:
        """The newest events of the audit trail, newest first, whose fields are ``wanted``."""
        answer = self["admin"].call("GET", "/api/v1/audit", params={"limit": 200})
        rows: list[dict[str, Any]] = answer.json()["events"]
        return [row for row in rows if all(row[name] == value for name, value in wanted.items())]

    def actor(self, name: str) -> str:
        """How the audit trail calls the principal ``name``."""
        found = self[name]
        return f"{found.kind} {found.label}" if isinstance(found, Machine) else PEOPLE.get(name, "robot")

    def machine(self, kind: str, name: str, gateway: str | None = None) -> Machine:
        """An agent or relay that has just enrolled."""
        found = Machine(name, self.url, kind=kind, label=name)
        found.enrol(self.enrol_token(kind, name, gateway))
        return found

    def enrol_token(self, kind: str, name: str, gateway: str | None = None) -> str:
        body = {"kind": kind, "name": name, "gateway": gateway}
        answer = self["admin"].call("POST", "/api/v1/enrol-tokens", json=body)
        assert answer.status_code == 200, answer.text
        token: str = answer.json()["token"]
        return token

    def fresh_name(self) -> str:
        return f"fresh-{next(self._numbers)}"

    def new_session(self, *, opened: bool = True) -> str:
        """A session of the owner; ``opened``: by ``agent``, which has recorded nothing of it yet."""
        answer = self["owner"].call("POST", "/api/v1/connect", json=connect_body())
        assert answer.status_code == 200, answer.text
        session: str = answer.json()["session"]
        if opened:
            answer = self["agent"].call("POST", f"/api/v1/agent/sessions/{session}/open", json={})
            assert answer.status_code == 200, answer.text
        return session

    def new_scan(self) -> str:
        """A scan of web-01's host keys that ``agent`` is asked for."""
        words = ("resource", "scan", "web-01", "--agent", "dc1-a", "--wait", "0", "--json")
        scan: str = json.loads(self.town.platform(*words))["scan"]
        return scan

    def recording(self, session: str) -> tuple[bytes, dict[str, Any]]:
        """What ``agent`` would upload as part 1 of ``session``: the whole file and its final head."""
        agent = self["agent"]
        assert isinstance(agent, Machine)
        writer = PartWriter(
            session=session,
            part=1,
            agent=agent.label,
            identity_kid=agent.identity.kid,
            created=int(time.time()),
            recipients=[Recipient.from_json(one) for one in agent.answer["recording_recipients"]],
            statement=agent.answer["statement"],
        )
        data = writer.opening + writer.append(1.5, 1, [{"kind": "query", "sql": "select 'recorded'"}])
        data += writer.finish()
        head = writer.head(int(time.time()), "client closed").sign(agent.identity)
        return data + head.to_trailer(agent.identity.kid), head.to_json()

    def upload(self, session: str) -> dict[str, Any]:
        """Upload a whole recording of ``session``; its final head."""
        data, head = self.recording(session)
        path = f"/api/v1/agent/recordings/{session}/1"
        answer = self["agent"].call("PUT", f"{path}?offset=0", data=data)
        assert answer.json() == {"received": len(data)}, answer.text
        answer = self["agent"].call("POST", f"{path}/head", json=head)
        assert answer.json() == {"complete": True}, answer.text
        return head


def connect_body(**changes: Any) -> dict[str, Any]:
    keys = {name: b64encode(x25519_public(generate_x25519())) for name in ("ssh_key", "noise_key")}
    return {"resource": "prod-db", "account": "readonly", **keys, **changes}


@contextlib.contextmanager
def inhabited(folder: Path, database: str) -> Iterator[World]:
    """A running platform on ``database`` ("sqlite" or "postgres") with everybody in it."""
    with contextlib.ExitStack() as stack:
        server = None
        if database == "postgres":
            server = PostgresServer()
            stack.callback(server.stop)
        town = stack.enter_context(Town(folder, _url(folder, server)))
        town.start_platform()
        world = World(town)
        _populate(world)
        with _heard_of(world):
            yield world


@contextlib.contextmanager
def _heard_of(world: World) -> Iterator[None]:
    """Meanwhile ``agent`` asks its inbox as one that runs does, or nothing could be granted in the end."""
    over = threading.Event()
    # With connections of its own, since this is another thread.
    agent = replace(world["agent"], http=requests.Session())

    def ask() -> None:
        while not over.wait(HEARTBEAT):
            with contextlib.suppress(requests.RequestException):
                agent.call("GET", "/api/v1/agent/inbox")

    thread = threading.Thread(target=ask, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _url(folder: Path, server: PostgresServer | None) -> dict[str, str] | None:
    if server is None:
        return None
    password = secrets.token_urlsafe(16)
    server.sql(f"create role pam login password '{password}'", "create database pam owner pam")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = folder / "database-password"
    file.touch(mode=0o600)
    file.write_text(password)
    return {"url": f"postgresql://pam@127.0.0.1:{server.port}/pam", "password_file": str(file)}


def _populate(world: World) -> None:
    world.principals["anonymous"] = Principal("anonymous", world.url)
    for name, user in PEOPLE.items():
        browser = Principal(name, world.url, http=world.town.person(user).web())
        world.browsers[name] = browser
        world.principals[name] = Holder(name, world.url, ask=partial(_device_token, browser))
    world.principals["service"] = Holder("service", world.url, ask=partial(_service_token, world))
    world.principals["agent"] = world.machine("agent", "dc1-a", "dc1")
    world.principals["sibling"] = world.machine("agent", "dc1-b", "dc1")
    world.principals["foreign"] = world.machine("agent", "dc2-a", "dc2")
    world.principals["relay"] = world.machine("relay", "r1")
    world.principals["revoked agent"] = world.machine("agent", "dc1-c", "dc1")
    world.principals["revoked relay"] = world.machine("relay", "r2")
    world.session = world.new_session()
    world.head = world.upload(world.session)
    for path in ("users/dora/disable", "agents/dc1-c/revoke", "relays/r2/revoke"):
        answer = world["admin"].call("POST", f"/api/v1/{path}")
        assert answer.status_code == 200, answer.text


def _device_token(browser: Principal) -> str:
    """An access token by the device flow, approved in ``browser``."""
    programs = Principal("", browser.url)
    asked = programs.call("POST", "/identity/o/api/device/code", data={"client_id": "pam-client"}).json()
    page = browser.call("GET", "/identity/o/device", params={"code": asked["user_code"]})
    fields = form_fields(page.text, prefer="action=confirm")
    browser.call("POST", page.url.removeprefix(browser.url), data=fields, headers={"Referer": page.url})
    form = {
        "grant_type": "urn:ietf:params:oauth:grant-type:device_code",
        "client_id": "pam-client",
        "device_code": asked["device_code"],
    }
    answer = programs.call("POST", "/identity/o/api/token", data=form)
    assert answer.status_code == 200, answer.text
    token: str = answer.json()["access_token"]
    return token


def _service_token(world: World) -> str:
    form = {"grant_type": "client_credentials"}
    auth = ("robot", world.town.client_secret)
    answer = world["anonymous"].call("POST", "/identity/o/api/token", data=form, auth=auth)
    assert answer.status_code == 200, answer.text
    token: str = json.loads(answer.text)["access_token"]
    return token
