"""Who may do what at every endpoint and page of the platform: declared in full, tried on a real server.

An endpoint without a row, or a row without its endpoint, is a failure: nobody adds one without saying
who may use it. Whoever is denied learns nothing: the answer is the one for an object that does not exist,
unless they may know of it; and every denial of somebody known is on the audit trail.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from principals import PEOPLE as PEOPLE_NAMES
from principals import Principal, World, connect_body

UNSAFE = ("POST", "PUT", "PATCH", "DELETE")
NOBODY = "s-" + "a" * 26
#: What stands for path parameters when the object does not exist.
MISSING = {"session": NOBODY, "scan": "k-" + "a" * 26, "part": "9", "number": "9", "name": "nobody"}
#: May know that the recorded session exists, and may be told so when denied something about it.
KNOWS_SESSION = {"owner", "reviewer", "admin", "agent", "sibling"}

PEOPLE = ("owner", "other", "reviewer", "auditor", "admin", "service")
AGENTS = ("agent", "sibling", "foreign")
EVERYBODY = ("anonymous", *PEOPLE, "disabled", *AGENTS, "revoked agent", "relay", "revoked relay")


@dataclass(frozen=True)
class Row:
    """What one operation answers to whom; 401 to everybody who is not in ``expected``."""

    expected: dict[str, int]
    target: str = ""
    body: Callable[[World, dict[str, str]], dict[str, Any]] = lambda world, names: {"json": {}}
    query: str = ""

    def status(self, principal: str) -> int:
        return self.expected.get(principal, 401)


def people(*statuses: int, **options: Any) -> Row:
    """For people and programs with a token, in the order of PEOPLE; a single status is for all of them."""
    given = statuses * len(PEOPLE) if len(statuses) == 1 else statuses
    return Row(dict(zip(PEOPLE, given, strict=True)), **options)


def admin(status: int = 200, **options: Any) -> Row:
    return people(403, 403, 403, 403, status, 403, **options)


def agents(*statuses: int, **options: Any) -> Row:
    given = statuses * len(AGENTS) if len(statuses) == 1 else statuses
    return Row(dict(zip(AGENTS, given, strict=True)), **options)


def _token_body(world: World, names: dict[str, str]) -> dict[str, Any]:
    return {"json": {"kind": "agent", "name": world.fresh_name(), "gateway": "dc1"}}


def _closed_body(world: World, names: dict[str, str]) -> dict[str, Any]:
    return {"json": {"part": 1, "reason": "client closed"}}


def _enrol_body(world: World, names: dict[str, str]) -> dict[str, Any]:
    return {"json": world["agent"].enrolment("not-a-token")}  # type: ignore[attr-defined]


def _relay_enrol_body(world: World, names: dict[str, str]) -> dict[str, Any]:
    return {"json": world["relay"].enrolment("not-a-token")}  # type: ignore[attr-defined]


def _bytes(world: World, names: dict[str, str]) -> dict[str, Any]:
    return {"data": world.recording(names["session"])[0]}


def _head(world: World, names: dict[str, str]) -> dict[str, Any]:
    if names["session"] == world.session:
        return {"json": world.head}
    return {"json": world.recording(names["session"])[1]}


#: The whole API: operation -> who gets which status. See ``Row`` and the four functions above.
#:                                        owner other reviewer auditor admin service
API: dict[str, Row] = {
    "GET /health": Row(dict.fromkeys(EVERYBODY, 200)),
    "GET /me": people(200),
    "GET /resources": people(200),
    "POST /connect": people(200, 403, 403, 403, 403, 200, body=lambda w, n: {"json": connect_body()}),
    "GET /sessions": people(200),
    "GET /sessions/{session}": people(200, 404, 200, 404, 200, 404, target="recorded"),
    "POST /sessions/{session}/kill": people(200, 404, 403, 404, 200, 404, target="running"),
    "POST /sessions/{session}/end": people(200, 404, 403, 404, 403, 404, target="running"),
    "GET /sessions/{session}/events": people(200, 404, 200, 404, 403, 404, target="recorded"),
    "GET /sessions/{session}/verify": people(200, 404, 200, 404, 403, 404, target="recorded"),
    "GET /sessions/{session}/parts/{number}/raw": people(200, 404, 200, 404, 403, 404, target="recorded"),
    "GET /users": admin(),
    "POST /users/{name}/disable": admin(target="user"),
    "POST /users/{name}/enable": admin(target="user"),
    "GET /gateways": admin(),
    "DELETE /gateways/{name}": admin(target="gateway"),
    "GET /agents": admin(),
    "POST /agents/{name}/revoke": admin(target="spare agent"),
    "GET /relays": admin(),
    "POST /relays/{name}/revoke": admin(target="spare relay"),
    "GET /audit": people(403, 403, 200, 200, 200, 403),
    "POST /enrol-tokens": admin(body=_token_body),
    # Nobody's ordinary credentials enrol: the request must be signed for this alone (see below).
    "POST /agent/enrol": Row({}, body=_enrol_body),
    "POST /relay/enrol": Row({}, body=_relay_enrol_body),
    #                              agent sibling foreign
    "POST /agent/renew": agents(200),
    "GET /agent/inbox": agents(200),
    "POST /agent/sessions/{session}/open": agents(200, 409, 403, target="running"),
    "POST /agent/sessions/{session}/closed": agents(200, 403, 403, target="running", body=_closed_body),
    "POST /agent/sessions/{session}/alarm": agents(
        200, 403, 403, target="running", body=lambda w, n: {"json": {"reason": "another host key"}}
    ),
    "POST /agent/scans/{scan}": agents(
        200, 403, 403, target="scan", body=lambda w, n: {"json": {"keys": [], "error": "no answer"}}
    ),
    "PUT /agent/recordings/{session}/{part}": agents(
        200, 403, 403, target="running", body=_bytes, query="?offset=0"
    ),
    "GET /agent/recordings/{session}/{part}": agents(200, 403, 403, target="recorded"),
    "POST /agent/recordings/{session}/{part}/head": agents(200, 403, 403, target="recorded", body=_head),
    "POST /agent/recordings/check": agents(200, body=lambda w, n: {"json": {"parts": []}}),
    "GET /relay/bundle": Row({"relay": 200}),
}

#: Objects that are made anew for each principal, since a success uses them up.
PER_PRINCIPAL = {"running", "scan"}

#: Every page and login endpoint: route -> status of GET for the browsers of BROWSERS, in this order.
BROWSERS = ("anonymous", "owner", "other", "reviewer", "auditor", "admin", "disabled")
OPEN = (200,) * 7
PERSONAL = (302, 200, 200, 200, 200, 200, 302)
ONLY_POST = (405,) * 7
#: Belongs to second factors, which nobody here has set up.
NO_FACTOR = (302, 404, 404, 404, 404, 404, 302)
PAGES: dict[str, tuple[int, ...]] = {
    "": PERSONAL,
    "sessions": PERSONAL,
    "sessions/<session:session_id>": (302, 200, 404, 200, 404, 200, 302),
    "sessions/<session:session_id>/parts/<int:number>": (302, 200, 404, 200, 404, 404, 302),
    "sessions/<session:session_id>/kill": ONLY_POST,
    "sessions/<session:session_id>/verify": ONLY_POST,
    "accounts/login/": (200, 302, 302, 302, 302, 302, 200),
    "accounts/logout/": PERSONAL,
    "accounts/inactive/": OPEN,
    "accounts/signup/": (200, 302, 302, 302, 302, 302, 200),  # says that it is closed
    "accounts/reauthenticate/": PERSONAL,
    "accounts/password/change/": PERSONAL,
    "accounts/password/set/": (302,) * 7,  # everybody has one
    "accounts/2fa/": PERSONAL,
    "accounts/2fa/authenticate/": (302,) * 7,
    "accounts/2fa/reauthenticate/": (302,) * 7,
    "accounts/2fa/totp/activate/": PERSONAL,
    "accounts/2fa/totp/deactivate/": NO_FACTOR,
    "accounts/2fa/recovery-codes/": NO_FACTOR,
    "accounts/2fa/recovery-codes/download/": NO_FACTOR,
    "accounts/2fa/recovery-codes/generate/": PERSONAL,
    ".well-known/jwks.json": OPEN,
    ".well-known/openid-configuration": OPEN,
    "identity/o/authorize": PERSONAL,
    "identity/o/device": PERSONAL,
    "identity/o/logout": PERSONAL,
    "identity/o/api/device/code": ONLY_POST,
    "identity/o/api/revoke": ONLY_POST,
    "identity/o/api/token": ONLY_POST,
    "identity/o/api/userinfo": (401,) * 7,
}
#: What may be posted without a CSRF token, since a browser's cookies count for nothing there or, for the
#: last two, since the page asks first when the token is missing.
NO_CSRF = {
    "identity/o/api/device/code",
    "identity/o/api/revoke",
    "identity/o/api/token",
    "identity/o/api/userinfo",
    "identity/o/authorize",
    "identity/o/logout",
}
#: What servers have been found to leave open: documentation, metrics, debugging, files.
FORBIDDEN = (
    *("metrics", "debug", "__debug__/", "admin/", "docs", "redoc", "openapi.json", "swagger.json", "graphql"),
    *("api/v1/", "api/v1/docs", "api/v1/redoc", "api/v1/metrics", "server-status", "status", "media/"),
    *(
        ".git/config",
        ".env",
        "static/",
        "static/web/",
        "static/..%2fsettings.py",
        "static/%2e%2e/settings.py",
    ),
    *("identity/o/api/introspect", "identity/o/api/clients", "accounts/password/reset/", "accounts/email/"),
)

#: Prints every route of the platform, from Django's own table.
ROUTES = """
import django
django.setup()
from django.urls import get_resolver
def walk(patterns, prefix=""):
    for one in patterns:
        route = prefix + str(one.pattern)
        if hasattr(one, "url_patterns"):
            walk(one.url_patterns, route)
        else:
            print(route)
walk(get_resolver().url_patterns)
"""


def target(world: World, kind: str) -> dict[str, str]:
    """Path parameters that name a real object."""
    if kind == "recorded":
        return {"session": world.session, "part": "1", "number": "1"}
    if kind == "running":
        return {"session": world.new_session(), "part": "1"}
    if kind == "scan":
        return {"scan": world.new_scan()}
    if kind == "spare agent":
        return {"name": world.machine("agent", world.fresh_name(), "dc1").label}
    return {"name": {"": "", "user": "victim", "gateway": "doomed", "spare relay": "r3"}[kind]}


def ask(world: World, operation: str, principal: Principal, names: dict[str, str], **options: Any) -> Any:
    method, path = operation.split(" ")
    row = API[operation]
    sent = {} if method == "GET" else row.body(world, names)
    return principal.call(method, "/api/v1" + path.format(**names) + row.query, **sent, **options)


def test_every_endpoint_has_a_row_and_every_row_an_endpoint(world: World) -> None:
    document = world["anonymous"].call("GET", "/api/v1/openapi.json").json()
    operations = {
        f"{method.upper()} {path.removeprefix('/api/v1')}"
        for path, methods in document["paths"].items()
        for method in methods
    }
    assert operations == set(API)


@pytest.mark.parametrize("operation", API)
def test_each_principal_gets_what_is_declared(world: World, operation: str) -> None:
    row, last = API[operation], world.audit()[0]["id"]
    names = target(world, row.target)
    # Who succeeds comes last: the object is still there for those who must not touch it.
    order = sorted(EVERYBODY, key=lambda name: row.status(name) < 400)
    wrong, denied = {}, []
    for name in order:
        if row.target in PER_PRINCIPAL:
            names = target(world, row.target)
        answer = ask(world, operation, world[name], names)
        if answer.status_code != row.status(name):
            wrong[name] = (answer.status_code, answer.text[:200])
        if answer.status_code in (403, 404):
            denied.append(name)
        if answer.status_code >= 400 and row.target:
            wrong |= _told(world, operation, name, answer)
            wrong |= _changed(world, row, name, names)
    assert not wrong
    refused = {event["actor"] for event in world.audit(outcome="refused") if event["id"] > last}
    assert {world.actor(name) for name in denied} <= refused


def _told(world: World, operation: str, name: str, answer: Any) -> dict[str, Any]:
    """A denial that differs from the one for an object that does not exist, to one who may not know."""
    session = "session" in operation
    if session and name in KNOWS_SESSION:
        return {}
    missing = ask(world, operation, world[name], MISSING)
    if (missing.status_code, missing.text) == (answer.status_code, answer.text):
        return {}
    return {f"{name} is told": (answer.text[:200], missing.text[:200])}


def _changed(world: World, row: Row, name: str, names: dict[str, str]) -> dict[str, Any]:
    """A session that a denied request changed after all."""
    if row.target != "running":
        return {}
    shown = world["owner"].call("GET", f"/api/v1/sessions/{names['session']}").json()
    return {} if shown["state"] == "active" else {f"{name} changed it": shown}


def test_no_method_is_served_that_the_document_hides(world: World) -> None:
    served = {}
    for path in {operation.split(" ")[1] for operation in API}:
        hidden = [m for m in ("GET", *UNSAFE) if f"{m} {path}" not in API]
        for method in hidden:
            answer = world["admin"].call(method, "/api/v1" + path.format(**MISSING))
            if answer.status_code != 405:
                served[f"{method} {path}"] = answer.status_code
    assert not served


# --- pages ---------------------------------------------------------------------------------------------


def browser(world: World, name: str) -> Principal:
    return world.browsers.get(name) or world[name]


def page(world: World, route: str) -> str:
    return "/" + route.replace("<session:session_id>", world.session).replace("<int:number>", "1")


def test_every_route_of_the_server_is_declared(world: World) -> None:
    """Pages here, the API in its document; nothing is served beside the two."""
    env = {**os.environ, "DJANGO_SETTINGS_MODULE": "pam_platform.settings"}
    command = [sys.executable, "-c", ROUTES]
    routes = set(
        subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.split("\n")
    )
    api = {route.removeprefix("api/v1") for route in routes if route.startswith("api/v1")}
    declared = {re.sub(r"{(\w+)}", r"<\1>", operation.split(" ")[1]) for operation in API}
    assert api == declared | {"/", "/openapi.json"}
    assert {route for route in routes if not route.startswith("api/v1")} == set(PAGES)


def test_each_browser_gets_what_is_declared(world: World) -> None:
    # Some pages want a login of the last five minutes.
    for name in set(world.browsers) - {"disabled"}:
        world.browsers[name].http = world.town.person(PEOPLE_NAMES[name]).web()
    wrong = {}
    for route, statuses in PAGES.items():
        for name, status in zip(BROWSERS, statuses, strict=True):
            answer = browser(world, name).call("GET", page(world, route))
            if answer.status_code != status:
                wrong[f"{route} {name}"] = answer.status_code
            to_login = answer.headers.get("Location", "").startswith("/accounts/login/")
            if status == 302 and name in ("anonymous", "disabled") and not to_login:
                wrong[f"{route} {name}"] = answer.headers["Location"]
    assert not wrong


def test_a_page_does_not_tell_whether_a_session_exists(world: World) -> None:
    for name in ("other", "auditor"):
        for rest in ("", "/parts/1"):
            answers = [
                browser(world, name).call("GET", f"/sessions/{session}{rest}")
                for session in (world.session, NOBODY)
            ]
            assert answers[0].status_code == answers[1].status_code == 404
            first, second = (
                re.sub(r'name="csrfmiddlewaretoken" value="\w+"', "", one.text) for one in answers
            )
            assert first == second


@pytest.mark.parametrize("rest", ["kill", "verify"])
def test_a_page_acts_only_for_whom_it_may(world: World, rest: str) -> None:
    session = world.new_session()
    allowed = {"kill": {"owner": 302, "admin": 302}, "verify": {"owner": 200, "reviewer": 200}}[rest]
    for name in sorted(set(BROWSERS) - {"anonymous", "disabled"}, key=lambda name: name in allowed):
        caller = browser(world, name)
        last = world.audit()[0]["id"]
        answer = caller.call("POST", f"/sessions/{session}/{rest}", headers=csrf(caller))
        assert (name, answer.status_code) == (name, allowed.get(name, 404))
        if name not in allowed:
            assert any(
                event["id"] > last for event in world.audit(outcome="refused", actor=PEOPLE_NAMES[name])
            )
        elif rest == "kill":
            session = world.new_session()


def csrf(caller: Principal) -> dict[str, str]:
    """What a form of ours would send."""
    return {"X-CSRFToken": caller.http.cookies["csrftoken"], "Referer": caller.url}


def test_no_page_takes_a_post_without_csrf_token(world: World) -> None:
    caller, forged = browser(world, "admin"), {"X-CSRFToken": "a" * 32}
    taken = {}
    for route in PAGES:
        for headers in ({}, forged, {**csrf(caller), "Origin": "https://evil.example"}):
            answer = caller.call("POST", page(world, route), data={"action": "confirm"}, headers=headers)
            if route not in NO_CSRF and answer.status_code != 403:
                taken[route] = answer.status_code
    assert not taken
    assert caller.call("GET", "/").status_code == 200  # still logged in


def test_the_api_takes_no_cookie_without_csrf_token(world: World) -> None:
    caller, served = browser(world, "admin"), {}
    for operation, row in API.items():
        method, path = operation.split(" ")
        if method == "GET":
            continue
        status = 403 if row.expected.get("admin") else 401  # agents and relays have no cookies at all
        for headers in ({}, {"X-CSRFToken": "a" * 32}, {**csrf(caller), "Origin": "https://evil.example"}):
            answer = caller.call(method, "/api/v1" + path.format(**MISSING), json={}, headers=headers)
            if answer.status_code != status:
                served[operation] = answer.status_code
    assert not served
    answer = caller.call("POST", "/api/v1/users/nobody/enable", headers=csrf(caller))
    assert answer.status_code == 404, "with the token, a cookie counts"


def test_a_cookie_lends_no_rights_to_another_authorization(world: World) -> None:
    answer = browser(world, "admin").call(
        "GET", "/api/v1/users", headers={"Authorization": "Bearer nonsense"}
    )
    assert answer.status_code == 401


def test_nothing_for_operators_is_open(world: World) -> None:
    for path in FORBIDDEN:
        for caller in (world["anonymous"], browser(world, "admin")):
            answer = caller.call("GET", f"/{path}")
            assert (path, answer.status_code) == (path, 404)
            assert not re.search("Traceback|DEBUG|urlpatterns|Using the URLconf", answer.text)
