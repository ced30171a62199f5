"""access.yml about web applications: what is told to the agent, what goes to the vault, what is refused."""

import datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from pam_common.errors import ConfigError
from pam_platform.access.apply.document import load
from pam_platform.access.models import Resource
from pam_platform.vault import store

FORM = {"path": "/login/", "fields": {"username": "{user}", "password": "{password}"}}
PASSWORD = {"file": "ro"}
TOKEN = {"file": "token"}


def certificate(key):
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "viewer")])
    begin = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 7, begin, begin.replace(year=2036))
    return builder.sign(key, None).public_bytes(Encoding.PEM)


def pem(key, passphrase=None):
    hidden = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, hidden)


KEY, OTHER = Ed25519PrivateKey.from_private_bytes(b"k" * 32), Ed25519PrivateKey.from_private_bytes(b"o" * 32)


@pytest.fixture
def files(access_file):
    """Files with secrets beside access.yml."""
    folder = access_file().parent
    for name, content in (
        ("token", b"tok-123\n"),
        ("lines", b"one\ntwo\n"),
        ("pair", certificate(KEY) + pem(KEY)),
        ("mixed", certificate(KEY) + pem(OTHER)),
        ("locked", certificate(KEY) + pem(KEY, b"open sesame")),
        ("half", certificate(KEY)),
    ):
        (folder / name).touch(mode=0o600)
        (folder / name).write_bytes(content)
    return folder


def app(document, *, http=None, tls=None, host="Grafana.corp.example", **account):
    """Adds the web application grafana with the account viewer."""
    document["resources"].append(
        {
            "name": "grafana",
            "protocol": "http",
            "gateway": "dc1",
            "host": "10.0.0.9",
            "port": 443,
            **({"tls": tls} if tls else {}),
            "http": {"host": host},
            "accounts": [{"name": "viewer", **({"http": http} if http is not None else {}), **account}],
        }
    )


def text(changes):
    return "\n".join(shown for change in changes for _, shown in change.lines())


def test_an_application_becomes_options_and_secrets(files, apply):
    def change(document):
        app(document, http={"login": "form", "form": FORM, "hide_cookies": True}, password=PASSWORD)

    shown = text(apply(change))
    resource = Resource.objects.get(name="grafana")
    assert resource.options == {"host": "grafana.corp.example"}
    assert resource.tls_mode == "verify-full"
    account = resource.accounts.get()
    assert account.options == {
        "login": "form",
        "form": {**FORM, "hidden": True},
        "hide_cookies": True,
        "identity_headers": {},
        "rules": {},
        "record_bodies": 65536,
    }
    assert store.reveal(account.password) == b"password-of-ro"
    assert "password: set" in shown
    assert apply(change) == []


def test_every_option_arrives(files, apply):
    http = {
        "login": "header",
        "header": "X-Api-Key",
        "hide_cookies": ["sid"],
        "identity_headers": {"X-Remote-User": "{person}@corp as {user} in {session}"},
        "rules": {
            "allow": [{"methods": ["GET", "HEAD"], "paths": ["/**"]}],
            "deny": [{"paths": ["/admin/**", "/app/*/edit"]}],
            "max_request": "1GiB",
        },
        "record_bodies": 0,
    }
    apply(lambda document: app(document, http=http, token=TOKEN, client_cert={"file": "pair"}))
    account = Resource.objects.get(name="grafana").accounts.get()
    assert account.options == {**http, "rules": {**http["rules"], "max_request": 1 << 30}}
    secrets = {row.name: store.reveal(row.entry) for row in account.secrets.all()}
    assert secrets == {"token": b"tok-123", "client_cert": (certificate(KEY) + pem(KEY)).rstrip(b"\n")}


def test_a_form_says_what_success_and_a_lost_login_look_like(files, apply):
    form = {
        **FORM,
        "hidden": False,
        "success": {"cookie": "sessionid", "status": [302], "location": "/"},
        "logged_out": {"status": [401], "location": "/login/"},
    }
    apply(lambda document: app(document, http={"login": "form", "form": form}, password=PASSWORD))
    assert Resource.objects.get(name="grafana").accounts.get().options["form"] == form


@pytest.mark.parametrize(
    ("http", "account", "needle"),
    [
        ({"login": "form"}, {"password": PASSWORD}, "accounts[0].http: login form needs form:"),
        ({"login": "form", "form": FORM}, {}, "accounts[0]: http.login form needs a password"),
        ({"login": "basic"}, {}, "http.login basic needs a password"),
        ({"login": "bearer"}, {}, "http.login bearer needs a token"),
        ({"login": "header", "header": "X-Api-Key"}, {}, "http.login header needs a token"),
        ({"login": "header"}, {"token": TOKEN}, "accounts[0].http: login header needs header:"),
        ({"login": "header", "header": "Cookie"}, {"token": TOKEN}, "Cookie is the agent's own to set"),
        (
            {"login": "basic", "header": "X-A"},
            {"password": PASSWORD},
            "http.header: goes together with login",
        ),
        (
            {"login": "basic", "form": FORM},
            {"password": PASSWORD},
            "http.form: goes together with login: form",
        ),
        ({}, {"password": PASSWORD}, "password: http.login none has no use for it"),
        (None, {"token": TOKEN}, "token: http.login none has no use for it"),
        (
            {"login": "bearer"},
            {"token": TOKEN, "password": PASSWORD},
            "password: http.login bearer has no use",
        ),
        ({"login": "bearer"}, {"token": {"file": "lines"}}, "token: cannot stand in a header"),
        ({"login": "basic"}, {"password": PASSWORD, "user": "a:b"}, "user: basic authentication has no user"),
        ({"login": "sso"}, {}, "http.login"),
        ({"login": "none", "colour": 1}, {}, "colour"),
        ({"rules": {"deny": [{}]}}, {}, "rules.deny[0]"),
        ({"rules": {"deny": [{"paths": ["admin"]}]}}, {}, "a path such as /app/*/edit"),
        ({"rules": {"deny": [{"paths": ["/a?b=c"]}]}}, {}, "without a query"),
        ({"rules": {"allow": [{"methods": ["get"]}]}}, {}, "a method in capital letters"),
        ({"rules": {"max_request": "much"}}, {}, "a size such as"),
        ({"rules": {"max_request": "1048577GiB"}}, {}, "rules.max_request: expected at most 1048576GiB"),
        ({"record_bodies": "17MiB"}, {}, "record_bodies: expected at most 16MiB"),
        ({"hide_cookies": "all"}, {}, "true, false, or a list of cookie names"),
        ({"identity_headers": {"Host": "x"}}, {}, "identity_headers.Host: is the agent's own to set"),
        ({"identity_headers": {"X-A": "1", "x-a": "2"}}, {}, "is given twice"),
        ({"identity_headers": {"X-User": "{name}"}}, {}, "{name} stands for nothing; expected {person}"),
        ({"identity_headers": {"X User": "a"}}, {}, "identity_headers"),
        (
            {"login": "header", "header": "X-Key", "identity_headers": {"x-key": "a"}},
            {"token": TOKEN},
            "identity_headers.x-key: is the agent's own to set",
        ),
        (
            {"login": "form", "form": {**FORM, "fields": {"user": "{user}"}}},
            {"password": PASSWORD},
            'form.fields: none of them is "{password}"',
        ),
        (
            {"login": "form", "form": {**FORM, "fields": {"u": "{person}", "p": "{password}"}}},
            {"password": PASSWORD},
            "{person} stands for nothing",
        ),
        (
            {"login": "form", "form": {**FORM, "path": "//elsewhere/login"}},
            {"password": PASSWORD},
            "a path within the app",
        ),
        ({}, {"client_cert": {"file": "half"}}, "client_cert: cannot be read as a PEM file"),
        ({}, {"client_cert": {"file": "mixed"}}, "client_cert: the private key is not that of"),
        ({}, {"client_cert": {"file": "locked"}}, "client_cert: its private key has a passphrase"),
        ({}, {"databases": ["app"]}, "databases: has no meaning for the protocol http"),
        ({}, {"private_key": TOKEN}, "private_key: has no meaning for the protocol http"),
    ],
)
def test_a_wrong_account_is_refused(files, access_file, http, account, needle):
    with pytest.raises(ConfigError) as refused:
        load(access_file(lambda document: app(document, http=http, **account)))
    assert needle in "\n".join(refused.value.problems)
    assert all(problem.startswith("access.yml:") for problem in refused.value.problems)


@pytest.mark.parametrize(
    ("change", "needle"),
    [
        (lambda d: app(d, host="https://grafana"), "the name by which the app calls itself"),
        (lambda d: app(d, host="grafana:99999"), "http.host: expected a port within 1-65535"),
        (lambda d: app(d, tls={"mode": "disable"}, client_cert={"file": "pair"}), "shows no certificate"),
        (lambda d: app(d, tls={"client_cert": {"file": "half"}}), "client certificates of their own"),
        (lambda d: d["resources"][0].update(http={"host": "a"}), "has no meaning for the protocol postgres"),
        (lambda d: d["resources"][0]["accounts"][0].update(token=TOKEN), "has no meaning for the protocol"),
        (lambda d: (app(d), d["resources"][-1].update(rows_budget=0)), "rows_budget: has no meaning"),
    ],
)
def test_a_wrong_application_is_refused(files, access_file, change, needle):
    with pytest.raises(ConfigError) as refused:
        load(access_file(change))
    assert needle in "\n".join(refused.value.problems)
