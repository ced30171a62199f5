"""The product on six hosts, as an inventory describes it: platform, relay, two gateways, a workstation.

==========  ===========  =================================================================================
platform    Debian 12    on a PostgreSQL of the controller's network
relay       Debian 13
gw1, gw2    Ubuntu, 12   gateway dc1, an agent each: one goes on while the other is upgraded
gw3         Debian 13    gateway dc2, two agents (pam-agent@2); its tokens come from the platform's API
desk        Ubuntu       where alice works
==========  ===========  =================================================================================

Nothing may connect to a gateway's host but the controller's ssh. The target, a PostgreSQL, is in the private
network, which only the gateways' hosts are in.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

from harness.hosts import Fleet, Host
from harness.images import ImageError, image
from harness.network import CONTROLLER_ADDRESS, PRIVATE_ADDRESS
from harness.people import Colleague
from harness.playbook import ROOT, Controller, Unsafe
from harness.servers import NamespacedPostgres, certified
from registry import fetch_wheels

SUITES = {
    "platform": "bookworm",
    "relay": "trixie",
    "gw1": "noble",
    "gw2": "bookworm",
    "gw3": "trixie",
    "desk": "noble",
}
GATEWAYS = {"gw1": "dc1", "gw2": "dc1", "gw3": "dc2"}
URL = "https://platform.test:8443"
SIGNER = "test@pam.invalid"
OLD, NEW = "1.0.0", "1.1.0"
#: A build takes half a minute, and much longer where its wheels come over a slow line.
BUILD_SECONDS = 600
#: How long an agent lets sessions go on: long enough for a bulk transfer, short enough to wait for.
DRAIN = 20
#: Passwords that a template, a shell and YAML would each understand; alice types hers, so it is a plain one.
HOSTILE = "{{ 7 * 7 }}{% raw %} '\"$(touch /tmp/pwned)`touch /tmp/pwned`; #: - !x \\ %s"


class Bundle:
    """The fleet with everything around it; ``close`` removes all of it."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        try:
            self._make()
        except BaseException:
            self._stack.close()
            raise

    def _make(self) -> None:
        self.fleet = self._stack.enter_context(Fleet())
        self.secrets = {name: secrets.token_urlsafe(18) for name in ("alice", "rita", "target", "deploy")}
        self.secrets |= {name: secrets.token_urlsafe(9) + HOSTILE for name in ("admin", "store")}
        self.signing = Signing(self.fleet.folder)
        self._stack.callback(self.signing.close)
        self._builds: dict[str, subprocess.Popen[bytes]] = {}
        self._stack.callback(self._end_builds)
        fetch_wheels()
        self.build(OLD)
        self.ca, self.certificate, self.key = certified(self.fleet.folder, "platform.test")
        for name, suite in SUITES.items():
            self.fleet.add(name, available(suite), private=name in GATEWAYS)
        self.fleet.boot()
        for name in GATEWAYS:
            self.fleet.network.refuse_inbound(name)
        network = self.fleet.network
        self.store = NamespacedPostgres(network.controller, CONTROLLER_ADDRESS)
        self._stack.callback(self.store.stop)
        self.target = NamespacedPostgres(network.private, PRIVATE_ADDRESS)
        self._stack.callback(self.target.stop)
        quoted = self.secrets["store"].replace("'", "''")
        self.store.sql(f"create role pam login password '{quoted}'", "create database pam owner pam")
        self.target.sql(
            f"create role app login password '{self.secrets['target']}' in role pg_read_all_data",
            "create database app",
        )
        self.controller = Controller(self.fleet, self.inventory())
        self.alice = Colleague(self["desk"], "alice", self.secrets["alice"], URL, self.ca)

    def __getitem__(self, name: str) -> Host:
        return self.fleet.hosts[name]

    def close(self) -> None:
        self._stack.close()

    # -- packages --------------------------------------------------------------------------------------

    def folder(self, version: str) -> Path:
        return self.fleet.folder / f"packages-{version}"

    def build(self, version: str) -> None:
        """Begin to build the packages of ``version``; ``packages`` waits for them."""
        self._builds[version] = self.signing.build(version, self.folder(version))

    def packages(self, version: str) -> Path:
        """The folder with the signed packages of ``version``."""
        folder, build = self.folder(version), self._builds[version]
        if build.wait(BUILD_SECONDS):
            raise RuntimeError(f"the packages were not built\n{folder.with_suffix('.log').read_text()}")
        return folder

    def both(self) -> Path:
        """A signed folder with the packages of two versions."""
        folder = self.folder("both")
        folder.mkdir()
        sums = ""
        for version in (OLD, NEW):
            for file in self.packages(version).glob("*.deb"):
                (folder / file.name).hardlink_to(file)
            sums += (self.packages(version) / "SHA256SUMS").read_text()
        (folder / "SHA256SUMS").write_text(sums)
        self.signing.sign(folder / "SHA256SUMS")
        return folder

    def _end_builds(self) -> None:
        for build in self._builds.values():
            build.kill()
            build.wait()

    # -- what an operator writes -----------------------------------------------------------------------

    def inventory(self) -> dict[str, Any]:
        return {
            "all": {
                "vars": {
                    "ansible_user": "ops",
                    "pam_common_platform_url": URL,
                    "pam_common_platform_ca_file": str(self.ca),
                    "pam_common_package_folder": str(self.folder(OLD)),
                    "pam_common_package_keyring": str(self.signing.keyring),
                }
            },
            "pam_platform": {"hosts": {"platform": self._at("platform")}, "vars": self._platform()},
            "pam_relays": {"hosts": {"relay": self._at("relay", pam_relay_host="relay.test")}},
            "pam_gateways": {
                "vars": {
                    "pam_agent_allow_targets": [f"{PRIVATE_ADDRESS}:5432"],
                    "pam_agent_settings": {"drain_timeout": DRAIN},
                },
                "children": {
                    "dc1": {
                        "hosts": {
                            "gw1": self._at("gw1", pam_agent_name="dc1-a"),
                            "gw2": self._at("gw2", pam_agent_name="dc1-b"),
                        },
                        "vars": {"pam_agent_gateway": "dc1"},
                    },
                    "dc2": {"hosts": {"gw3": self._gw3()}, "vars": {"pam_agent_gateway": "dc2"}},
                },
            },
            "pam_clients": {"hosts": {"desk": self._at("desk")}},
        }

    def _at(self, name: str, **variables: Any) -> dict[str, Any]:
        return {"ansible_host": self[name].address, **variables}

    def _gw3(self) -> dict[str, Any]:
        return self._at(
            "gw3",
            pam_agent_name="dc2-a",
            pam_agent_instances=[{"instance": "2", "name": "dc2-a-2"}],
            pam_common_token_source="api",
            pam_common_api_client_id="deploy",
            pam_common_api_client_secret=self.secrets["deploy"],
        )

    def _platform(self) -> dict[str, Any]:
        return {
            "pam_platform_tls_cert_file": str(self.certificate),
            "pam_platform_tls_key_file": str(self.key),
            "pam_platform_database_url": f"postgresql://pam@{CONTROLLER_ADDRESS}:5432/pam",
            "pam_platform_database_password": Unsafe(self.secrets["store"]),
            "pam_platform_admin": "root",
            "pam_platform_admin_password": Unsafe(self.secrets["admin"]),
            "pam_platform_access": self._access(),
            "pam_platform_access_secrets": {
                name: self.secrets[name] for name in ("alice", "rita", "target", "deploy")
            },
        }

    def _access(self) -> dict[str, Any]:
        def secret(name: str) -> dict[str, str]:
            return {"file": f"secrets/{name}"}

        def resource(name: str, gateway: str) -> dict[str, Any]:
            account = {"name": "app", "password": secret("target"), "databases": ["app"]}
            where = {"host": PRIVATE_ADDRESS, "port": 5432, "tls": {"mode": "disable"}}
            return {"name": name, "protocol": "postgres", "gateway": gateway, **where, "accounts": [account]}

        return {
            "groups": [{"name": "dba"}, {"name": "audit"}],
            "users": [
                {"name": "alice", "groups": ["dba"], "password": secret("alice")},
                {"name": "rita", "groups": ["audit"], "roles": ["auditor"], "password": secret("rita")},
                {
                    "name": "deploy",
                    "service": True,
                    "roles": ["admin"],
                    "client_secret": secret("deploy"),
                },
            ],
            "gateways": [{"name": "dc1"}, {"name": "dc2"}],
            "resources": [resource("prod-db", "dc1"), resource("far-db", "dc2")],
            "policies": [
                {
                    "name": "dba",
                    "groups": ["dba"],
                    "accounts": ["*/*"],
                    "max_duration": "1h",
                    "review": ["audit"],
                }
            ],
        }


class Signing:
    """A key that signs packages, in a keyring of its own."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "gnupg"
        self.home.mkdir(mode=0o700)
        self.keyring = folder / "signing-key.gpg"
        make = ["--passphrase", "", "--quick-generate-key", f"Test <{SIGNER}>", "ed25519", "sign", "1d"]
        self.gpg(*make)
        self.gpg("--output", str(self.keyring), "--export", SIGNER)

    def gpg(self, *words: str) -> None:
        command = ["gpg", "--batch", "--quiet", "--homedir", str(self.home), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"gpg: {done.stderr}")

    def build(self, version: str, folder: Path) -> subprocess.Popen[bytes]:
        """Begin to build the signed packages of ``version`` into ``folder``."""
        words = ["-m", "pam_packages", "build", "--out", str(folder), "--version", version, "--key", SIGNER]
        environment = {**os.environ, "GNUPGHOME": str(self.home), "PYTHONPATH": str(ROOT / "packaging")}
        with folder.with_suffix(".log").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, *words], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
            )

    def sign(self, file: Path) -> None:
        self.gpg("--yes", "--armor", "--detach-sign", "--output", f"{file}.asc", str(file))

    def close(self) -> None:
        """End gpg's agent, which the folder's removal alone would leave running."""
        command = ["gpgconf", "--homedir", str(self.home), "--kill", "all"]
        subprocess.run(command, capture_output=True, check=False)


@functools.cache
def available(suite: str) -> str:
    """``suite``, or Debian 12 where it cannot be had; the reason is printed."""
    try:
        image(suite)
    except ImageError as error:
        if suite == "bookworm":
            raise
        print(f"==> no host with {suite}, Debian 12 instead: {error}", flush=True)
        return "bookworm"
    return suite
