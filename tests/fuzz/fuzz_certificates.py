"""OpenSSH certificates as a client, an agent or a relay shows them.

Input: a mode. BLOB: the certificate's bytes. LINE: its line of text. SIGNED: the bytes of a certificate up
to its signature, which our own CA then makes: what it would never sign, but must not trip over either.
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterator

from cryptography.hazmat.primitives.serialization import SSHCertificateType
from material import AGENT, NOW, PLATFORM, SESSION, TRUSTED, Input

from pam_common.errors import AuthenticationError
from pam_common.ssh_certs import (
    CERT_TYPE,
    PLAIN_TYPE,
    Certificate,
    CertificateKey,
    make_host_certificate,
    make_user_certificate,
    verify_host_certificate,
    verify_user_certificate,
)

BLOB, LINE, SIGNED = range(3)
VALID = {"valid_after": NOW - 60, "valid_before": NOW + 600}
USER = make_user_certificate(PLATFORM, AGENT.public, key_id=SESSION, principals=["connect:dc1"], **VALID)
BOUND = make_user_certificate(
    PLATFORM,
    AGENT.public,
    key_id=SESSION,
    principals=["connect:dc1", "other"],
    source_addresses=["10.0.0.0/8", "2001:db8::/32"],
    **VALID,
)
HOST = make_host_certificate(PLATFORM, AGENT.public, key_id="r1", principals=["relay.example.com"], **VALID)
FOREIGN = make_user_certificate(AGENT, AGENT.public, key_id=SESSION, principals=["connect:dc1"], **VALID)
#: A wire string of 83 bytes: the signature of an Ed25519 key.
SIGNATURE = 4 + 4 + len(PLAIN_TYPE) + 4 + 64


def TestOneInput(data: bytes) -> None:
    source = Input(data)
    mode = source.byte() % 3
    shown: bytes | str = source.rest()
    assert isinstance(shown, bytes)
    if mode == LINE:
        shown = shown.decode(errors="replace")
    elif mode == SIGNED:
        shown += _string(_string(PLAIN_TYPE.encode()) + _string(PLATFORM.sign(shown)))
    accepted = [_user(shown, address) for address in (None, "10.1.2.3", "not an address")]
    accepted.append(_host(shown))
    if mode != SIGNED:
        assert all(certificate is None or certificate in GENUINE for certificate in accepted)
        assert accepted[0] is None or accepted[0] == GENUINE[0]
    with contextlib.suppress(AuthenticationError):
        CertificateKey(AGENT.seed(), shown if isinstance(shown, str) else _line(shown))


def seeds() -> Iterator[bytes]:
    for line in (USER, BOUND, HOST, FOREIGN):
        yield bytes([LINE]) + line.encode()
        yield bytes([BLOB]) + _blob(line)
        yield bytes([SIGNED]) + _blob(line)[:-SIGNATURE]
    options = (
        b"",
        _option(b"force-command", b"ls"),
        _option(b"source-address", b"10.0.0.0/8,::1,fe80::%1/64"),
    )
    for kind in (SSHCertificateType.USER, SSHCertificateType.HOST):
        for option in options:
            yield bytes([SIGNED]) + _body(kind.value, [b"connect:dc1"], option)
    yield bytes([SIGNED]) + _body(1, [], b"")
    yield bytes([SIGNED]) + _body(1, [b"\xff\0"] * 17, b"")


def _user(shown: bytes | str, address: str | None) -> Certificate | None:
    try:
        return verify_user_certificate(
            shown, TRUSTED, now=NOW, principal="connect:dc1", source_address=address
        )
    except AuthenticationError:
        return None


def _host(shown: bytes | str) -> Certificate | None:
    try:
        return verify_host_certificate(shown, TRUSTED, hostname="relay.example.com", now=NOW)
    except AuthenticationError:
        return None


def _string(value: bytes) -> bytes:
    return len(value).to_bytes(4, "big") + value


def _option(name: bytes, value: bytes) -> bytes:
    return _string(name) + _string(_string(value))


def _body(kind: int, principals: list[bytes], options: bytes) -> bytes:
    """A certificate up to its signature, as PROTOCOL.certkeys lists the fields."""
    return b"".join(
        (
            _string(CERT_TYPE.encode()),
            _string(b"n" * 32),
            _string(AGENT.public),
            (1).to_bytes(8, "big"),
            kind.to_bytes(4, "big"),
            _string(SESSION.encode()),
            _string(b"".join(map(_string, principals))),
            (NOW - 60).to_bytes(8, "big"),
            (NOW + 600).to_bytes(8, "big"),
            _string(options),
            _string(b""),
            _string(b""),
            _string(_string(PLAIN_TYPE.encode()) + _string(PLATFORM.public)),
        )
    )


def _blob(line: str) -> bytes:
    return base64.b64decode(line.split()[1])


def _line(blob: bytes) -> str:
    return f"{CERT_TYPE} {base64.b64encode(blob).decode()}"


#: What may be accepted of bytes that our CA did not sign here: the certificates that it did sign.
GENUINE = [_user(USER, None), _user(BOUND, "10.1.2.3"), _host(HOST)]
assert None not in GENUINE
