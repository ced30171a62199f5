"""The second factor, through the real pages: needed, not reusable, limited (abuse case 16)."""

import re
import time

import pytest
from allauth.mfa.models import Authenticator
from allauth.mfa.totp.internal.auth import format_hotp_value, hotp_value, yield_hotp_counters_from_time
from django.test import Client as Browser

from pam_platform.accounts.models import User

PASSWORD = "correct horse battery"


def current_code(secret):
    return format_hotp_value(hotp_value(secret, next(iter(yield_hotp_counters_from_time()))))


def log_in(browser):
    return browser.post("/accounts/login/", {"login": "alice", "password": PASSWORD}, follow=True)


@pytest.fixture(autouse=True)
def later(monkeypatch):
    """The clock that codes depend on stands still, lest a period end between a code and its use; moves it
    by whole periods."""
    now = time.time()

    def move(periods):
        monkeypatch.setattr(time, "time", lambda: now + 30 * periods)

    move(0)
    return move


@pytest.fixture
def secret(db, later):
    """Alice's TOTP secret, after she set it up."""
    User.objects.create_user("alice", PASSWORD)
    browser = Browser()
    log_in(browser)
    page = browser.get("/accounts/2fa/totp/activate/").content.decode()
    secret = re.search(r'value="([A-Z2-7]{32})"', page)[1]
    browser.post("/accounts/2fa/totp/activate/", {"code": current_code(secret)})
    assert Authenticator.objects.filter(type="totp").exists()
    return secret


def is_logged_in(browser):
    return browser.get("/api/v1/me").status_code == 200


def test_the_secret_is_not_in_the_database_in_clear(secret):
    assert secret not in repr(list(Authenticator.objects.values_list("data", flat=True)))


def test_a_password_alone_is_not_enough(secret):
    browser = Browser()
    page = log_in(browser)
    assert page.request["PATH_INFO"] == "/accounts/2fa/authenticate/"
    assert not is_logged_in(browser)
    assert browser.get("/identity/o/device").status_code == 302


def test_a_code_lets_in_once(secret, later):
    later(3)
    code = current_code(secret)
    first, second = Browser(), Browser()
    for browser in (first, second):
        log_in(browser)
        browser.post("/accounts/2fa/authenticate/", {"code": code})
    assert is_logged_in(first)
    assert not is_logged_in(second)


def test_an_old_code_is_refused(secret, later):
    code = current_code(secret)
    later(3)
    browser = Browser()
    log_in(browser)
    browser.post("/accounts/2fa/authenticate/", {"code": code})
    assert not is_logged_in(browser)


def test_codes_cannot_be_guessed(secret, later):
    later(3)
    browser = Browser()
    log_in(browser)
    code = current_code(secret)
    for guess in range(10):
        wrong = (int(code) + 1 + guess) % 1_000_000
        browser.post("/accounts/2fa/authenticate/", {"code": f"{wrong:06d}"})
    browser.post("/accounts/2fa/authenticate/", {"code": code})
    assert not is_logged_in(browser)


def test_turning_it_off_needs_a_fresh_login(secret, later):
    later(3)
    browser = Browser()
    log_in(browser)
    browser.post("/accounts/2fa/authenticate/", {"code": current_code(secret)})
    later(60)
    browser.post("/accounts/2fa/totp/deactivate/")
    assert Authenticator.objects.filter(type="totp").exists()
