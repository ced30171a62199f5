"""What a relay asks of its platform: to be enrolled, once, and its bundle, again and again."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

from pam_common import tokens
from pam_common.errors import PamError, ProtocolError, UnavailableError
from pam_common.keys import SigningKey, b64encode
from pam_common.logging import get_logger, kv
from pam_common.platform_client import PlatformClient
from pam_relay.bundle import Bundle, Trust
from pam_relay.config import RelayConfig
from pam_relay.state import RelayState, check_name, make_keys

log = get_logger("relay.platform")

ENROL_AUDIENCE = "pam-enrol"
#: Seconds a request's own token is valid: long enough for a slow handshake, useless when found later.
REQUEST_LIFETIME = 60
#: The poll's wait grows to this while the platform is away.
MAX_WAIT = 60.0


def connect(config: RelayConfig, identity: SigningKey, relay: str, audience: str) -> PlatformClient:
    """A client whose every request is signed anew by the relay's identity, by the platform's clock."""
    client: PlatformClient

    def authorization() -> str:
        claims = {"iss": relay, "sub": relay, "aud": audience, "jti": secrets.token_urlsafe(16)}
        token = tokens.sign(
            identity, tokens.RELAY_REQUEST, claims, lifetime=REQUEST_LIFETIME, now=client.now()
        )
        return f"Bearer {token}"

    client = PlatformClient(config.platform, ca_file=config.platform_ca, authorization=authorization)
    return client


def enrol(config: RelayConfig, token: str, name: str, version: str) -> RelayState:
    """Enrol as ``name`` and store the result in ``config.state_dir``.

    Repeating it after a lost answer uses the same keys, which the platform accepts within the hour. Raises
    PamError when the folder belongs to another relay, or the platform refuses.
    """
    check_name(name)
    if (config.state_dir / "relay.json").exists():
        state = RelayState.load(config.state_dir)
        if state.relay != name:
            raise PamError(
                f"this folder already belongs to relay {state.relay}",
                hint=f"give another state_dir, or empty {config.state_dir} to give that relay up.",
            )
        return state
    keys = make_keys(config.state_dir)
    with connect(config, keys.identity, name, ENROL_AUDIENCE) as client:
        request = {
            "token": token,
            "name": name,
            "identity_key": b64encode(keys.identity.public),
            "host_key": b64encode(keys.host.public),
            "version": version,
        }
        answer = client.post("/relay/enrol", json=request)
        now = client.now()
    if text_of(answer, "relay") != name:
        raise ProtocolError("the platform enrolled something else than was asked for")
    issuer = text_of(answer, "issuer")
    trust = Trust.first(text_of(answer, "trust"), issuer, now)
    bundle = Bundle.parse(text_of(answer, "bundle"), trust, relay=name, issuer=issuer, now=now)
    state = RelayState(config.state_dir, keys, name, issuer, trust, bundle)
    state.check_host_certificate(now)
    state.save()
    return state


class BundlePoller:
    """Fetches the bundle every ``interval`` seconds in its own thread and hands each new one on.

    While the platform is away or sends what does not verify, the last good bundle stays in force.
    """

    def __init__(
        self,
        client: PlatformClient,
        state: RelayState,
        interval: float,
        changed: Callable[[Bundle], None],
    ) -> None:
        self._client = client
        self.interval = interval
        self._changed = changed
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="bundle", daemon=True)
        self._failures = 0
        self.state = state
        self.problem = ""
        self.beat = time.monotonic()

    def start(self) -> None:
        self._thread.start()

    def poll_soon(self) -> None:
        """Look now (a reload was asked for)."""
        self._wake.set()

    def stop(self) -> None:
        self._stop.set()
        self._wake.set()

    def poll(self) -> None:
        """Fetch and apply once. Raises PamError; the state stays as it was then."""
        answer = self._client.get("/relay/bundle")
        now = self._client.now()
        state = self.state.renewed(text_of(answer, "trust"), text_of(answer, "bundle"), now)
        if state.bundle.token != self.state.bundle.token:
            self._changed(state.bundle)
        if state.bundle.serial != self.state.bundle.serial:
            log.info("bundle renewed", extra=kv(serial=state.bundle.serial))
        self.state = state

    def _run(self) -> None:
        while not self._stop.is_set():
            self.beat = time.monotonic()
            self._note(self._attempt())
            self._wake.wait(min(MAX_WAIT, self.interval * 2 ** min(self._failures, 6)))
            self._wake.clear()

    def _attempt(self) -> PamError | None:
        try:
            self.poll()
        except PamError as error:
            return error
        except Exception as error:  # the thread must go on: without it no revocation arrives
            log.exception("bundle failed")
            return UnavailableError(f"the bundle could not be taken: {type(error).__name__}")
        return None

    def _note(self, error: PamError | None) -> None:
        """Log changes only: an outage is two lines, not one every few seconds."""
        problem = str(error) if error is not None else ""
        if problem != self.problem:
            if problem:
                log.warning("no bundle from the platform", extra=kv(reason=problem))
            else:
                log.info("the platform answers again")
        self._failures = self._failures + 1 if problem else 0
        self.problem = problem


def text_of(answer: dict[str, Any], key: str) -> str:
    """A text field of the platform's answer. Raises ProtocolError."""
    value = answer.get(key)
    if not isinstance(value, str):
        raise ProtocolError(f'the platform\'s answer has no "{key}"')
    return value
