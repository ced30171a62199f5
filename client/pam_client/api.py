"""The platform's API as the commands use it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any, BinaryIO
from urllib.parse import quote, urlencode

import requests

from pam_client.home import Home, Settings
from pam_client.login import Login, find_login
from pam_client.session import SessionKeys
from pam_common.errors import AuthenticationError, ProtocolError, UnavailableError
from pam_common.keys import VerifyKeys
from pam_common.platform_client import PlatformClient

#: Pauses before a GET is tried again, in seconds: long enough for a worker restart, short for a person.
_PAUSES = (0.3, 1.0)
#: The recording format's own bound for one event; a longer line is not an event.
MAX_EVENT = 1 << 20
#: The platform stores no longer part.
MAX_PART = 16 << 30
#: A page of the platform's lists.
PAGE = 200

_COMPLETION_FILE = "resources.json"


class Api:
    """Calls as one person or program. GETs are tried again; what changes something never is, except after
    a 401, which says that nothing was done."""

    def __init__(self, settings: Settings, login: Login) -> None:
        self._login = login
        self._used = threading.local()
        self._client = PlatformClient(
            settings.platform, ca_file=settings.platform_ca, authorization=self._authorization
        )

    @classmethod
    def open(cls, home: Home, platform: str | None) -> Api:
        """The API of the chosen platform with the login that is at hand."""
        settings = home.settings(platform)
        return cls(settings, find_login(home, settings))

    @property
    def platform(self) -> str:
        return self._client.base_url

    def now(self) -> float:
        """The platform's clock, in UNIX seconds."""
        return self._client.now()

    def me(self) -> dict[str, Any]:
        return self._get("/me")

    def resources(self) -> list[dict[str, Any]]:
        """What the caller may use: ``{name, protocol, gateway, database?, accounts: [{name, …}]}``."""
        return _objects(self._get("/resources"), "resources")

    def ssh_resources(self) -> tuple[list[dict[str, Any]], VerifyKeys]:
        """Those of them that are SSH servers, and the CA of what answers for these."""
        answer = self._get("/resources")
        found = [entry for entry in _objects(answer, "resources") if entry.get("protocol") == "ssh"]
        return found, VerifyKeys.from_json(answer.get("interceptor_host_ca", []))

    def connect(self, resource: str, account: str | None, keys: SessionKeys) -> dict[str, Any]:
        """Open a session; the answer is for :func:`pam_client.session.parse`."""
        body = {"resource": resource, "account": account, **keys.public()}
        return self._call("POST", "/connect", json=body)

    def sessions(self, *, mine: bool, active: bool, limit: int) -> list[dict[str, Any]]:
        """The newest sessions the caller may see, at most ``limit``. ``active`` are also those that wait for
        their first connection: they count towards the limit of open sessions."""
        if not active:
            return self._sessions(mine, "", limit)
        # In this order: what is opened meanwhile is in both answers, and not in neither.
        answers = [self._sessions(mine, state, limit) for state in ("granted", "active")]
        found = {str(entry.get("id")): entry for answer in answers for entry in answer}
        return sorted(found.values(), key=_started, reverse=True)[:limit]

    def _sessions(self, mine: bool, state: str, limit: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        before = ""
        while len(found) < limit:
            wanted = min(PAGE, limit - len(found))
            query = {
                "mine": str(int(mine)),
                "limit": str(wanted),
                "state": state,
                "before": before,
            }
            page = _objects(
                self._get(f"/sessions?{urlencode({k: v for k, v in query.items() if v})}"), "sessions"
            )
            found += page
            if len(page) < wanted:
                break
            before = str(page[-1].get("id", ""))
        return found[:limit]

    def session(self, session: str) -> dict[str, Any]:
        return self._get(f"/sessions/{quote(session, safe='')}")

    def kill(self, session: str, reason: str) -> dict[str, Any]:
        body = {"reason": reason} if reason else {}
        return self._call("POST", f"/sessions/{quote(session, safe='')}/kill", json=body)

    def end(self, session: str, *, timeout: float = 10.0) -> None:
        """Say that the session is done. Short: nobody waits for it at the end of a command."""
        self._call("POST", f"/sessions/{quote(session, safe='')}/end", json={}, timeout=timeout)

    def verify(self, session: str) -> dict[str, Any]:
        # The platform reads the whole recording for it.
        return self._get(f"/sessions/{quote(session, safe='')}/verify", timeout=120.0)

    def events(self, session: str) -> Iterator[dict[str, Any]]:
        """The recording's events, as they arrive. Raises ProtocolError for what is no event."""
        path = f"/sessions/{quote(session, safe='')}/events"
        response = self._authorised("GET", path, headers={"Accept": "application/x-ndjson"}, raw=True)
        with response:
            for line in _lines(response):
                if line.strip():
                    yield _event(line)

    def raw_part(self, session: str, part: int, file: BinaryIO) -> None:
        """Write a part of the recording, encrypted as it is stored, into ``file``."""
        path = f"/sessions/{quote(session, safe='')}/parts/{part}/raw"
        size = 0
        with self._authorised(
            "GET", path, headers={"Accept": "application/octet-stream"}, raw=True
        ) as response:
            try:
                for piece in response.iter_content(1 << 20):
                    size += len(piece)
                    if size > MAX_PART:
                        raise ProtocolError(f"a part of more than {MAX_PART} bytes")
                    file.write(piece)
            except requests.RequestException:
                raise UnavailableError("the platform's answer was cut") from None

    def close(self) -> None:
        self._client.close()

    def _get(self, path: str, **options: Any) -> dict[str, Any]:
        for pause in _PAUSES:
            try:
                return self._call("GET", path, **options)
            except UnavailableError:
                threading.Event().wait(pause)
        return self._call("GET", path, **options)

    def _call(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self._authorised(method, path, **options)
        return answer

    def _authorised(self, method: str, path: str, *, raw: bool = False, **options: Any) -> Any:
        """One call; after a 401 once more with another token (it may have been revoked, or clocks differ)."""
        request = self._client.stream if raw else self._client.call
        self._used.token = self._used.rejected = ""
        try:
            return request(method, path, **options)
        except AuthenticationError:
            if not self._used.token:
                raise  # no token was sent: there is no login
        self._used.rejected = self._used.token
        return request(method, path, **options)

    def _authorization(self) -> str:
        self._used.token = ""
        token = self._login.token(rejected=self._used.rejected)
        self._used.token = token
        return f"Bearer {token}"


def remember_names(home: Home, resources: list[dict[str, Any]]) -> None:
    """Keep the names for completion, which must not wait for the network."""
    home.write_json(_COMPLETION_FILE, {"names": sorted(names_of(resources))})


def remembered_names(home: Home) -> list[str]:
    """What :func:`remember_names` kept last."""
    names = home.read_json(_COMPLETION_FILE).get("names")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def names_of(resources: list[dict[str, Any]]) -> Iterator[str]:
    """``prod-db/readonly`` for every account, and ``prod-db`` alone where there is only one."""
    for resource in resources:
        accounts = _objects(resource, "accounts")
        if len(accounts) == 1:
            yield str(resource.get("name", ""))
        for account in accounts:
            yield f"{resource.get('name', '')}/{account.get('name', '')}"


def _started(entry: dict[str, Any]) -> int:
    value = entry.get("started")
    return value if isinstance(value, int) else 0


def _objects(answer: dict[str, Any], key: str) -> list[dict[str, Any]]:
    value = answer.get(key)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ProtocolError(f"the platform's answer has no list of {key}")
    return value


def _lines(response: requests.Response) -> Iterator[bytes]:
    """Lines of an NDJSON body; ``iter_lines`` would let one line grow without bound."""
    rest = b""
    try:
        for piece in response.iter_content(65536):
            *lines, rest = (rest + piece).split(b"\n")
            yield from lines
            if len(rest) > MAX_EVENT:
                raise ProtocolError(f"an event of more than {MAX_EVENT} bytes")
    except (requests.RequestException, OSError):
        raise UnavailableError("the platform's answer was cut") from None
    yield rest


def _event(line: bytes) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except ValueError:
        event = None
    if not isinstance(event, dict):
        raise ProtocolError("the platform sent what is not an event")
    return event
