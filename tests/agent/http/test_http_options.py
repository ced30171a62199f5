"""What the platform says of an app is checked when the session opens."""

from __future__ import annotations

import pytest

from pam_agent.protocols.base import TlsPolicy
from pam_agent.protocols.http import options
from pam_common.errors import ProtocolError

FORM = {"path": "/login/", "fields": {"username": "{user}", "password": "{password}"}}


def test_http_options_of_an_app_that_says_little(opening_of):
    parsed = options.parse(opening_of(8080))
    assert (parsed.host, parsed.origin) == ("127.0.0.1:8080", "http://127.0.0.1:8080")
    assert parsed.login == "none"
    assert parsed.rules.allow is None
    assert parsed.record_bodies == 65536
    secure = options.parse(opening_of(443, tls=TlsPolicy()))
    assert (secure.origin, secure.host_name) == ("https://127.0.0.1", "127.0.0.1")


def test_http_options_of_an_app_that_says_all(opening_of):
    account = {
        "login": "form",
        "form": {
            **FORM,
            "success": {"cookie": "sid"},
            "logged_out": {"status": [401], "location": "/login/"},
        },
        "hide_cookies": True,
        "identity_headers": {"X-Remote-User": "{person} as {user} in {session} {else}"},
        "rules": {
            "allow": [{"methods": ["GET"], "paths": ["/**"]}],
            "deny": [{"paths": ["/admin/**"]}],
            "max_request": 1 << 30,
        },
        "record_bodies": 0,
    }
    parsed = options.parse(opening_of(8080, host="Grafana.corp.example:8443", account=account))
    assert parsed.host == "grafana.corp.example:8443"
    assert parsed.host_name == "grafana.corp.example"
    assert parsed.form is not None
    assert parsed.form.success.cookie == "sid"
    assert parsed.identity_headers == (
        ("X-Remote-User", "alice as viewer in s-aaaaaaaaaaaaaaaaaaaaaaaaaa {else}"),
    )
    assert parsed.rules.max_request == 1 << 30


@pytest.mark.parametrize(
    "account",
    [
        {"logn": "basic"},
        {"login": "kerberos"},
        {"login": None},
        {"login": "header"},
        {"login": "header", "header": "X Y"},
        {"login": "header", "header": "Host"},
        {"login": "form"},
        {"form": FORM},
        {"login": "form", "form": {"path": "/l"}},
        {"login": "form", "form": {**FORM, "path": "//evil.example/"}},
        {"login": "form", "form": {**FORM, "path": "login"}},
        {"login": "form", "form": {**FORM, "sucess": {}}},
        {"login": "form", "form": {**FORM, "success": {"status": [99]}}},
        {"login": "form", "form": {**FORM, "logged_out": {"status": "401"}}},
        {"hide_cookies": "yes"},
        {"hide_cookies": [1]},
        {"identity_headers": {"X-User": "a\r\nX-Admin: 1"}},
        {"identity_headers": {"X User": "a"}},
        {"identity_headers": {"Content-Length": "0"}},
        {"identity_headers": ["X-User"]},
        {"rules": {"allows": []}},
        {"rules": {"allow": {}}},
        {"rules": {"deny": [{"path": ["/x"]}]}},
        {"rules": {"deny": [{"paths": ["x"]}]}},
        {"rules": {"deny": [{"methods": ["get"]}]}},
        {"rules": {"max_request": -1}},
        {"rules": {"max_request": True}},
        {"record_bodies": "64KiB"},
        "nothing",
    ],
)
def test_http_options_that_are_not_understood_are_refused(opening_of, account):
    with pytest.raises(ProtocolError):
        options.parse(opening_of(80, account=account))


def test_http_options_are_bounded(opening_of):
    most = options.MAX_ENTRIES
    for given in (
        {"record_bodies": options.MAX_RECORD},
        {"rules": {"deny": [{"paths": ["/x"]}] * most}},
        {"rules": {"deny": [{"paths": ["/x"] * most}]}},
        {"identity_headers": {f"X-{number}": "a" for number in range(most)}},
    ):
        options.parse(opening_of(80, account=given))
    for given in (
        {"record_bodies": options.MAX_RECORD + 1},
        {"rules": {"deny": [{"paths": ["/x"]}] * (most + 1)}},
        {"rules": {"deny": [{"paths": ["/x"] * (most + 1)}]}},
        {"identity_headers": {f"X-{number}": "a" for number in range(most + 1)}},
    ):
        with pytest.raises(ProtocolError):
            options.parse(opening_of(80, account=given))


def test_http_options_of_a_login_without_its_secret(opening_of):
    for login in ("basic", "bearer", "header", "form"):
        account = {"login": login, "header": "X-Key", **({"form": FORM} if login == "form" else {})}
        options.parse(opening_of(80, account=account))
        with pytest.raises(ProtocolError, match=r"no (password|token)"):
            options.parse(opening_of(80, account=account, password=None, secrets={}))


def test_http_options_a_token_that_would_be_two_headers(opening_of):
    with pytest.raises(ProtocolError):
        options.parse(opening_of(80, account={"login": "bearer"}, secrets={"token": "a\r\nX-Admin: 1"}))


def test_http_options_fill_once():
    assert options.fill("{user}:{x}", {"user": "{password}", "password": "p"}) == "{password}:{x}"


@pytest.mark.parametrize("host", ["a/b", "a b", "a:b", "user@host", "", "http://x", "a" * 300])
def test_http_options_a_host_that_is_none(opening_of, host):
    if host:
        with pytest.raises(ProtocolError):
            options.parse(opening_of(80, host=host))
