"""The whole product on one machine, each part a process of its own, as a deployment would have them.

    with Stack(folder) as stack:
        stack.add_database(server)      # a PostgresServer as the resource demo-db
        stack.start()
        alice = stack.person("alice")
        alice.login()
        alice.run("connect", "demo-db/readonly", "--", "psql", "-c", "select 1")

Used by the demo, the end-to-end tests and the benches alike.
"""

from __future__ import annotations

import html.parser
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import requests
import yaml
from postgres_server import PostgresServer
from processes import Process, free_port, listens, wait_for

from pam_common.errors import UnavailableError

BIN = Path(sys.executable).parent


@dataclass
class Person:
    """Somebody with a login and a pam-client of their own."""

    stack: Stack
    name: str
    password: str
    home: Path

    def environment(self) -> dict[str, str]:
        keep = ("PATH", "LANG", "LC_ALL", "TERM", "HOME", "TMPDIR")
        return {
            **{name: os.environ[name] for name in keep if name in os.environ},
            "PAM_CLIENT_HOME": str(self.home),
            "PAM_PLATFORM": self.stack.url,
            # No desktop keyring: tokens go to the 0600 file.
            "PYTHON_KEYRING_BACKEND": "keyring.backends.null.Keyring",
        }

    def command(self, *words: str) -> list[str]:
        return [str(BIN / "pam-client"), *words]

    def run(self, *words: str, timeout: float = 120, check: bool = True, **options: Any) -> Any:
        """Run pam-client to its end; a CompletedProcess with text output."""
        done = subprocess.run(
            self.command(*words),
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            **options,
        )
        if check and done.returncode:
            raise RuntimeError(
                f"pam-client {' '.join(words)} exited with {done.returncode}\n{done.stdout}{done.stderr}"
                f"\n{self.stack.logs()}"
            )
        return done

    def newest(self) -> str:
        """The id of the session that this person opened last."""
        return str(json.loads(self.run("sessions", "ls", "--json").stdout)[0]["id"])

    def start(self, *words: str, **options: Any) -> subprocess.Popen[str]:
        """Start pam-client and leave it running; the caller ends it."""
        return subprocess.Popen(
            self.command(*words), env=self.environment(), text=True, start_new_session=True, **options
        )

    def web(self) -> requests.Session:
        """A browser's session, logged in through the real form."""
        browser = requests.Session()
        browser.trust_env = False
        browser.verify = str(self.stack.ca) if self.stack.ca else True
        login = f"{self.stack.url}/accounts/login/"
        fields = form_fields(browser.get(login, timeout=90).text)
        fields |= {"login": self.name, "password": self.password}
        answer = browser.post(login, data=fields, headers={"Referer": login}, timeout=90)
        if not any(name.endswith("sessionid") for name in browser.cookies.keys()):  # noqa: SIM118
            raise RuntimeError(f"web login failed with HTTP {answer.status_code}\n{self.stack.logs()}")
        return browser

    def login(self) -> str:
        """``pam-client login`` by the device flow, approved by posting the real web form; its output."""
        private = ("--platform", self.stack.url, "--platform-ca", str(self.stack.ca)) if self.stack.ca else ()
        process = self.start(
            "login", "--no-browser", *private, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        timer = threading.Timer(180, process.kill)
        timer.start()
        try:
            assert process.stdout is not None
            shown = ""
            for line in process.stdout:
                shown += line
                if code := re.search(r"\b([A-Z0-9]{4}-[A-Z0-9]{4})\b", shown):
                    self.approve(code[1])
                    break
            shown += process.stdout.read()
            if process.wait() != 0:
                raise RuntimeError(f"pam-client login failed\n{shown}\n{self.stack.logs()}")
            return shown
        finally:
            timer.cancel()
            process.kill()
            process.wait()

    def approve(self, code: str) -> None:
        """Approve a device code in the browser: enter the code, then confirm."""
        browser = self.web()
        page = f"{self.stack.url}/identity/o/device"
        answer = browser.get(page, params={"code": code}, timeout=90)
        for _ in range(3):
            fields = form_fields(answer.text, prefer="action=confirm")
            if not fields:
                return
            if "code" in fields and not fields["code"]:
                fields["code"] = code
            answer = browser.post(answer.url, data=fields, headers={"Referer": answer.url}, timeout=90)
            if answer.status_code >= 400:
                raise RuntimeError(f"device approval answered HTTP {answer.status_code}\n{answer.text[:500]}")
            if "confirm" not in answer.text:
                return


@dataclass
class Database:
    """A PostgreSQL server as a resource with its accounts: {label: (user, password)}."""

    server: PostgresServer
    resource: dict[str, Any]


@dataclass
class Stack:
    """One platform, one relay, agents and databases below ``folder`` (made if missing, mode 0700)."""

    folder: Path
    database_url: dict[str, str] | None = None  #: platform.yml's ``database``; None is SQLite
    ca: Path | None = None  #: the platform serves HTTPS (``tls`` in platform_config), signed by this CA
    agents: tuple[str, ...] = ("dc1-a",)
    platform_config: dict[str, Any] = field(default_factory=dict)
    agent_config: dict[str, Any] = field(default_factory=dict)
    relay_config: dict[str, Any] = field(default_factory=dict)
    relay_program: tuple[str | Path, ...] = (BIN / "pam-relay",)
    agent_program: tuple[str | Path, ...] = (BIN / "pam-agent",)
    people: tuple[str, ...] = ("alice", "bob")
    policy: dict[str, Any] = field(default_factory=dict)
    processes: dict[str, Process] = field(default_factory=dict)
    resources: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.port = free_port()
        self.relay_port = free_port()
        self.url = f"{'https' if self.ca else 'http'}://127.0.0.1:{self.port}"
        self.passwords = {name: secrets.token_urlsafe(12) for name in (*self.people, "root", "auditor")}

    def __enter__(self) -> Stack:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # -- what there is to reach --------------------------------------------------------------------

    def add_database(
        self, server: PostgresServer, *, name: str = "demo-db", database: str = "postgres", **extra: Any
    ) -> None:
        """Give ``server`` a read-only and an owner account, and make it a resource of gateway dc1."""
        readonly, owner = secrets.token_urlsafe(16), secrets.token_urlsafe(16)
        label = name.replace("-", "_")
        if server.sql("select count(*) from pg_database where datname = 'app'") == "0":
            server.sql("create database app")
        server.sql(
            f"create role {label}_ro login password '{readonly}' in role pg_read_all_data",
            f"create role {label}_rw login createdb password '{owner}'",
            f"grant all on database app to {label}_rw",
            database="app",
        )
        server.sql(f"grant all on schema public to {label}_rw", database="app")
        self.resources.append(
            {
                "name": name,
                "protocol": "postgres",
                "gateway": "dc1",
                "host": "127.0.0.1",
                "port": server.port,
                "tls": {"mode": "disable"},
                **extra,
                "accounts": [
                    {
                        "name": "readonly",
                        "user": f"{label}_ro",
                        "password": {"file": self._secret(f"{name}-ro", readonly)},
                        "databases": ["app"],
                    },
                    {
                        "name": "owner",
                        "user": f"{label}_rw",
                        "password": {"file": self._secret(f"{name}-rw", owner)},
                        "databases": ["app"],
                    },
                ],
            }
        )

    def access(self) -> dict[str, Any]:
        """The access.yml that describes this stack."""
        users: list[dict[str, Any]] = [
            {"name": name, "groups": ["dba"], "password": {"file": self._secret(name, self.passwords[name])}}
            for name in self.people
        ]
        users.append(
            {
                "name": "auditor",
                "groups": ["audit"],
                "roles": ["auditor"],
                "password": {"file": self._secret("auditor", self.passwords["auditor"])},
            }
        )
        policy = {
            "name": "everything",
            "groups": ["dba"],
            "accounts": ["*/*"],
            "max_duration": "8h",
            "idle_limit": "1h",
            "review": ["audit"],
            **self.policy,
        }
        return {
            "groups": [{"name": "dba"}, {"name": "audit"}],
            "users": users,
            "gateways": [{"name": "dc1"}],
            "relays": [{"name": "r1", "host": "127.0.0.1", "port": self.relay_port}],
            "resources": self.resources,
            "policies": [policy],
        }

    # -- life ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Initialise the platform, apply access.yml, enrol and start everything, wait until it is usable."""
        if "platform" not in self.processes or not self.processes["platform"].running():
            self.start_platform()
        self.start_relay()
        for name in self.agents:
            self.start_agent(name)
        wait_for(self._routed, "the agents' routes on the relay")

    def start_platform(self) -> None:
        if not (self.folder / "platform.yml").exists():
            self._write_platform()
        command = [BIN / "pam-platform", "--config", self.folder / "platform.yml", "serve"]
        server = Process("platform", command, self.folder / "platform.log")
        self.processes["platform"] = server
        server.ready_when(lambda: listens(self.port) and self._healthy())

    def start_relay(self, name: str = "r1") -> None:
        config = self.folder / "relay.yml"
        if not config.exists():
            self._yaml(
                config,
                {
                    "platform": self.url,
                    "state_dir": str(self._private("relay")),
                    "runtime_dir": str(self._private("relay-run")),
                    "listen": f"127.0.0.1:{self.relay_port}",
                    **self._trusts(),
                    **self.relay_config,
                },
            )
            self._enrol("pam-relay", config, "relay", name)
        command = [*self.relay_program, "--config", config, "run"]
        process = Process("relay", command, self.folder / "relay.log")
        self.processes["relay"] = process
        process.ready_when(lambda: listens(self.relay_port))

    def start_agent(self, name: str) -> Process:
        config = self.folder / f"{name}.yml"
        if not config.exists():
            self._yaml(
                config,
                {
                    "platform": self.url,
                    "state_dir": str(self._private(name)),
                    "runtime_dir": str(self._private(f"{name}-run")),
                    "allow_targets": [f"127.0.0.1:{resource['port']}" for resource in self.resources],
                    **self._trusts(),
                    **self.agent_config,
                },
            )
            self._enrol("pam-agent", config, "agent", name, "--gateway", "dc1")
        command = [*self.agent_program, "--config", config, "run"]
        process = Process(name, command, self.folder / f"{name}.log")
        self.processes[name] = process
        return process

    def restart_agent(self, name: str) -> None:
        """Start an agent that has ended, and wait until the relay knows the way to it."""
        log = self.folder / "relay.log"
        before = log.read_text().count("route added")
        self.start_agent(name)
        # Not for just any route: the dead one's may be listed for a moment longer.
        wait_for(lambda: log.read_text().count("route added") > before, f"a new route to {name}", timeout=120)

    def stop(self) -> None:
        for name in reversed(list(self.processes)):
            self.processes.pop(name).stop()

    def apply(self, *options: str) -> str:
        """Write access.yml anew and apply it; the command's output."""
        self._yaml(self.folder / "access.yml", self.access())
        return self.platform("apply", "-f", str(self.folder / "access.yml"), *options)

    def platform(self, *words: str) -> str:
        """Run a pam-platform command; its output."""
        command = [BIN / "pam-platform", "--config", self.folder / "platform.yml", *words]
        return _run(command)

    def status(self, program: str, name: str, *, well: bool = True) -> dict[str, Any]:
        """What ``pam-agent status --json`` or ``pam-relay status --json`` says; raises RuntimeError when it
        is not well, unless that is no matter here."""
        command = [BIN / program, "--config", self.folder / f"{name}.yml", "status", "--json"]
        give_up = time.monotonic() + 60
        while True:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            # Nothing answers yet, or not within its five seconds.
            if done.returncode != UnavailableError.exit_code or time.monotonic() > give_up:
                break
        if done.returncode and (well or not done.stdout):
            raise RuntimeError(f"{program} status exited with {done.returncode}\n{done.stdout}{done.stderr}")
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def person(self, name: str) -> Person:
        return Person(self, name, self.passwords[name], self._private(f"home-{name}"))

    def logs(self) -> str:
        return "\n".join(process.tail() for process in self.processes.values())

    # -- parts ---------------------------------------------------------------------------------------

    def _write_platform(self) -> None:
        config: dict[str, Any] = {
            "public_url": self.url,
            "state_dir": str(self._private("platform")),
            "listen": f"127.0.0.1:{self.port}",
            **self.platform_config,
        }
        if self.database_url:
            config["database"] = self.database_url
        self._yaml(self.folder / "platform.yml", config)
        password = self._secret("root", self.passwords["root"])
        self.platform("init", "--admin", "root", "--password-file", password)
        self.apply()

    def _enrol(self, program: str, config: Path, kind: str, name: str, *options: str) -> None:
        token = self.platform("enrol-token", kind, name, *options, "--quiet").strip()
        file = self._secret(f"{name}-token", token)
        _run([BIN / program, "--config", config, "enrol", "--token-file", file, "--name", name])

    def _routed(self) -> bool:
        for name in self.agents:
            if not self.processes[name].running():
                raise RuntimeError(f"{name} ended\n{self.logs()}")
        routes = self.status("pam-relay", "relay").get("routes", [])
        return len({route["agent"] for route in routes}) == len(self.agents)

    def _healthy(self) -> bool:
        try:
            verify = str(self.ca) if self.ca else True
            answer = requests.get(f"{self.url}/api/v1/health", timeout=10, verify=verify)
            return answer.status_code == 200
        except requests.RequestException:
            return False

    def _trusts(self) -> dict[str, str]:
        return {"platform_ca": str(self.ca)} if self.ca else {}

    def _private(self, name: str) -> Path:
        folder = self.folder / name
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder

    def _secret(self, name: str, value: str) -> str:
        path = self._private("secrets") / name
        path.touch(mode=0o600)
        path.write_text(value)
        return str(path)

    def _yaml(self, path: Path, content: dict[str, Any]) -> None:
        path.touch(mode=0o600)
        path.write_text(yaml.safe_dump(content, sort_keys=False))


def remove(folder: Path) -> None:
    """Delete a stack's folder with all it holds."""
    shutil.rmtree(folder, ignore_errors=True)


class _Form(html.parser.HTMLParser):
    """The named fields of every form of a page, with the values a browser would send."""

    def __init__(self) -> None:
        super().__init__()
        self.forms: list[dict[str, str]] = []
        self.buttons: list[list[tuple[str, str]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag == "form":
            self.forms.append({})
            self.buttons.append([])
        elif not self.forms or not given.get("name"):
            return
        elif tag == "button" or given.get("type") == "submit":
            self.buttons[-1].append((given["name"], given.get("value", "")))
        elif tag == "input" and given.get("type") not in ("checkbox", "radio"):
            self.forms[-1][given["name"]] = given.get("value", "")


def form_fields(page: str, *, prefer: str = "") -> dict[str, str]:
    """The fields of the form that asks for something (the last one with fields besides the CSRF token),
    with the button ``prefer`` ("name=value") pressed if the form has it."""
    parser = _Form()
    parser.feed(page)
    for fields, buttons in reversed(list(zip(parser.forms, parser.buttons, strict=True))):
        pressed = dict([tuple(prefer.split("=", 1))]) if prefer else {}
        if any(button in pressed.items() for button in buttons):
            return fields | pressed
        if set(fields) - {"csrfmiddlewaretoken", "next"}:
            return fields
    return {}


def _run(command: list[Any]) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(map(str, command))} exited with {done.returncode}\n{done.stdout}{done.stderr}"
        )
    return done.stdout
