"""SocketStream: a socket, plain or TLS, in the shape that everything else uses."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from pam_common.stream import SocketStream, Stream

PATIENCE = 60.0


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as executor:
        yield executor


@pytest.fixture
def pair() -> Iterator[tuple[SocketStream, SocketStream]]:
    low, high = map(SocketStream, socket.socketpair())
    yield low, high
    for stream in (low, high):
        stream.abort()
        stream.close()


def test_bytes_and_half_close(pair: tuple[SocketStream, SocketStream]) -> None:
    low, high = pair
    _shape: Stream = low  # checked by mypy
    for data in (b"bytes", bytearray(b"array"), memoryview(b"view")):
        low.sendall(data)
        assert high.recv(100) == bytes(data)
    low.shutdown(socket.SHUT_WR)
    assert high.recv(100) == b""
    high.sendall(b"still here")
    assert low.recv(100) == b"still here"


def test_shutdown_of_a_stream_that_is_gone_is_silent(pair: tuple[SocketStream, SocketStream]) -> None:
    low, _high = pair
    low.abort()
    low.shutdown(socket.SHUT_WR)
    low.close()
    low.shutdown(socket.SHUT_WR)


def test_abort_wakes_a_reader(pair: tuple[SocketStream, SocketStream], pool: ThreadPoolExecutor) -> None:
    waiting = pool.submit(pair[0].recv, 1)
    pair[0].abort()
    assert waiting.result(PATIENCE) == b""


def test_abort_wakes_a_writer(pair: tuple[SocketStream, SocketStream], pool: ThreadPoolExecutor) -> None:
    waiting = pool.submit(pair[0].sendall, bytes(10_000_000))
    assert pair[1].recv(1) == b"\0"  # so it is under way, and cannot complete
    pair[0].abort()
    assert isinstance(waiting.exception(PATIENCE), OSError)


def test_abort_may_come_late_and_often(pair: tuple[SocketStream, SocketStream]) -> None:
    pair[0].abort()
    pair[0].abort()
    pair[0].close()
    pair[0].abort()


@pytest.fixture
def tls_pair(tmp_path: Path, pool: ThreadPoolExecutor) -> Iterator[tuple[SocketStream, SocketStream]]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(minutes=5))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    pem = tmp_path / "server.pem"
    pem.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(pem)
    client_context = ssl.create_default_context(cafile=str(pem))
    low, high = socket.socketpair()
    server = pool.submit(server_context.wrap_socket, high, server_side=True)
    client = client_context.wrap_socket(low, server_hostname="127.0.0.1")
    streams = SocketStream(client), SocketStream(server.result(PATIENCE))
    yield streams
    for stream in streams:
        stream.abort()
        stream.close()


def test_tls_carries_bytes_and_has_no_half_close(tls_pair: tuple[SocketStream, SocketStream]) -> None:
    low, high = tls_pair
    low.sendall(b"question")
    low.shutdown(socket.SHUT_WR)
    assert high.recv(100) == b"question"
    high.sendall(b"answer")
    assert low.recv(100) == b"answer"


def test_abort_wakes_a_tls_reader(
    tls_pair: tuple[SocketStream, SocketStream], pool: ThreadPoolExecutor
) -> None:
    waiting = pool.submit(tls_pair[0].recv, 1)
    tls_pair[0].abort()
    error = waiting.exception(PATIENCE)
    assert isinstance(error, OSError) or waiting.result() == b""
