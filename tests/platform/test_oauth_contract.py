"""The OAuth flows over real HTTP, as clients use them, with exactly the library versions we pin.

allauth 65.19.6 and later need oauthlib 4, with which their device flow raises. Whoever raises a version
runs into this file first.
"""

import importlib.metadata
import re
import time
from types import SimpleNamespace

import pytest
import requests

from pam_platform.accounts.models import User
from pam_platform.accounts.oauth import ensure_clients, ensure_service_client

PASSWORD = "correct horse battery"
SECRET = "s" * 40
DEVICE_GRANT = "urn:ietf:params:oauth:grant-type:device_code"


class Site:
    """The platform as programs and browsers see it."""

    def __init__(self, url):
        self.url = url

    def post(self, path, data, **options):
        return requests.post(self.url + path, data=data, timeout=90, **options)

    def device_code(self, **fields):
        return self.post("/identity/o/api/device/code", {"client_id": "pam-client", **fields}).json()

    def poll(self, code):
        form = {"grant_type": DEVICE_GRANT, "client_id": "pam-client", "device_code": code["device_code"]}
        return self.post("/identity/o/api/token", form)

    def refresh(self, token):
        form = {"grant_type": "refresh_token", "client_id": "pam-client", "refresh_token": token}
        return self.post("/identity/o/api/token", form)

    def me(self, token):
        header = {"Authorization": f"Bearer {token}"}
        return requests.get(self.url + "/api/v1/me", headers=header, timeout=90)

    def browser(self, name="alice", password=PASSWORD):
        """A browser that logged in through the real form."""
        browser = requests.Session()
        page = browser.get(self.url + "/accounts/login/", timeout=90)
        self.submit(browser, page, {"login": name, "password": password})
        return browser

    def submit(self, browser, page, fields):
        """Post the page's last form with its CSRF token."""
        token = re.findall(r'name="csrfmiddlewaretoken" value="([^"]+)"', page.text)[-1]
        data = {"csrfmiddlewaretoken": token, **fields}
        return browser.post(page.url, data=data, headers={"Referer": page.url}, timeout=90)

    def answer(self, browser, code, action):
        page = browser.get(code["verification_uri_complete"], timeout=90)
        assert code["user_code"] in page.text
        assert "pam-client" in page.text
        return self.submit(browser, page, {"action": action})

    def poll_until(self, code, done):
        """Poll at the interval asked for until ``done(response)``, a minute at most."""
        deadline = time.monotonic() + 60
        while not done(response := self.poll(code)):
            assert time.monotonic() < deadline, response.text
            time.sleep(code["interval"])
        return response

    def tokens(self, **fields):
        """A whole device login of alice."""
        code = self.device_code(**fields)
        self.answer(self.browser(), code, "confirm")
        return self.poll_until(code, lambda response: response.status_code == 200).json()


@pytest.fixture
def site(live_url):
    ensure_clients()
    User.objects.create_user("alice", PASSWORD)
    return Site(live_url)


@pytest.fixture
def robot(db):
    user = User.objects.create_user("robot", is_service=True)
    ensure_service_client(user, SECRET)
    return user


def client_credentials(site, secret=SECRET, client_id="robot"):
    return site.post("/identity/o/api/token", {"grant_type": "client_credentials"}, auth=(client_id, secret))


def test_the_versions_are_the_ones_this_was_tried_with():
    assert importlib.metadata.version("django-allauth") == "65.19.5"
    assert importlib.metadata.version("oauthlib") == "3.3.1"


def test_the_endpoints_are_where_clients_find_them(site):
    document = requests.get(site.url + "/.well-known/openid-configuration", timeout=90).json()
    assert document["device_authorization_endpoint"] == site.url + "/identity/o/api/device/code"
    assert document["token_endpoint"] == site.url + "/identity/o/api/token"
    assert document["revocation_endpoint"] == site.url + "/identity/o/api/revoke"


def test_device_login_from_code_to_api(site, monkeypatch):
    code = site.device_code(scope="openid profile")
    assert re.fullmatch(r"[A-Z]{4}-[A-Z]{4}", code["user_code"])
    now = time.time()
    moment = SimpleNamespace(time=lambda: now)
    with monkeypatch.context() as standing:  # the second poll comes within the interval
        standing.setattr("allauth.idp.oidc.internal.oauthlib.device_codes.time", moment)
        assert site.poll(code).json()["error"] == "authorization_pending"
        assert site.poll(code).json()["error"] == "slow_down"

    answered = site.answer(site.browser(), code, "confirm")
    assert "Device approved" in answered.text

    tokens = site.poll_until(code, lambda response: response.status_code == 200).json()
    assert site.me(tokens["access_token"]).json() == {"name": "alice", "roles": ["user"]}
    assert site.poll(code).status_code == 400  # a device code is good once


def test_a_denied_device_gets_nothing(site):
    code = site.device_code()
    assert "Device denied" in site.answer(site.browser(), code, "deny").text
    response = site.poll_until(
        code, lambda r: r.json().get("error") not in ("slow_down", "authorization_pending")
    )
    assert (response.status_code, response.json()["error"]) == (400, "access_denied")


def test_a_code_is_answered_once(site):
    code = site.device_code()
    browser = site.browser()
    site.answer(browser, code, "deny")
    page = browser.get(code["verification_uri_complete"], timeout=90)
    assert 'value="confirm"' not in page.text


def test_approving_needs_a_login_and_a_csrf_token(site):
    """allauth exempts its own approval page from CSRF checks."""
    code = site.device_code()
    url = code["verification_uri_complete"]
    assert "/accounts/login/" in requests.get(url, timeout=90).url
    assert requests.post(url, data={"action": "confirm"}, timeout=90).status_code == 403
    forged = site.browser().post(url, data={"action": "confirm"}, timeout=90)
    assert forged.status_code == 403
    assert site.poll(code).json()["error"] == "authorization_pending"


def test_refresh_tokens_rotate(site):
    first = site.tokens(scope="openid profile")
    second = site.refresh(first["refresh_token"]).json()
    assert second["refresh_token"] != first["refresh_token"]
    assert site.me(second["access_token"]).status_code == 200
    assert site.refresh(first["refresh_token"]).json()["error"] == "invalid_grant"


def test_a_revoked_token_is_refused(site):
    tokens = site.tokens()
    for kind in ("access_token", "refresh_token"):
        form = {"token": tokens[kind], "token_type_hint": kind, "client_id": "pam-client"}
        assert site.post("/identity/o/api/revoke", form).status_code == 200
    assert site.me(tokens["access_token"]).status_code == 401
    assert site.refresh(tokens["refresh_token"]).json()["error"] == "invalid_grant"


def test_a_disabled_user_is_out_at_once(site):
    tokens, browser, code = site.tokens(), site.browser(), site.device_code()
    site.answer(browser, code, "confirm")
    User.objects.filter(username="alice").update(is_active=False)
    assert site.me(tokens["access_token"]).status_code == 401
    assert site.refresh(tokens["refresh_token"]).json()["error"] == "invalid_grant"
    assert browser.get(site.url + "/api/v1/me", timeout=90).status_code == 401
    response = site.poll_until(
        code, lambda r: r.json().get("error") not in ("slow_down", "authorization_pending")
    )
    assert response.json()["error"] == "access_denied"


def test_a_program_logs_in_with_its_secret(site, robot):
    answer = client_credentials(site)
    assert "refresh_token" not in answer.json()
    token = answer.json()["access_token"]
    assert site.me(token).json()["name"] == "robot"
    robot.is_active = False
    robot.save()
    assert site.me(token).status_code == 401


@pytest.mark.parametrize(
    ("client_id", "secret"), [("robot", "x" * 40), ("robot", ""), ("pam-client", SECRET), ("nobody", SECRET)]
)
def test_a_wrong_secret_gets_nothing(site, robot, client_id, secret):
    assert client_credentials(site, secret, client_id).status_code in (400, 401)


def test_other_grants_are_not_offered(site, robot):
    for grant in ("password", "authorization_code", "refresh_token"):
        form = {
            "grant_type": grant,
            "username": "alice",
            "password": PASSWORD,
            "code": "x",
            "refresh_token": "x",
        }
        answer = site.post("/identity/o/api/token", form, auth=("robot", SECRET))
        assert answer.status_code in (400, 401), grant
        assert "access_token" not in answer.json()


def test_client_registration_is_not_offered(site):
    assert site.post("/identity/o/api/clients", {}).status_code == 404
