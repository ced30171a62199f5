"""platform.yml: what is taken, what is refused, and what Django gets from it."""

import pytest
import yaml

from pam_common.errors import ConfigError
from pam_common.keys import b64encode, key_id
from pam_platform import config, serve

GOOD = {"public_url": "https://pam.example.com", "state_dir": "/var/lib/pam-platform"}
AUDITOR = {"kid": key_id(b"k" * 32), "key": b64encode(b"k" * 32)}
TLS = {"cert": "/etc/tls.crt", "key": "/etc/tls.key"}


@pytest.fixture
def load(tmp_path):
    def read(**values):
        path = tmp_path / "platform.yml"
        path.write_text(yaml.safe_dump({**GOOD, **values}))
        return config.load(path)

    return read


def test_the_defaults_are_safe(load):
    found = load()
    assert (found.listen_host, found.listen_port, found.behind_proxy) == ("127.0.0.1", 8443, False)
    assert str(found.recordings) == "/var/lib/pam-platform/recordings"
    assert found.host == "pam.example.com"


def test_recordings_can_be_kept_from_the_platform(load):
    found = load(recording_recipients=[AUDITOR], recording_platform_key=False)
    assert [recipient.kid for recipient in found.recording_recipients] == [AUDITOR["kid"]]
    assert not found.recording_platform_key
    assert load().recording_platform_key


def test_a_trailing_slash_makes_no_other_issuer(load):
    assert load(public_url="https://pam.example.com/").public_url == "https://pam.example.com"


@pytest.mark.parametrize(
    ("values", "needle"),
    [
        ({"public_url": "http://pam.example.com"}, "http is for loopback only"),
        ({"public_url": "https://pam.example.com/pam"}, "public_url"),
        ({"public_url": "https://a@pam.example.com"}, "public_url"),
        ({"public_url": "ftp://pam.example.com"}, "public_url"),
        ({"listen": "0.0.0.0:8443"}, "plain http on an address that others reach"),
        ({"listen": "pam.example.com:443"}, "listen"),
        ({"listen": "127.0.0.1:0"}, "listen"),
        ({"listen": "127.0.0.1:70000"}, "listen"),
        ({"state_dir": "relative"}, "state_dir"),
        ({"workers": 0}, "workers"),
        ({"threads": True}, "threads"),
        ({"unknown": 1}, "unknown key"),
        ({"recording_platform_key": False}, "needs recording_recipients"),
        ({"recording_recipients": [{**AUDITOR, "kid": "0" * 16}]}, "recording_recipients[0]"),
        ({"recording_recipients": [AUDITOR, AUDITOR]}, "there twice"),
        ({"recording_recipients": [{"kid": AUDITOR["kid"]}]}, "key"),
        ({"tls": TLS, "behind_proxy": True}, "behind_proxy"),
        ({"tls": {"cert": "/x"}}, "key"),
        ({"database": {"url": "mysql://x/y"}}, "database.url"),
        ({"database": {"url": "postgresql://u:secret@h/d"}}, "no password here"),
        ({"database": {"url": "postgresql://u@h"}}, "postgresql://user@host:port/name"),
        ({"database": {"url": "postgresql://u@h:99999/d"}}, "port"),
        ({"database": {"url": "postgresql://u@h/d?options=-c"}}, "unknown parameter options"),
    ],
)
def test_what_is_refused(load, values, needle):
    with pytest.raises(ConfigError) as caught:
        load(**values)
    assert needle in str(caught.value)
    assert "secret" not in str(caught.value)


def test_all_problems_come_at_once(load):
    with pytest.raises(ConfigError) as caught:
        load(public_url="http://pam.example.com", listen="0.0.0.0:80")
    assert len(caught.value.problems) == 2


def test_postgresql_comes_with_its_password_from_a_file(load, tmp_path):
    secret = tmp_path / "pg"
    secret.touch(mode=0o600)
    secret.write_text("pg-password\n")
    url = "postgresql://pam%40x@[::1]:5433/pam?sslmode=verify-full"
    database = load(database={"url": url, "password_file": str(secret)}).database
    assert "pg-password" not in repr(database)
    found = database.django()
    assert (found["USER"], found["HOST"], found["PORT"], found["NAME"]) == ("pam@x", "::1", "5433", "pam")
    assert found["PASSWORD"] == "pg-password"
    assert found["OPTIONS"]["sslmode"] == "verify-full"
    secret.unlink()
    with pytest.raises(ConfigError, match="does not exist"):
        database.django()


def test_a_unix_socket_is_named_as_libpq_does(load):
    database = load(database={"url": "postgresql:///pam?host=/run/postgresql"}).database
    assert (database.host, database.name, database.user) == ("/run/postgresql", "pam", "")


def test_gunicorn_gets_no_control_socket_and_trusts_no_header_by_itself(load):
    direct = serve.gunicorn_settings(load())
    assert direct["control_socket_disable"] is True
    assert direct["forwarded_allow_ips"] == ""
    assert serve.gunicorn_settings(load(listen="[::1]:8443"))["bind"] == "[::1]:8443"
    assert "certfile" in serve.gunicorn_settings(load(tls=TLS, listen="0.0.0.0:443"))


def test_a_certificate_that_cannot_be_used_is_told(load):
    with pytest.raises(ConfigError, match="tls: "):
        serve.check_tls(load(tls=TLS))


def test_django_is_closed_by_default():
    from django.conf import settings

    assert settings.DEBUG is False
    assert settings.ALLOWED_HOSTS[0] == "127.0.0.1"
    assert "django.contrib.admin" not in settings.INSTALLED_APPS
    assert settings.DATABASES["default"]["OPTIONS"]["transaction_mode"] == "IMMEDIATE"


def test_the_models_need_no_further_migration(db):
    from django.core.management import call_command

    call_command("makemigrations", "--check", "--dry-run", verbosity=0)
