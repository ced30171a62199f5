"""Requests that no honest program sends: the platform answers 4xx, on both databases, and believes no header.

Whatever is sent, a 5xx is a fault of ours: it means that something reached a part that was not made for it.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from principals import Machine, Principal, World
from processes import Process, free_port, listens
from stack import BIN, form_fields

NUL, SURROGATE, NOT_UTF8 = "\0", "\ud800", b"\xff\xfe\xed\xa0\x80"
TOKEN = "/identity/o/api/token"
DEVICE = "urn:ietf:params:oauth:grant-type:device_code"
#: What proxies in front of other products set, and such products believe.
SPOOFED = {
    "X-Forwarded-For": "203.0.113.9",
    "X-Forwarded-Host": "evil.example",
    "X-Forwarded-Port": "444",
    "X-Forwarded-Proto": "https",
    "X-Forwarded-Prefix": "/evil",
    "X-Forwarded-User": "root",
    "X-Real-IP": "203.0.113.9",
    "X-Remote-User": "root",
    "X-Original-URL": "/api/v1/users",
    "X-Rewrite-URL": "/api/v1/users",
    "X-HTTP-Method-Override": "DELETE",
    "X-Client-Cert": "root",
    "Forwarded": "for=203.0.113.9;host=evil.example;proto=https",
    "Remote-User": "root",
    "REMOTE_USER": "root",
    "SCRIPT_NAME": "/evil",
    "PATH_INFO": "/api/v1/users",
}


def raw(port: int, request: bytes) -> tuple[int, bytes]:
    """Send bytes as they are; status and whole answer. Status 0: closed without one."""
    with socket.create_connection(("127.0.0.1", port), timeout=90) as sock:
        sock.sendall(request)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while b"\r\n\r\n" not in answer and (data := sock.recv(65536)):
                answer += data
    return int(answer.split(b" ", 2)[1]) if answer else 0, answer


def form(caller: Principal, path: str, body: Any, **headers: Any) -> requests.Response:
    """Post a form as a browser would, with the CSRF token; ``body`` a dict, or bytes as they are."""
    token = {"X-CSRFToken": caller.http.cookies["csrftoken"], "Referer": caller.url}
    token["Content-Type"] = "application/x-www-form-urlencoded"
    return caller.call("POST", path, data=body, headers={**token, **headers})


# --- headers -------------------------------------------------------------------------------------------


def test_headers_give_nobody_an_identity(world: World) -> None:
    for name in ("anonymous", "other", "foreign"):
        for path, status in (("/api/v1/users", 401 if name != "other" else 403), ("/", 302)):
            answer = world[name].call("GET", path, headers=SPOOFED)
            assert answer.status_code == status
            assert "evil" not in answer.headers.get("Location", "") + answer.text
    assert world["other"].call("GET", "/api/v1/me", headers=SPOOFED).json() == {
        "name": "bob",
        "roles": ["user"],
    }


def test_the_issuer_is_the_configured_one(world: World) -> None:
    found = world["anonymous"].call("GET", "/.well-known/openid-configuration", headers=SPOOFED)
    assert "evil" not in found.text
    assert found.json()["issuer"] == world.url


def test_an_address_is_the_peers(world: World) -> None:
    assert _address_on_record(world, world.url) == "127.0.0.1"


def test_only_behind_a_proxy_the_proxys_word_counts(world: World, tmp_path: Path) -> None:
    with _behind_proxy(world, tmp_path) as url:
        # The client's own claim comes first, what the one proxy saw comes last.
        assert _address_on_record(world, url) == "203.0.113.9"
        forged = {"X-Forwarded-For": "198.51.100.1, 203.0.113.7"}
        assert _address_on_record(world, url, forged) == "203.0.113.7"
        # Neither identity nor host come from a header even there.
        there = Principal("", url)
        assert there.call("GET", "/api/v1/users", headers=SPOOFED).status_code == 401
        assert "evil" not in there.call("GET", "/", headers=SPOOFED).headers["Location"]


def _address_on_record(world: World, url: str, headers: dict[str, str] = SPOOFED) -> str:
    """Where the platform says a failed login came from."""
    visitor = Principal("", url)
    fields = form_fields(visitor.call("GET", "/accounts/login/").text)
    fields |= {"login": world.fresh_name(), "password": "wrong"}
    https = {"Referer": url.replace("http:", "https:") + "/"}
    visitor.call("POST", "/accounts/login/", data=fields, headers={**https, **headers})
    # The newest: of somebody whom nobody knows no name is kept.
    return str(world.audit(action="login", actor="(unknown)")[0]["details"]["address"])


@contextlib.contextmanager
def _behind_proxy(world: World, folder: Path) -> Iterator[str]:
    """The same platform once more, configured for a reverse proxy in front; its address."""
    values = yaml.safe_load((world.town.folder / "platform.yml").read_text())
    port = free_port()
    config = folder / "platform.yml"
    config.write_text(yaml.safe_dump({**values, "listen": f"127.0.0.1:{port}", "behind_proxy": True}))
    process = Process("proxied", [BIN / "pam-platform", "--config", config, "serve"], folder / "log")
    try:
        process.ready_when(lambda: listens(port))
        yield f"http://127.0.0.1:{port}"
    finally:
        process.stop()


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "127.0.0.1@evil.example",
        "127.0.0.1.evil.example",
        "evil.example:80",
        "127.0.0.1 evil",
        "",
    ],
)
@pytest.mark.parametrize("path", ["/", "/api/v1/health", "/accounts/login/", "/identity/o/api/token"])
def test_another_host_is_refused(world: World, host: str, path: str) -> None:
    status, answer = raw(world.town.port, f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    assert status == 400
    assert b"evil" not in answer


def test_ambiguous_requests_are_refused(world: World) -> None:
    start, end = b"POST /api/v1/me HTTP/1.1\r\nHost: 127.0.0.1\r\n", b"\r\n0\r\n\r\n"
    for bad in (
        b"Host: evil.example\r\n",
        b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n",
        b"Content-Length: 4\r\nContent-Length: 5\r\n",
        b"Content-Length: -1\r\n",
        b"Content-Length: +4\r\n",
        b"Transfer-Encoding: chunked, identity\r\n",
        b"X-Long: " + b"a" * 20_000 + b"\r\n",
        b"".join(b"X-%d: a\r\n" % number for number in range(60)),
        b"X Space: a\r\n",
        b"X-Nul: a\0b\r\n",
        b" folded: a\r\n",
    ):
        assert 400 <= raw(world.town.port, start + bad + end)[0] < 500, bad


# --- sizes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/accounts/login/", "multipart/form-data; boundary=b"),
        ("/accounts/login/", "application/x-www-form-urlencoded"),
        (TOKEN, "application/x-www-form-urlencoded"),
        ("/identity/o/api/device/code", "multipart/form-data; boundary=b"),
        ("/api/v1/connect", "application/json"),
        ("/api/v1/agent/enrol", "multipart/form-data; boundary=b"),
    ],
)
def test_a_large_body_is_refused_before_it_is_read(world: World, path: str, kind: str) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\n"
    head += "Content-Length: 1000000000\r\n\r\n"
    file = b'--b\r\nContent-Disposition: form-data; name="f"; filename="f"\r\n\r\n'
    assert raw(world.town.port, head.encode() + file)[0] == 413


def test_a_recording_has_a_cap_too(world: World) -> None:
    path = f"/api/v1/agent/recordings/{world.session}/1?offset=0"
    agent = world["agent"]
    for caller, status in ((world["anonymous"], 401), (world["owner"], 401), (agent, 403)):
        authorization = caller.authorization()
        lines = [f"PUT {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Length: 100000000"]
        lines += [f"Authorization: {authorization}"] if authorization else []
        assert raw(world.town.port, "\r\n".join([*lines, "", ""]).encode())[0] == status


# --- content -------------------------------------------------------------------------------------------

BODIES = {
    "nested lists": b"[" * 30_000,
    "nested objects": b'{"a":' * 12_000,
    "closed nesting": b'{"reason":' * 900 + b"1" + b"}" * 900,
    "not UTF-8": NOT_UTF8,
    "not UTF-8 in a text": b'{"reason": "' + NOT_UTF8 + b'"}',
    "a NUL": b'{"reason": "a\\u0000b"}',
    "half a character": b'{"reason": "\\ud800"}',
    "a long number": b'{"reason": ' + b"1" * 6000 + b"}",
    "infinity": b'{"reason": 1e999}',
    "half an object": b'{"reason": ',
    "nothing": b"",
}


@pytest.mark.parametrize("what", BODIES)
def test_a_bad_body_is_the_callers_fault(world: World, what: str) -> None:
    part = f"/api/v1/agent/recordings/{world.session}/1/head"
    paths = {
        "owner": [f"/api/v1/sessions/{world.session}/kill", "/api/v1/connect"],
        "admin": ["/api/v1/enrol-tokens"],
        "agent": [part, f"/api/v1/agent/sessions/{world.session}/closed", "/api/v1/agent/recordings/check"],
        "anonymous": [TOKEN, "/identity/o/api/device/code", "/identity/o/api/revoke"],
    }
    for name, some in paths.items():
        for path in some:
            answer = world[name].call("POST", path, data=BODIES[what])
            assert 400 <= answer.status_code < 500, (name, path, answer.status_code)


@pytest.mark.parametrize("field", ["end", "hash", "signature", "count", "length", "time", "final"])
def test_a_bad_head_is_the_agents_fault(world: World, field: str) -> None:
    session = world.new_session()
    head = world.recording(session)[1]
    path = f"/api/v1/agent/recordings/{session}/1/head"
    for bad in (NUL, SURROGATE, "x" * 9999, -1, 1 << 70, 1.5, True, None, [], {}):
        if field == "final" and bad is True:
            continue
        answer = world["agent"].call("POST", path, data=json.dumps({**head, field: bad}))
        assert 400 <= answer.status_code < 500, (field, bad, answer.status_code)


@pytest.mark.parametrize("bad", ["%00", "a%00b", "%ff%fe", "%ed%a0%80"])
def test_bad_characters_in_addresses(world: World, bad: str) -> None:
    for path in (
        f"/sessions?user={bad}",
        f"/sessions?before={bad}",
        f"/sessions?{bad}=1",
        f"/sessions/{bad}",
        f"/sessions/{world.session}/parts/1?from={bad}",
        f"/accounts/login/?next={bad}",
        f"/identity/o/device?code={bad}",
        f"/identity/o/authorize?client_id={bad}&response_type=code",
        f"/api/v1/sessions?before={bad}",
        f"/api/v1/sessions/{bad}",
        f"/api/v1/sessions?state={bad}",
        f"/api/v1/audit?before={bad}",
        f"/static/{bad}",
        f"/{bad}",
    ):
        for caller in (world["anonymous"], world["admin"], world.browsers["admin"]):
            answer = caller.call("GET", path)
            assert answer.status_code < 500, (path, caller.name)
            if "%00" in bad and not path.startswith("/static"):
                assert answer.status_code == 400, (path, caller.name)


@pytest.mark.parametrize("bad", [b"a%00b", b"%ff%fe", b"%ed%a0%80", NOT_UTF8])
def test_bad_characters_in_forms(world: World, bad: bytes) -> None:
    caller = world.browsers["owner"]
    bodies = {
        f"/sessions/{world.new_session()}/kill": b"reason=" + bad,
        "/identity/o/device?code=ABCD-EFGH": b"action=" + bad,
        "/accounts/password/change/": b"oldpassword=" + bad + b"&password1=" + bad,
        "/accounts/reauthenticate/": b"password=" + bad,
        TOKEN: b"grant_type=client_credentials&client_secret=x&client_id=" + bad,
        TOKEN + "?1": b"grant_type=refresh_token&client_id=pam-client&refresh_token=" + bad,
        TOKEN + "?2": f"grant_type={DEVICE}&client_id=pam-client&device_code=".encode() + bad,
        TOKEN + "?3": b"grant_type=authorization_code&client_id=pam-client&code=" + bad,
        "/identity/o/api/device/code": b"client_id=" + bad,
        "/identity/o/api/device/code?1": b"client_id=pam-client&scope=" + bad,
        "/identity/o/api/revoke": b"client_id=pam-client&token=" + bad,
        "/identity/o/api/revoke?1": b"token=x&client_id=" + bad,
    }
    for path, body in bodies.items():
        answer = form(caller, path, body)
        assert answer.status_code < 500, (path, body)
        if b"%00" in bad:
            assert answer.status_code == 400, (path, body)


def test_incomplete_login_requests(world: World) -> None:
    for path in (TOKEN, "/identity/o/api/device/code", "/identity/o/api/revoke"):
        for body in ({}, {"client_id": ""}, {"client_id": ["pam-client", "robot"]}, {"grant_type": DEVICE}):
            answer = world["anonymous"].call("POST", path, data=body)
            assert 400 <= answer.status_code < 500, (path, body)


@pytest.mark.parametrize(
    "value", [r'"abcdefgh\000ijk"', r'"abcdefgh\355\240\200"', "abcdefgh\u00ff", "a" * 9000]
)
def test_bad_cookies(world: World, value: str) -> None:
    for path in ("/", "/api/v1/me"):
        for name in ("sessionid", "csrftoken", "messages"):
            cookie = f"{name}={value}".encode("latin-1")
            answer = world["anonymous"].call("GET", path, headers={"Cookie": cookie})
            assert answer.status_code in (302, 400, 401), (path, name)


@pytest.mark.parametrize("kid", [NUL, SURROGATE, "x" * 9000, "", None, 7, ["x"], {"x": "y"}])
def test_a_token_with_a_bad_key_id_is_nobodys(world: World, kid: object) -> None:
    header = _part({"alg": "EdDSA", "typ": "pam-agent-request+jwt", "kid": kid})
    token = f"{header}.{_part({})}.{'A' * 86}"
    agent = world["agent"]
    assert isinstance(agent, Machine)
    for method, path in (("POST", "/agent/renew"), ("GET", "/relay/bundle"), ("GET", "/me")):
        headers = {"Authorization": f"Bearer {token}"}
        assert world["anonymous"].call(method, f"/api/v1{path}", headers=headers).status_code == 401
    body = agent.enrolment("x")
    answer = world["anonymous"].call("POST", "/api/v1/agent/enrol", json=body, headers=headers)
    assert answer.status_code == 401


def _part(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


def test_bad_basic_credentials(world: World) -> None:
    for credentials in (b"a\0b:secret", b"robot:a\0b", b"\xff:\xff", b":", b"", b"no colon"):
        headers = {"Authorization": f"Basic {base64.b64encode(credentials).decode()}"}
        body = {"grant_type": "client_credentials"}
        answer = world["anonymous"].call("POST", TOKEN, data=body, headers=headers)
        assert answer.status_code in (400, 401), credentials


def test_no_fault_was_logged(world: World) -> None:
    """Comes last: the server's log has no error and no traceback after all of the above."""
    log = world.town.processes["platform"].log.read_text()
    assert not re.findall(r".*(?:level=error|Traceback|Internal Server Error).*", log)
