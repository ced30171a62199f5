"""Users, their tokens and roles; logging in is throttled and audited."""

import re
from datetime import timedelta

import pytest
from allauth.idp.oidc.models import Client, Token
from django.contrib.auth.signals import user_login_failed
from django.core.exceptions import ValidationError
from django.test import Client as Browser
from django.utils import timezone

from pam_common.errors import ConfigError
from pam_platform.accounts.adapters import MFAAdapter
from pam_platform.accounts.models import User
from pam_platform.accounts.oauth import (
    PAM_CLIENT_ID,
    delete_expired,
    ensure_clients,
    ensure_service_client,
    revoke_tokens,
    user_of_token,
)

pytestmark = pytest.mark.usefixtures("db")

PASSWORD = "correct horse battery"
SECRET = "s" * 40


@pytest.fixture
def alice(db):
    return User.objects.create_user("alice", PASSWORD)


@pytest.fixture
def robot(db):
    user = User.objects.create_user("robot", is_service=True)
    ensure_service_client(user, SECRET)
    return user


@pytest.fixture
def give_token(db):
    """Stores a token as allauth would; its value."""
    ensure_clients()

    def give(
        value="t" * 40, *, user=None, client=PAM_CLIENT_ID, kind=Token.Type.ACCESS_TOKEN, seconds=60, **fields
    ):
        expires = timezone.now() + timedelta(seconds=seconds)
        token = Token(type=kind, user=user, client_id=client, expires_at=expires, **fields)
        token.set_value(value)
        token.save()
        return value

    return give


def test_passwords_are_kept_as_scrypt_and_older_ones_become_so(alice, settings):
    from pam_platform.settings import PASSWORD_HASHERS

    settings.PASSWORD_HASHERS = PASSWORD_HASHERS[1:]
    alice.set_password(PASSWORD)
    alice.save()
    assert alice.password.startswith("pbkdf2_")
    settings.PASSWORD_HASHERS = PASSWORD_HASHERS
    assert Browser().login(username="alice", password=PASSWORD)
    alice.refresh_from_db()
    assert alice.password.startswith("scrypt$")
    assert not alice.check_password(PASSWORD + "x")


@pytest.mark.parametrize(
    "name", ["Alice", "älice", "a b", "", "-a", "../a", "a\n", "a" * 65, "a'--", "аlice"]
)
def test_names_are_plain(name):
    with pytest.raises(ValidationError):
        User.objects.create_user(name)


@pytest.mark.parametrize("name", ["alice", "a.b-c_d", "alice@example.com", "7of9"])
def test_good_names(name):
    assert User.objects.create_user(name).username == name


def test_a_users_token_is_theirs(alice, give_token):
    assert user_of_token(give_token(user=alice)) == alice


def test_a_service_users_token_has_no_user_and_is_its_owners(robot, give_token):
    assert user_of_token(give_token(client="robot")) == robot


def test_every_other_token_is_refused(alice, robot, give_token):
    rogue = Client.objects.create(id="rogue", name="rogue", owner=alice)
    Client.objects.create(id="public", name="public", type=Client.Type.PUBLIC, owner=robot)
    refused = {
        "userless of the public client": give_token("a" * 40),
        "userless of a person's client": give_token("b" * 40, client=rogue.id),
        "userless of a second client of a service user": give_token("c" * 40, client="public"),
        "a person's by another client": give_token("d" * 40, user=alice, client=rogue.id),
        "a person's by a service client": give_token("e" * 40, user=alice, client="robot"),
        "a service user's by device": give_token("f" * 40, user=robot),
        "expired": give_token("g" * 40, user=alice, seconds=-1),
        "refresh": give_token("h" * 40, user=alice, kind=Token.Type.REFRESH_TOKEN),
        "without client": give_token("i" * 40, user=alice, client=None),
        "narrowed": give_token("j" * 40, user=alice, data={"resources": ["https://other.example"]}),
        "unknown": "k" * 40,
        "empty": "",
        "huge": "l" * 100_000,
    }
    assert {why: user_of_token(value) for why, value in refused.items()} == dict.fromkeys(refused)


def test_a_disabled_users_token_is_refused(alice, give_token):
    token = give_token(user=alice)
    User.objects.update(is_active=False)
    assert user_of_token(token) is None


def test_revoking_and_expiry_remove_tokens(alice, robot, give_token):
    first, second = give_token("a" * 40, user=alice), give_token("b" * 40, client="robot")
    give_token("c" * 40, user=alice, seconds=-5)
    assert delete_expired() == 1
    revoke_tokens(alice)
    revoke_tokens(robot)
    assert [user_of_token(first), user_of_token(second)] == [None, None]


def test_a_service_client_is_repeatable_and_a_new_secret_ends_old_tokens(robot, give_token):
    token = give_token(client="robot")
    assert ensure_service_client(robot, SECRET) is False
    assert user_of_token(token) == robot
    assert ensure_service_client(robot, "n" * 40) is True
    assert user_of_token(token) is None
    assert SECRET not in Client.objects.get(id="robot").secret


def test_only_service_users_get_a_good_secret(alice, robot):
    for user, secret in ((alice, SECRET), (robot, "short")):
        with pytest.raises(ConfigError):
            ensure_service_client(user, secret)


def test_the_public_client_can_only_do_what_workstations_need(db):
    ensure_clients()
    Client.objects.update(grant_types="authorization_code\npassword", redirect_uris="https://evil.example")
    ensure_clients()
    client = Client.objects.get(id=PAM_CLIENT_ID)
    assert client.get_grant_types() == ["urn:ietf:params:oauth:grant-type:device_code", "refresh_token"]
    assert client.get_redirect_uris() == []


def log_in(browser, name="alice", password=PASSWORD, **options):
    return browser.post("/accounts/login/", {"login": name, "password": password}, **options)


def test_logins_are_audited(alice, audit_trail):
    browser = Browser()
    log_in(browser, password="wrong")
    log_in(browser)
    browser.post("/accounts/logout/")
    assert [entry[:4] for entry in audit_trail()] == [
        ("alice", "login", "web", "refused"),
        ("alice", "login", "web", "ok"),
        ("alice", "logout", "web", "ok"),
    ]


def test_headers_do_not_forge_an_address_or_a_host(alice, audit_trail):
    browser = Browser()
    spoofed = {"X-Forwarded-For": "10.9.9.9", "X-Real-IP": "10.9.9.9", "Forwarded": "for=10.9.9.9"}
    log_in(browser, headers=spoofed)
    assert audit_trail()[-1][4] == {"address": "127.0.0.1"}
    for header in ({"host": "evil.example"}, {"host": "127.0.0.1", "x-forwarded-host": "evil.example"}):
        document = browser.get("/.well-known/openid-configuration", headers=header)
        assert b"evil.example" not in document.content


def test_a_failed_login_never_stores_the_password(alice, audit_trail, caplog):
    log_in(Browser(), password="hunter2-secret")
    assert "hunter2-secret" not in repr(audit_trail()) + caplog.text


@pytest.mark.parametrize("typed", ["My-S3cret Passw0rd!", "hunter2", "x" * 500])
def test_what_is_typed_for_a_name_is_stored_only_if_it_is_one(alice, audit_trail, caplog, typed):
    """People type their password there."""
    log_in(Browser(), name=typed, password="wrong")
    user_login_failed.send(User, credentials={"username": typed})
    assert [entry[:4] for entry in audit_trail()][-1] == ("(unknown)", "login", "web", "refused")
    assert typed not in repr(audit_trail()) + caplog.text


def test_a_name_in_capitals_is_the_users(alice, audit_trail):
    log_in(Browser(), name="ALICE", password="wrong")
    assert audit_trail()[-1][0] == "alice"


def test_a_client_id_is_stored_only_if_it_is_a_users_name(robot, audit_trail, caplog):
    for typed in ("robot", SECRET, "alice", ""):
        Browser().post("/identity/o/api/token", {"grant_type": "client_credentials", "client_id": typed})
    assert [entry[:2] for entry in audit_trail()] == [("robot", "token"), *[("(unknown)", "token")] * 3]
    assert SECRET not in caplog.text


def test_password_guessing_is_stopped(alice):
    browser = Browser()
    for _ in range(5):
        log_in(browser, password="wrong")
    answer = log_in(browser)
    assert "Too many failed login attempts" in answer.content.decode()
    assert browser.get("/api/v1/me").status_code == 401


@pytest.mark.parametrize("change", [{"is_active": False}, {"is_service": True}])
def test_who_may_not_log_in_gets_no_session(alice, change, audit_trail):
    User.objects.update(**change)
    browser = Browser()
    log_in(browser)
    assert browser.get("/api/v1/me").status_code == 401
    assert ("alice", "login", "web", "ok") not in [entry[:4] for entry in audit_trail()]


def test_a_web_session_ends_when_the_user_is_disabled(alice):
    browser = Browser()
    log_in(browser)
    assert browser.get("/api/v1/me").status_code == 200
    User.objects.update(is_active=False)
    assert browser.get("/api/v1/me").status_code == 401


def test_logging_out_ends_the_session_for_good(alice):
    browser = Browser()
    log_in(browser)
    kept = browser.cookies["sessionid"].value
    browser.post("/accounts/logout/")
    browser.cookies["sessionid"] = kept
    assert browser.get("/api/v1/me").status_code == 401


def test_a_new_password_ends_tokens_and_other_sessions(alice, give_token, audit_trail):
    token, browser, other = give_token(user=alice), Browser(), Browser()
    log_in(browser)
    log_in(other)
    new = {"oldpassword": PASSWORD, "password1": "battery staple horse", "password2": "battery staple horse"}
    browser.post("/accounts/password/change/", new)
    assert user_of_token(token) is None
    assert other.get("/api/v1/me").status_code == 401
    assert browser.get("/api/v1/me").status_code == 200
    assert audit_trail()[-1][:4] == ("alice", "password.change", "alice", "ok")


@pytest.mark.parametrize("password", ["short", "password1234", "123456789012"])
def test_weak_passwords_are_refused(alice, password):
    browser = Browser()
    log_in(browser)
    new = {"oldpassword": PASSWORD, "password1": password, "password2": password}
    browser.post("/accounts/password/change/", new)
    alice.refresh_from_db()
    assert alice.check_password(PASSWORD)


def test_an_authorization_header_outweighs_the_cookie(alice):
    browser = Browser()
    log_in(browser)
    for header in ("Bearer wrong", "Basic YTpi", "Bearer", ""):
        assert browser.get("/api/v1/me", headers={"Authorization": header}).status_code == 401


def test_login_leads_nowhere_else(alice):
    browser = Browser()
    for target in ("https://evil.example/", "//evil.example/", "javascript:alert(1)"):
        answer = browser.post(f"/accounts/login/?next={target}", {"login": "alice", "password": PASSWORD})
        assert "evil" not in answer.headers.get("Location", "")
        assert not re.search(r'(value|href)="javascript:', answer.content.decode())
        browser.post("/accounts/logout/")


def test_there_is_no_signup():
    answer = Browser().post("/accounts/signup/", {"username": "eve", "password1": PASSWORD})
    assert "No sign-up" in answer.content.decode()
    assert not User.objects.exists()


def test_second_factor_secrets_are_encrypted(settings):
    adapter = MFAAdapter()
    stored = adapter.encrypt("JBSWY3DPEHPK3PXP")
    assert "JBSWY3DPEHPK3PXP" not in stored
    settings.SECRET_KEY_FALLBACKS = [__import__("django.conf").conf.settings.SECRET_KEY]
    settings.SECRET_KEY = "another" * 10
    assert adapter.decrypt(stored) == "JBSWY3DPEHPK3PXP"
