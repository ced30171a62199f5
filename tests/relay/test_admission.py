"""The door, with a client that speaks raw messages: an offer is no proof, and nothing works before login."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import paramiko
import pytest

from pam_common.fast_ssh import Transport
from pam_common.keys import SigningKey
from pam_common.ssh_certs import CERT_TYPE, CertificateKey

SERVICE_ACCEPT, UNIMPLEMENTED, DISCONNECT = 6, 3, 1
FAILURE, SUCCESS, PK_OK = 51, 52, 60
REQUEST_SUCCESS, REQUEST_FAILURE = 81, 82
OPEN_SUCCESS, OPEN_FAILURE = 91, 92


class Everything(dict):
    """A dispatch table that notes each message instead of acting on it."""

    def __init__(self, note: Callable[[int, paramiko.Message], None]) -> None:
        self._note = note

    def __contains__(self, kind: object) -> bool:
        return True

    def __getitem__(self, kind: int) -> Callable[[paramiko.Message], None]:
        return partial(self._note, kind)


class RawClient:
    """A client past key exchange that sends what the test says and keeps what comes back."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.transport = Transport(socket.create_connection(address), name="raw")
        done = threading.Event()
        self.transport.start_client(event=done)
        assert done.wait(60)
        assert self.transport.is_active()
        self.answers: list[tuple[int, bytes]] = []
        self.transport._handler_table = Everything(self._note)

    def _note(self, kind: int, message: paramiko.Message) -> None:
        self.answers.append((kind, message.asbytes()))

    def send(self, kind: int, *fields: Any) -> None:
        message = paramiko.Message()
        message.add_byte(bytes([kind]))
        for field in fields:
            if isinstance(field, bool):
                message.add_boolean(field)
            elif isinstance(field, int):
                message.add_int(field)
            else:
                message.add_string(field)
        try:
            self.transport.packets.send_payload(message.asbytes())
        except EOFError:
            self.transport.join(60)

    def begin(self) -> None:
        self.send(5, "ssh-userauth")

    def request(
        self, key: CertificateKey, *, signed_by: CertificateKey | None = None, **changes: Any
    ) -> None:
        """A publickey request with ``key``'s certificate: an offer, or signed by ``signed_by``."""
        blob = changes.get("blob", key.asbytes())
        algorithm = changes.get("algorithm", CERT_TYPE)
        fields: list[Any] = ["pam", "ssh-connection", "publickey", signed_by is not None, algorithm, blob]
        if signed_by is not None:
            signed = paramiko.Message()
            signed.add_string(self.transport.session_id)
            signed.add_byte(bytes([50]))
            for field in fields:
                signed.add_boolean(field) if isinstance(field, bool) else signed.add_string(field)
            fields.append(signed_by.sign_ssh_data(signed.asbytes()).asbytes())
        self.send(50, *fields)

    def kinds(self) -> list[int]:
        return [kind for kind, _ in self.answers]


@pytest.fixture
def raw(relay):
    client = RawClient(relay.address)
    yield client
    client.transport.close()


def forward(raw: RawClient) -> None:
    raw.send(80, "tcpip-forward", True, "dc1", 1)


def channel(raw: RawClient) -> None:
    raw.send(90, "direct-tcpip", 7, 1 << 20, 32768, "dc1", 1, "127.0.0.1", 0)


def nothing_was_given(relay, raw: RawClient) -> None:
    assert not {SUCCESS, REQUEST_SUCCESS, OPEN_SUCCESS} & set(raw.kinds())
    status = relay.relay.status()
    assert status["channels"] == 0
    assert "dc1-x" not in [route["agent"] for route in status["routes"]]


@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize("ask", [forward, channel])
def test_channels_and_forwards_before_login_are_refused(relay, raw, wait_for, ask, begin: bool) -> None:
    """Channel or global requests before authentication (CVE-2018-7750, CVE-2018-1000805)."""
    relay.agent()
    if begin:
        raw.begin()
    ask(raw)
    wait_for(lambda: {REQUEST_FAILURE, OPEN_FAILURE} & set(raw.kinds()) or not raw.transport.is_alive())
    nothing_was_given(relay, raw)


@pytest.mark.parametrize("kind", [81, 82, 91, 92, 93, 94, 95, 96, 97, 98, 99, 100])
def test_messages_of_open_channels_before_login_end_the_connection(relay, raw, wait_for, kind: int) -> None:
    raw.send(kind, 0, 100)
    raw.transport.join(60)
    assert not raw.transport.is_alive()
    nothing_was_given(relay, raw)


@pytest.mark.parametrize("kind", [52, 53, 60, 61, 6, 192, 255])
def test_a_servers_own_messages_log_nobody_in(relay, raw, wait_for, kind: int) -> None:
    """A client that says "success" itself (CVE-2018-10933)."""
    raw.begin()
    raw.send(kind)
    forward(raw)
    channel(raw)
    wait_for(lambda: {REQUEST_FAILURE, OPEN_FAILURE} <= set(raw.kinds()) or not raw.transport.is_alive())
    nothing_was_given(relay, raw)


def test_an_offer_is_no_proof(relay, raw, wait_for) -> None:
    """A public-key offer taken as proof without a signature (CVE-2023-43660)."""
    relay.agent()
    raw.begin()
    raw.request(relay.login("serve:dc1", "dc1-x"))
    wait_for(lambda: PK_OK in raw.kinds())
    forward(raw)
    channel(raw)
    wait_for(lambda: {REQUEST_FAILURE, OPEN_FAILURE} <= set(raw.kinds()))
    nothing_was_given(relay, raw)


def test_a_signature_by_another_key_is_refused(relay, raw, wait_for) -> None:
    victim, own = relay.login("serve:dc1", "dc1-x"), relay.login("serve:dc1", "dc1-y")
    raw.begin()
    raw.request(victim, signed_by=own)
    wait_for(lambda: FAILURE in raw.kinds())
    forward(raw)
    wait_for(lambda: REQUEST_FAILURE in raw.kinds())
    nothing_was_given(relay, raw)


def test_who_offered_another_is_still_only_who_they_proved_to_be(relay, raw, wait_for) -> None:
    """Offer the victim's certificate, then log in with one's own: the routes are one's own."""
    victim, own = relay.login("serve:dc1", "dc1-x"), relay.login("serve:dc2", "dc2-y")
    raw.begin()
    raw.request(victim)
    raw.request(own, signed_by=own)
    wait_for(lambda: SUCCESS in raw.kinds())
    raw.request(victim)  # after login: ignored
    forward(raw)
    wait_for(lambda: REQUEST_FAILURE in raw.kinds())
    raw.send(80, "tcpip-forward", True, "dc2", 1)
    wait_for(lambda: REQUEST_SUCCESS in raw.kinds())
    assert [route["agent"] for route in relay.relay.status()["routes"]] == ["dc2-y"]


def test_a_plain_key_is_refused_even_under_the_certificates_name(relay, raw, wait_for) -> None:
    key = relay.login("serve:dc1", "dc1-x")
    plain = paramiko.Message()
    plain.add_string("ssh-ed25519")
    plain.add_string(SigningKey.generate().public)
    raw.begin()
    raw.request(key, blob=plain.asbytes(), algorithm="ssh-ed25519")
    wait_for(lambda: FAILURE in raw.kinds())
    raw.request(key, blob=plain.asbytes())
    wait_for(lambda: raw.kinds().count(FAILURE) == 2 or not raw.transport.is_alive())
    nothing_was_given(relay, raw)


@pytest.mark.parametrize(
    "method",
    [
        ("none",),
        ("password", False, "secret"),
        ("password", True, "old", "new"),
        ("keyboard-interactive", "", ""),
        ("hostbased", "ssh-ed25519", "x"),
        ("gssapi-with-mic", 1, "x"),
    ],
)
def test_there_is_no_other_way_in(relay, raw, wait_for, method: tuple[Any, ...]) -> None:
    raw.begin()
    raw.send(50, "pam", "ssh-connection", *method)
    wait_for(lambda: FAILURE in raw.kinds() or not raw.transport.is_alive())
    nothing_was_given(relay, raw)


def test_guessing_ends(relay, raw, wait_for) -> None:
    raw.begin()
    for _ in range(12):
        raw.request(relay.login("serve:dc1", "dc1-x", ca=SigningKey.generate()))
    raw.transport.join(60)
    assert not raw.transport.is_alive()
