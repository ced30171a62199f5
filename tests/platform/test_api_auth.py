"""No endpoint without declared authentication; each refuses whom it is not for."""

import re

import pytest
from django.test import Client

from pam_platform.api import api

OPEN = {"/health"}
AGENTS = ("/agent/", "/relay/")
EXAMPLES = {
    "session": "s-" + "a" * 26,
    "part": "1",
    "number": "1",
    "name": "x",
    "scan": "1",
}


DOCUMENT = api.get_openapi_schema(path_prefix="")["paths"]
OPERATIONS = sorted((path, method.upper()) for path, methods in DOCUMENT.items() for method in methods)


def call(client, path, method, **options):
    return client.generic(method, "/api/v1" + path.format(**EXAMPLES), "{}", "application/json", **options)


def test_there_are_operations():
    assert len(OPERATIONS) > 25


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_every_operation_declares_who_may_call_it(path, method):
    """What declares nothing has no security here (and is answered 401, see ``api.root.deny``)."""
    assert path in OPEN or DOCUMENT[path][method.lower()].get("security"), "no authentication is declared"


def test_nothing_is_kept_out_of_the_document():
    from pam_platform.urls import urlpatterns

    routes = {re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", str(row.pattern)) for row in urlpatterns[0].url_patterns}
    assert {f"/{route}" for route in routes} - {"/openapi.json", "/"} == set(DOCUMENT)


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_without_a_login_everything_but_health_is_closed(db, path, method):
    response = call(Client(), path, method)
    assert response.status_code == (200 if path in OPEN else 401)


@pytest.mark.parametrize(("path", "method"), [pair for pair in OPERATIONS if pair[0].startswith(AGENTS)])
def test_people_are_no_agents(person, path, method):
    root = person("root", is_admin=True)
    response = call(Client(), path, method, headers={"Authorization": f"Bearer {root.value}"})
    assert response.status_code == 401


ADMIN = [
    ("/users", "GET"),
    ("/users/{name}/disable", "POST"),
    ("/users/{name}/enable", "POST"),
    ("/gateways", "GET"),
    ("/gateways/{name}", "DELETE"),
    ("/agents", "GET"),
    ("/agents/{name}/revoke", "POST"),
    ("/relays", "GET"),
    ("/relays/{name}/revoke", "POST"),
    ("/audit", "GET"),
]


@pytest.mark.parametrize(("path", "method"), ADMIN)
def test_admins_only(person, path, method):
    assert (path, method) in OPERATIONS
    for somebody in (person("bob"), person("robot", is_service=True)):
        assert somebody.call(method, path.format(**EXAMPLES)).status_code in (401, 403)
    auditor = person("eve", is_auditor=True).call(method, path.format(**EXAMPLES))
    assert auditor.status_code == (200 if path == "/audit" else 403)
    root = person("root", is_admin=True).call(method, path.format(**EXAMPLES))
    assert root.status_code == (404 if "{" in path else 200)


def test_enrolment_tokens_are_for_admins(fleet, person):
    body = {"kind": "agent", "name": "dc1-z", "gateway": "dc1"}
    assert person("bob").call("POST", "/enrol-tokens", body).status_code == 403
    answer = person("root", is_admin=True).call("POST", "/enrol-tokens", body).json()
    assert len(answer["token"]) == 43
    assert isinstance(answer["expires"], int)


def test_a_cookie_needs_the_csrf_token_and_an_authorization_header_outweighs_it(fleet, person):
    root = person("root", is_admin=True)
    browser = Client(enforce_csrf_checks=True)
    browser.force_login(root.user)
    assert browser.get("/api/v1/me").json()["name"] == "root"
    assert browser.post("/api/v1/users/bob/disable").status_code == 403
    assert browser.get("/api/v1/me", headers={"Authorization": "Bearer wrong"}).status_code == 401


def test_another_host_name_is_not_served(db):
    assert Client().get("/api/v1/health", headers={"Host": "evil.example.com"}).status_code == 400


@pytest.mark.parametrize("size", [64 * 1024 + 1, 1 << 20])
def test_a_large_body_is_refused(person, size):
    response = person("bob").call("POST", "/connect", {"resource": "x" * size})
    assert response.status_code == 413


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'{"a":' * 2000, b"null", b'"x"'])
def test_what_is_no_json_object_is_refused(person, body):
    bob = person("bob")
    response = Client().generic(
        "POST", "/api/v1/connect", body, "application/json", headers={"Authorization": f"Bearer {bob.value}"}
    )
    assert 400 <= response.status_code < 500
    assert set(response.json()) <= {"detail", "hint"}


def test_errors_do_not_repeat_what_was_sent(person, platform):
    secret = "hunter2hunter2"
    response = person("bob").call("POST", "/connect", {"resource": secret + " ", "noise_key": secret})
    assert response.status_code == 422
    assert secret not in response.content.decode()


def test_the_openapi_document_is_served(db):
    document = Client().get("/api/v1/openapi.json").json()
    assert "/api/v1/connect" in document["paths"]


def test_a_fault_shows_nothing_of_itself(person, monkeypatch):
    def fail(user):
        raise RuntimeError("secret detail")

    monkeypatch.setattr("pam_platform.api.people.usable", fail)
    bob = person("bob")
    bob._client.raise_request_exception = False
    response = bob.call("GET", "/resources")
    assert response.status_code == 500
    assert b"secret detail" not in response.content


def test_every_denial_of_somebody_known_is_on_record_once(fleet, person, audit_trail, new_session):
    session = new_session(person("alice").user).pk
    denied = [
        (person("bob"), "GET", f"/sessions/{session}", "bob"),
        (person("bob"), "POST", f"/sessions/{session}/kill", "bob"),
        (person("bob"), "GET", f"/sessions/{session}/events", "bob"),
        (person("bob"), "GET", "/users", "bob"),
        (person("root"), "POST", f"/sessions/{session}/end", "root"),
        (person("root"), "POST", "/agents/nobody/revoke", "root"),
        (fleet["dc1-a"], "POST", f"/agent/sessions/{session}/open", ""),
        (fleet["dc2-a"], "POST", f"/agent/sessions/{session}/open", "agent dc2-a"),
        (fleet["dc2-a"], "GET", f"/agent/recordings/{session}/1", "agent dc2-a"),
    ]
    for who, method, path, actor in denied:
        before = len(audit_trail())
        response = who.call(method, path)
        refusals = [event for event in audit_trail()[before:] if event[3] == "refused"]
        assert response.status_code in (403, 404)
        assert len(refusals) == 1, path
        assert not actor or refusals[0][0] == actor
