"""Logging in over real HTTP: the device flow, refreshing by several processes, programs, logging out."""

from __future__ import annotations

import base64
import json
import os
import re
import stat
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keyring
import pytest
from keyring.backend import KeyringBackend
from keyring.errors import KeyringLocked

from pam_client.api import Api
from pam_client.home import Home
from pam_client.login import PersonLogin, find_login
from pam_client.oauth import Authority
from pam_client.store import Tokens, TokenStore
from pam_common.errors import AuthenticationError, PamError, ProtocolError, UnavailableError

DEVICE = {
    "device_code": "device-secret",
    "user_code": "WDJB-MJHT",
    "expires_in": 600,
    "interval": 0.01,
}


def tokens(number: int, **changes: Any) -> dict[str, Any]:
    answer = {
        "access_token": f"access-{number}",
        "refresh_token": f"refresh-{number}",
        "token_type": "Bearer",
    }
    return {**answer, "expires_in": 900, **changes}


@pytest.fixture
def device(platform: Any) -> Callable[..., list[Any]]:
    """Let the token endpoint give these answers to polls, one after the other; the last one stays."""

    def script(*answers: Any, **changes: Any) -> list[Any]:
        left = list(answers)
        code = {**DEVICE, "verification_uri": f"{platform.url}/device", **changes}
        platform.answers["POST", "/o/device/code"] = (200, code)

        def poll(form: dict[str, str]) -> Any:
            assert form["grant_type"] == "urn:ietf:params:oauth:grant-type:device_code"
            assert (form["device_code"], form["client_id"]) == ("device-secret", "pam-client")
            return left.pop(0) if len(left) > 1 else left[0]

        platform.answers["POST", "/o/token"] = poll
        return left

    return script


def pending(code: str = "authorization_pending") -> tuple[int, dict[str, str]]:
    return 400, {"error": code}


def test_device_flow_polls_until_confirmed(platform: Any, device: Callable[..., Any]) -> None:
    device(pending(), pending("slow_down"), (503, {}), pending(), (200, tokens(1)))
    authority = Authority(platform.url)
    code = authority.start_device()
    assert (code.user_code, code.complete_url) == ("WDJB-MJHT", f"{platform.url}/device")
    assert "device-secret" not in repr(code)
    waits: list[float] = []
    got = authority.wait_for_device(code, wait=waits.append)
    assert (got.access, got.refresh) == ("access-1", "refresh-1")
    assert "access-1" not in repr(got)
    assert got.expires == pytest.approx(time.time() + 900, abs=30)
    # slow_down adds 5 seconds for good, no answer doubles (RFC 8628, 3.5).
    assert waits == pytest.approx([0.01, 0.01, 5.01, 10.02, 10.02])


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (pending("access_denied"), "denied in the browser"),
        (pending("expired_token"), "no longer valid"),
        (pending("invalid_client"), "refused: invalid_client"),
        ((200, {"access_token": "x"}), "no bearer token"),
        ((302, {}), "redirect"),
        ((200, b"<html>"), "not a platform's login"),
    ],
)
def test_device_flow_ends_with_a_reason(platform: Any, device: Any, answer: Any, words: str) -> None:
    device(answer)
    authority = Authority(platform.url)
    with pytest.raises(PamError, match=words):
        authority.wait_for_device(authority.start_device(), wait=lambda _: None)


def test_device_flow_gives_up_when_the_code_expires(platform: Any, device: Callable[..., Any]) -> None:
    device(pending(), expires_in=0.05)
    authority = Authority(platform.url)
    with pytest.raises(AuthenticationError, match="expired before"):
        authority.wait_for_device(authority.start_device())


HOSTILE = [
    "https://evil.example/token",
    "http://127.0.0.1:1/token",
    "//evil.example/x",
    "javascript:alert(1)",
    7,
    None,
]


@pytest.mark.parametrize("url", HOSTILE)
def test_endpoint_elsewhere_is_refused(platform: Any, url: Any) -> None:
    """Abuse case 25: the client is steered to a hostile endpoint by what a server returns."""
    platform.discovery["token_endpoint"] = url
    with pytest.raises(ProtocolError, match="token_endpoint that is not its own"):
        Authority(platform.url).refresh(Tokens("a", 0, "r"))
    assert platform.count("POST", "/o/token") == 0


def test_address_with_the_platform_as_user_name_is_refused(platform: Any) -> None:
    platform.discovery["token_endpoint"] = platform.url.replace("http://", "http://pam@") + "/o/token"
    with pytest.raises(ProtocolError, match="not its own"):
        Authority(platform.url).refresh(Tokens("a", 0, "r"))


@pytest.mark.parametrize("key", ["verification_uri", "verification_uri_complete"])
def test_page_elsewhere_is_not_shown(platform: Any, device: Callable[..., Any], key: str) -> None:
    """Abuse case 25, for the browser."""
    device((200, tokens(1)), **{key: "https://evil.example/device"})
    with pytest.raises(ProtocolError, match=f"{key} that is not its own"):
        Authority(platform.url).start_device()


def test_redirects_are_not_followed(platform: Any) -> None:
    platform.answers["GET", "/.well-known/openid-configuration"] = (307, {})
    with pytest.raises(ProtocolError, match="redirect"):
        Authority(platform.url).start_device()


def test_login_command(call: Any, platform: Any, device: Any, tmp_path: Path) -> None:
    device(pending(), (200, tokens(1)))
    home = tmp_path / "fresh"
    done = call("login", "--no-browser", "--platform", platform.url + "/", PAM_CLIENT_HOME=str(home))
    assert done.returncode == 0, done.stderr
    assert re.search(r"\bWDJB-MJHT\b", done.stderr)
    assert f"{platform.url}/device" in done.stderr
    file = home / "tokens.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert json.loads(file.read_text())[platform.url]["refresh"] == "refresh-1"
    assert Home(home).settings().platform == platform.url
    assert not re.search(r"access-1|refresh-1|device-secret", done.stderr + done.stdout)


def test_login_says_why_the_platform_does_not_answer(call: Any, platform: Any, tmp_path: Path) -> None:
    platform.close()
    done = call("login", "--platform", platform.url, PAM_CLIENT_HOME=str(tmp_path / "fresh"))
    assert done.returncode == 69
    assert done.stderr == f"error: the platform at {platform.url} does not answer: connection refused\n"


def test_without_a_login(call: Any, platform: Any, home: Home) -> None:
    (home.folder / "tokens.json").unlink()
    done = call("ls")
    assert (done.returncode, done.stderr) == (1, "error: not logged in\nHINT: run: pam-client login\n")


class OneUse:
    """A token endpoint whose refresh tokens can be used once, as the platform's."""

    def __init__(self) -> None:
        self.number = 1
        self.lock = threading.Lock()

    def __call__(self, form: dict[str, str]) -> tuple[int, dict[str, Any]]:
        with self.lock:
            if form["refresh_token"] != f"refresh-{self.number}":
                return 400, {"error": "invalid_grant"}
            self.number += 1
            return 200, tokens(self.number)


def expire(home: Home, platform: Any) -> None:
    home.write_json(
        "tokens.json", {platform.url: {"access": "access-1", "expires": 0, "refresh": "refresh-1"}}
    )


def test_several_processes_refresh_once(
    platform: Any, home: Home, environment: dict[str, str], command: Callable[..., list[str]]
) -> None:
    expire(home, platform)
    platform.answers["POST", "/o/token"] = OneUse()
    platform.answers["GET", "/api/v1/resources"] = (200, {"resources": []})
    processes = [
        subprocess.Popen(
            command("ls", "--json"), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(4)
    ]
    ended = [(process.communicate(timeout=60), process.returncode) for process in processes]
    assert [code for _, code in ended] == [0] * 4, ended
    assert platform.count("POST", "/o/token") == 1
    assert platform.last("GET", "/api/v1/resources")[1]["Authorization"] == "Bearer access-2"


def test_several_threads_refresh_once(platform: Any, home: Home) -> None:
    expire(home, platform)
    platform.answers["POST", "/o/token"] = OneUse()
    login = find_login(home, home.settings(), {})
    got: list[str] = []
    threads = [threading.Thread(target=lambda: got.append(login.token())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert got == ["access-2"] * 8
    assert platform.count("POST", "/o/token") == 1


def test_refused_token_is_replaced_once(platform: Any, home: Home) -> None:
    """Revoked at the platform, or the clocks differ: a 401 for a token that looks good here."""
    platform.answers["POST", "/o/token"] = OneUse()
    platform.answers["GET", "/api/v1/me"] = (401, {"detail": "not logged in"})
    with pytest.raises(AuthenticationError):
        Api.open(home, None).me()
    assert platform.count("GET", "/api/v1/me") == 2
    assert platform.count("POST", "/o/token") == 1


def test_dead_refresh_token(platform: Any, home: Home) -> None:
    expire(home, platform)
    platform.answers["POST", "/o/token"] = (400, {"error": "invalid_grant"})
    with pytest.raises(AuthenticationError, match="expired or was revoked") as caught:
        find_login(home, home.settings(), {}).token()
    assert caught.value.hint == "run: pam-client login"


def test_refresh_is_not_repeated_without_an_answer(platform: Any, home: Home) -> None:
    expire(home, platform)
    platform.answers["POST", "/o/token"] = (502, {})
    with pytest.raises(UnavailableError):
        find_login(home, home.settings(), {}).token()
    assert platform.count("POST", "/o/token") == 1


def test_logout_revokes_and_forgets(call: Any, platform: Any, home: Home) -> None:
    platform.answers["POST", "/o/revoke"] = (200, {})
    done = call("logout")
    assert done.returncode == 0, done.stderr
    assert home.read_json("tokens.json") == {}
    revoked = [
        form["token"]
        for method, path, form, _ in platform.requests
        if (method, path) == ("POST", "/o/revoke")
    ]
    assert revoked == ["refresh-1", "access-1"]
    assert "not logged in" in call("logout").stderr


def test_logout_forgets_even_when_the_platform_is_away(call: Any, platform: Any, home: Home) -> None:
    platform.answers["POST", "/o/revoke"] = (503, {})
    done = call("logout")
    assert done.returncode == 1
    assert "not revoked at the platform" in done.stderr
    assert home.read_json("tokens.json") == {}


class TestPrograms:
    def test_client_credentials(self, platform: Any, home: Home, tmp_path: Path) -> None:
        secret = tmp_path / "secret"
        secret.write_text("s3cret\n")
        secret.chmod(0o600)
        answer = {"access_token": "service-1", "token_type": "Bearer", "expires_in": 900}
        platform.answers["POST", "/o/token"] = (200, answer)
        environment = {"PAM_CLIENT_ID": "backup", "PAM_CLIENT_SECRET_FILE": str(secret)}
        login = find_login(home, home.settings(), environment)
        assert [login.token(), login.token()] == ["service-1", "service-1"]
        form, headers = platform.last("POST", "/o/token")
        assert form == {"grant_type": "client_credentials"}
        assert base64.b64decode(headers["Authorization"].split()[1]) == b"backup:s3cret"
        assert platform.count("POST", "/o/token") == 1
        login.token(rejected="service-1")
        assert platform.count("POST", "/o/token") == 2

    def test_secret_that_others_can_read(self, home: Home, tmp_path: Path) -> None:
        secret = tmp_path / "secret"
        secret.write_text("s3cret")
        secret.chmod(0o644)
        environment = {"PAM_CLIENT_ID": "backup", "PAM_CLIENT_SECRET_FILE": str(secret)}
        with pytest.raises(PamError, match="may be read by others"):
            find_login(home, home.settings(), environment).token()

    def test_wrong_secret(self, platform: Any, home: Home, tmp_path: Path) -> None:
        secret = tmp_path / "secret"
        secret.write_text("wrong")
        secret.chmod(0o600)
        platform.answers["POST", "/o/token"] = (401, {"error": "invalid_client"})
        environment = {"PAM_CLIENT_ID": "backup", "PAM_CLIENT_SECRET_FILE": str(secret)}
        with pytest.raises(AuthenticationError, match='credentials of "backup"'):
            find_login(home, home.settings(), environment).token()

    def test_id_without_secret(self, home: Home) -> None:
        with pytest.raises(PamError, match="without PAM_CLIENT_SECRET_FILE"):
            find_login(home, home.settings(), {"PAM_CLIENT_ID": "backup"})


class MemoryRing(KeyringBackend):
    """A keyring that works, until it is locked."""

    priority = 5

    def __init__(self) -> None:
        self.kept: dict[tuple[str, str], str] = {}
        self.locked = False

    def get_password(self, service: str, username: str) -> str | None:
        if self.locked:
            raise KeyringLocked("locked")
        return self.kept.get((service, username))

    def set_password(self, service: str, username: str, password: str) -> None:
        if self.locked:
            raise KeyringLocked("locked")
        self.kept[service, username] = password

    def delete_password(self, service: str, username: str) -> None:
        del self.kept[service, username]


class TestStore:
    @pytest.fixture
    def ring(self, monkeypatch: pytest.MonkeyPatch) -> MemoryRing:
        ring = MemoryRing()
        monkeypatch.setattr(keyring, "get_keyring", lambda: ring)
        return ring

    @pytest.fixture
    def store(self, tmp_path: Path) -> TokenStore:
        return TokenStore(Home(tmp_path / "home"), "https://pam.test")

    def test_keyring_where_there_is_one(self, ring: MemoryRing, store: TokenStore, tmp_path: Path) -> None:
        kept = Tokens("a", 5.0, "r")
        assert store.save(kept) == "keyring"
        assert store.load() == kept
        assert list(ring.kept) == [("pam-client", "https://pam.test")]
        assert not (tmp_path / "home" / "tokens.json").exists()
        store.remove()
        assert store.load() is None

    def test_file_while_the_keyring_is_locked(
        self, ring: MemoryRing, store: TokenStore, tmp_path: Path
    ) -> None:
        store.save(Tokens("old", 5.0, "r"))
        ring.locked = True
        fresh = Tokens("new", 6.0, "r2")
        assert store.save(fresh) == str(tmp_path / "home" / "tokens.json")
        assert store.load() == fresh
        ring.locked = False
        # The file is the newer one until the keyring takes over again, and then it is gone.
        assert store.load() == fresh
        assert store.save(fresh) == "keyring"
        assert json.loads((tmp_path / "home" / "tokens.json").read_text()) == {}

    def test_no_keyring(self, store: TokenStore, tmp_path: Path) -> None:
        file = tmp_path / "home" / "tokens.json"
        assert store.save(Tokens("a", 5.0)) == str(file)
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert store.load() == Tokens("a", 5.0)

    def test_platforms_are_apart(self, store: TokenStore, tmp_path: Path) -> None:
        other = TokenStore(Home(tmp_path / "home"), "https://other.test")
        store.save(Tokens("a", 5.0))
        assert other.load() is None
        other.save(Tokens("b", 5.0))
        other.remove()
        assert store.load() == Tokens("a", 5.0)

    def test_file_that_others_can_read_is_refused(self, store: TokenStore, tmp_path: Path) -> None:
        store.save(Tokens("a", 5.0))
        (tmp_path / "home" / "tokens.json").chmod(0o644)
        with pytest.raises(PamError, match="may be read by others"):
            store.load()

    def test_never_readable_by_others_under_any_umask(self, store: TokenStore, tmp_path: Path) -> None:
        before = os.umask(0)
        try:
            store.save(Tokens("a", 5.0))
        finally:
            os.umask(before)
        for path in [tmp_path / "home", *(tmp_path / "home").iterdir()]:
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_spoiled_tokens_mean_no_login(platform: Any, home: Home) -> None:
    values: list[Any] = [[], "x", {"access": 1, "expires": 2}, {"access": "a", "expires": "never"}]
    for spoiled in values:
        home.write_json("tokens.json", {platform.url: spoiled})
        login = PersonLogin(Authority(platform.url), TokenStore(home, platform.url))
        with pytest.raises(AuthenticationError, match="not logged in"):
            login.token()
