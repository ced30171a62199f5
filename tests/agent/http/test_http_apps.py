"""Real apps behind nginx: Django's admin with its login, uploads, basic authentication."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from web_servers import WebServers

from pam_agent.protocols.base import TlsPolicy

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def servers(tmp_path_factory) -> Iterator[WebServers]:
    made = WebServers(tmp_path_factory.mktemp("servers") / "web")
    yield made
    made.stop()


def curl(*arguments: str, data: bytes | None = None) -> bytes:
    done = subprocess.run(
        ["curl", "-sS", "--noproxy", "*", "--max-time", "120", *arguments],
        input=data,
        capture_output=True,
        check=False,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- Django ----------------------------------------------------------------------------------------------


@pytest.fixture
def admin(make_gate, servers) -> Any:
    """A gate to Django's admin, logged in by form, and how to ask it as the browser would."""
    account = {
        "login": "form",
        "form": {
            "path": "/login/",
            "fields": {"username": "{user}", "password": "{password}"},
            "success": {"cookie": "sessionid"},
            "logged_out": {"location": "/login/"},
        },
        "hide_cookies": True,
    }
    gate = make_gate(
        servers.ports["django"],
        mode="browser",
        tls=TlsPolicy("verify-full", ca_pem=(servers.folder / "ca.pem").read_text()),
        host="admin.corp.test",
        user="keeper",
        password=servers.passwords["keeper"],
        account=account,
    )

    def browse(path: str, *more: str) -> str:
        cookie = f"Cookie: {gate.preamble.cookie_name.decode()}={gate.preamble.cookie}"
        place = f"{gate.host.partition(':')[0]}:{gate.port}:127.0.0.1"
        origin = f"Origin: http://{gate.host}"
        accept = "Accept: text/html"
        return curl(
            "-i",
            "--resolve",
            place,
            "-H",
            cookie,
            "-H",
            origin,
            "-H",
            accept,
            *more,
            f"http://{gate.host}{path}",
        ).decode()

    return gate, browse


def test_http_django_is_used_without_a_password(admin, servers):
    gate, browse = admin
    page = browse("/")
    assert "200 OK" in page
    assert "Site administration" in page
    assert "Set-Cookie" not in page
    form = browse("/auth/group/add/")
    token = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', form)
    assert token
    data = f"csrfmiddlewaretoken={token[1]}&name=auditors"
    referer = f"Referer: http://{gate.host}/auth/group/add/"
    done = browse("/auth/group/add/", "-H", referer, "--data", data)
    assert "302 Found" in done, done
    assert "/auth/group/" in done
    assert "auditors" in browse("/auth/group/")
    recorded = json.dumps(gate.events)
    assert servers.passwords["keeper"] not in recorded
    assert token[1] not in json.dumps(gate.of("request"))
    assert [e["ok"] for e in gate.of("login")] == [True]


def test_http_django_logs_in_again_after_a_logout(admin):
    gate, browse = admin
    token = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', browse("/"))
    assert token
    out = browse(
        "/logout/", "-H", f"Referer: http://{gate.host}/", "--data", f"csrfmiddlewaretoken={token[1]}"
    )
    assert "200 OK" in out, out
    assert "Site administration" in browse("/")
    assert len(gate.of("login")) == 2


def test_http_django_does_not_take_a_form_without_its_token(admin):
    _gate, browse = admin
    assert "403 Forbidden" in browse("/auth/group/add/", "--data", "name=x")


# --- the little app --------------------------------------------------------------------------------------


def test_http_basic_authentication_of_nginx(make_gate, servers):
    right = make_gate(
        servers.ports["files"],
        user="reader",
        password=servers.passwords["reader"],
        account={"login": "basic"},
    )
    assert b"the app" in curl(f"http://{right.host}/")
    wrong = make_gate(servers.ports["files"], user="reader", account={"login": "basic"})
    answer = curl("-i", f"http://{wrong.host}/")
    assert b" 401 " in answer
    assert b"WWW-Authenticate" not in answer  # the user has nothing to answer that with


def test_http_uploads_arrive_whole(make_gate, servers, tmp_path):
    gate = make_gate(servers.ports["echo"])
    data = os.urandom(1 << 20) * 20
    file = tmp_path / "data"
    file.write_bytes(data)
    answer = json.loads(curl("-T", str(file), f"http://{gate.host}/upload"))
    assert answer == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    gate.wait_done()
    assert next(e for e in gate.of("body") if e.get("done"))["sha256"] == answer["sha256"]


def test_http_python_requests_and_urllib_work(make_gate, servers):
    gate = make_gate(servers.ports["echo"])
    code = (
        "import sys, requests\n"
        "with requests.Session() as s:\n"
        "    for _ in range(3): assert 'the app' in s.get(sys.argv[1], timeout=60).text\n"
        "    r = s.get(sys.argv[1] + 'events', timeout=60); assert r.text.count('data:') == 3\n"
    )
    subprocess.run([sys.executable, "-c", code, f"http://{gate.host}/"], check=True, timeout=100)
    assert len(gate.conversations) == 1
