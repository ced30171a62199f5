"""Real web applications behind a real nginx, as resources of a Stack.

============  ==========================================  ===============================================
resource      what                                        account
============  ==========================================  ===============================================
``django``    Django's admin, HTTPS by a private CA       ``keeper``: form login with CSRF, hidden cookies
``files``     ``web_app`` behind nginx's ``auth_basic``   ``reader``: basic; ``guarded``: with rules
``echo``      ``web_app``                                 ``anyone``: none; ``token``: bearer
``lab``       JupyterLab, where it is wanted              ``student``: bearer
============  ==========================================  ===============================================
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import secrets
import shutil
import sys
import urllib.request
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from apps import app
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from processes import Process, free_port, listens
from stack import Stack

SUPPORT = Path(__file__).parent
NGINX = shutil.which("nginx") or "/usr/sbin/nginx"

_CONFIG = """
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/nginx-error.log; {user}
events {{ worker_connections 256; }}
http {{
  access_log off; client_max_body_size 0; proxy_http_version 1.1; server_tokens off;
  client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
  uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
  proxy_buffering off; proxy_request_buffering off; proxy_read_timeout 120s;
  map $http_upgrade $connection_upgrade {{ default upgrade; "" ""; }}
  proxy_set_header Host $host; proxy_set_header Upgrade $http_upgrade;
  proxy_set_header Connection $connection_upgrade; proxy_set_header X-Forwarded-Proto $scheme;
  server {{
    listen 127.0.0.1:{django} ssl; ssl_certificate {folder}/tls.crt; ssl_certificate_key {folder}/tls.key;
    server_name admin.corp.test;
    location / {{ proxy_pass http://127.0.0.1:{django_behind}; }}
  }}
  server {{
    listen 127.0.0.1:{files}; auth_basic "files"; auth_basic_user_file {folder}/htpasswd;
    location / {{ proxy_pass http://127.0.0.1:{app}; }}
  }}
  server {{ listen 127.0.0.1:{echo}; location / {{ proxy_pass http://127.0.0.1:{app}; }} }}
  server {{
    listen 127.0.0.1:{lab};
    location / {{
      proxy_pass http://127.0.0.1:{lab_behind};
      proxy_set_header Host $http_host; proxy_set_header Upgrade $http_upgrade;
      proxy_set_header Connection $connection_upgrade;
    }}
  }}
}}
"""


_PORTS = ("django", "django_behind", "files", "echo", "app", "lab", "lab_behind")

_LAB_CONFIG = """
c.IdentityProvider.token = {token!r}
c.ServerApp.ip, c.ServerApp.port, c.ServerApp.port_retries = "127.0.0.1", {port}, 0
c.ServerApp.root_dir = {root!r}
c.ServerApp.allow_root = True
c.ServerApp.open_browser = False
c.LabApp.check_for_updates_class = "jupyterlab.NeverCheckForUpdate"
c.LabApp.news_url = None
"""


class WebServers:
    """nginx and two applications, or three with ``lab``; ``stop`` them."""

    def __init__(self, folder: Path, *, lab: bool = False) -> None:
        folder.mkdir(mode=0o700)
        self.folder = folder
        self.ports = {name: free_port() for name in _PORTS}
        self.passwords = {
            name: secrets.token_urlsafe(16) for name in ("keeper", "reader", "token", "student")
        }
        self.processes: list[Process] = []
        for name, secret in self.passwords.items():
            self._private(name, secret)
        self._private("password", self.passwords["keeper"])
        _certify(folder)
        digest = base64.b64encode(hashlib.sha1(self.passwords["reader"].encode()).digest()).decode()
        self._private("htpasswd", f"reader:{{SHA}}{digest}\n")
        user = "user root;" if os.geteuid() == 0 else ""
        self._private("nginx.conf", _CONFIG.format(folder=folder, user=user, **self.ports))
        self._start("app", [sys.executable, SUPPORT / "web_app.py", str(self.ports["app"])], "app")
        django = [sys.executable, SUPPORT / "django_admin.py", folder, str(self.ports["django_behind"])]
        self._start("django", django, "django_behind")
        self._has_lab = lab
        if lab:
            self._start_lab()
        self._start("nginx", [NGINX, "-c", folder / "nginx.conf", "-p", folder], "files")

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.stop()

    def seen(self) -> list[list[str]]:
        """[method, path, Origin] of each request that reached ``web_app``."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ports['app']}/seen", timeout=30) as answer:
            found: list[list[str]] = json.loads(answer.read())
            return found

    def add_to(self, stack: Stack) -> None:
        """Make them resources of gateway dc1."""
        for make in (self._django, self._files, self._echo, *([self._lab] if self._has_lab else [])):
            stack.resources.append({"protocol": "http", "gateway": "dc1", "host": "127.0.0.1", **make()})

    def _django(self) -> dict[str, Any]:
        form = {
            "path": "/login/",
            "fields": {"username": "{user}", "password": "{password}"},
            "success": {"cookie": "sessionid"},
            "logged_out": {"location": "/login/"},
        }
        account = {
            "name": "keeper",
            "password": self._secret("keeper"),
            "http": {
                "login": "form",
                "form": form,
                "hide_cookies": True,
                "identity_headers": {"X-Remote-User": "{person}"},
            },
        }
        return {
            "name": "django",
            "port": self.ports["django"],
            "tls": {"mode": "verify-full", "ca": {"file": str(self.folder / "ca.pem")}},
            "http": {"host": "admin.corp.test"},
            "accounts": [account],
        }

    def _files(self) -> dict[str, Any]:
        basic = {"user": "reader", "password": self._secret("reader")}
        rules = {
            "allow": [{"methods": ["GET", "HEAD"], "paths": ["/**"]}],
            "deny": [{"paths": ["/headers/**"]}],
            "max_request": "1KiB",
        }
        return {
            "name": "files",
            "port": self.ports["files"],
            "tls": {"mode": "disable"},
            "accounts": [
                {"name": "reader", **basic, "http": {"login": "basic"}},
                {"name": "guarded", **basic, "http": {"login": "basic", "rules": rules}},
            ],
        }

    def _echo(self) -> dict[str, Any]:
        identity = {"X-Remote-User": "{person}", "X-Session": "{session}"}
        return {
            "name": "echo",
            "port": self.ports["echo"],
            "tls": {"mode": "disable"},
            "accounts": [
                {"name": "anyone", "http": {"identity_headers": identity}},
                {"name": "token", "token": self._secret("token"), "http": {"login": "bearer"}},
            ],
        }

    def _lab(self) -> dict[str, Any]:
        student = {"name": "student", "token": self._secret("student"), "http": {"login": "bearer"}}
        return {
            "name": "lab",
            "port": self.ports["lab"],
            "tls": {"mode": "disable"},
            "accounts": [student],
        }

    @property
    def lab_folder(self) -> Path:
        """What JupyterLab shows."""
        return self.folder / "lab-files"

    def _start_lab(self) -> None:
        self.lab_folder.mkdir()
        config = _LAB_CONFIG.format(
            token=self.passwords["student"], port=self.ports["lab_behind"], root=str(self.lab_folder)
        )
        self._private("jupyter_server_config.py", config)
        own = {f"JUPYTER_{name}_DIR": str(self.folder / f"jupyter-{name}") for name in ("DATA", "RUNTIME")}
        own |= {"JUPYTER_CONFIG_DIR": str(self.folder), "HOME": str(self.folder), "SHELL": "/bin/sh"}
        command = [app("jupyter-lab"), "--no-browser"]
        self._start("lab", command, "lab_behind", env={**os.environ, **own})

    def _secret(self, name: str) -> dict[str, str]:
        return {"file": str(self.folder / name)}

    def _private(self, name: str, text: str) -> None:
        path = self.folder / name
        path.touch(mode=0o600)
        path.write_text(text)

    def _start(self, name: str, command: list[Any], port: str, **options: Any) -> None:
        process = Process(name, command, self.folder / f"{name}.log", **options)
        self.processes.append(process)
        process.ready_when(lambda: listens(self.ports[port]))


def _certify(folder: Path) -> None:
    """A private CA, and a certificate of it for admin.corp.test."""
    now = datetime.now(UTC)
    ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    ca_name, name = (
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)]) for text in ("ca", "admin.corp.test")
    )

    def made(subject: x509.Name, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        builder = x509.CertificateBuilder(ca_name, subject, public, x509.random_serial_number())
        return builder.not_valid_before(now - timedelta(minutes=1)).not_valid_after(now + timedelta(hours=3))

    ca = made(ca_name, ca_key.public_key()).add_extension(x509.BasicConstraints(True, 0), critical=True)
    names = x509.SubjectAlternativeName([x509.DNSName("admin.corp.test")])
    leaf = made(name, key.public_key()).add_extension(names, critical=False)
    (folder / "ca.pem").write_bytes(ca.sign(ca_key, hashes.SHA256()).public_bytes(Encoding.PEM))
    (folder / "tls.crt").write_bytes(leaf.sign(ca_key, hashes.SHA256()).public_bytes(Encoding.PEM))
    (folder / "tls.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
