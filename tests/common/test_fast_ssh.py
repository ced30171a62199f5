"""The SSH transport: what it refuses, and that it neither grows nor waits for itself."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import paramiko
import paramiko_contract
import pytest
from paramiko.common import MSG_CHANNEL_DATA

from pam_common import fast_ssh, ssh_certs
from pam_common.errors import AuthenticationError, RefusedError, UnavailableError
from pam_common.fast_ssh import ChannelStream, IncomingChannel, Transport, outgoing, packets, transport
from pam_common.fast_ssh.channel import PACKET, WINDOW
from pam_common.ssh_certs import CertificateKey
from pam_common.stream import ROOM
from pam_common.tokens import KeyEntry, SigningKey, VerifyKeys

USER_CA = SigningKey(b"\1" * 32)
HOST_CA = SigningKey(b"\2" * 32)
HOST = SigningKey(b"\3" * 32)
USER = SigningKey(b"\4" * 32)
HOST_KEYS = VerifyKeys([KeyEntry(HOST_CA.kid, HOST_CA.public)])


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def host_key(ca: SigningKey = HOST_CA, names: tuple[str, ...] = ("relay.test",)) -> CertificateKey:
    now = int(time.time())
    line = ssh_certs.make_host_certificate(
        ca, HOST.public, key_id="r1", principals=names, valid_after=now - 300, valid_before=now + 600
    )
    return CertificateKey(HOST.seed(), line)


def login_key() -> CertificateKey:
    now = int(time.time())
    line = ssh_certs.make_user_certificate(
        USER_CA, USER.public, key_id="s-1", principals=["connect:dc1"], valid_after=now - 300,
        valid_before=now + 600,
    )  # fmt: skip
    return CertificateKey(USER.seed(), line)


class Door(paramiko.ServerInterface):
    """Lets everybody in who proves to hold the key; channels go to ``streams``."""

    def __init__(self) -> None:
        self.streams: list[ChannelStream] = []
        self.refuse_with: str | None = None
        self.window = WINDOW
        self.login = True

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        return paramiko.AUTH_SUCCESSFUL if self.login else paramiko.AUTH_FAILED

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_port_forward_request(self, address: str, port: int) -> int:
        return port if address == "dc1" else 0  # type: ignore[return-value]

    def wanted(self, wish: IncomingChannel) -> None:
        if self.refuse_with is not None:
            wish.refuse(1, self.refuse_with)
        else:
            self.streams.append(wish.accept(window=self.window))


class Pair:
    """A client and a server transport that are logged in."""

    def __init__(self, door: Door, client: Transport, server: Transport) -> None:
        self.door, self.client, self.server = door, client, server

    def open(self) -> tuple[ChannelStream, ChannelStream]:
        count = len(self.door.streams)
        near = fast_ssh.open_direct(self.client, "dc1")
        wait_for(lambda: len(self.door.streams) > count)
        return near, self.door.streams[count]


Sockets = Callable[[], tuple[socket.socket, socket.socket]]


@pytest.fixture
def sockets() -> Iterator[Sockets]:
    made: list[socket.socket] = []

    def make() -> tuple[socket.socket, socket.socket]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            near = socket.create_connection(listener.getsockname())
            far, _ = listener.accept()
        made.extend((near, far))
        return near, far

    yield make
    for sock in made:
        sock.close()


@pytest.fixture
def serve(sockets: Sockets) -> Iterator[Callable[..., tuple[socket.socket, Door, Transport]]]:
    transports: list[Transport] = []

    def begin(key: CertificateKey | None = None) -> tuple[socket.socket, Door, Transport]:
        near, far = sockets()
        door = Door()
        server = fast_ssh.serve(far, name="server", host_key=key or host_key(), server=door)
        server.on_direct_tcpip = door.wanted
        fast_ssh.start(server, door)
        transports.append(server)
        return near, door, server

    yield begin
    for one in transports:
        one.close()
        one.join(60)
        assert not one.is_alive()


@pytest.fixture
def pair(serve: Callable[..., tuple[socket.socket, Door, Transport]]) -> Iterator[Pair]:
    near, door, server = serve()
    client = dial(near)
    yield Pair(door, client, server)
    client.close()
    client.join(60)


def dial(sock: socket.socket, **changes: object) -> Transport:
    options: dict = {"name": "client", "host_ca": HOST_KEYS, "hostname": "relay.test", "login": login_key()}
    options.update(changes)
    return fast_ssh.connect(sock, **options)


# -- who is accepted -----------------------------------------------------------------------------------


def test_a_channel_on_its_way_when_a_forward_is_cancelled_is_let_in(pair: Pair) -> None:
    """The peer sent it before it heard of the cancel: nobody is refused for a drain."""
    arrived: list[ChannelStream] = []
    pair.client.request_port_forward("dc1", 1, lambda stream, *_: arrived.append(stream))
    opened: list[ChannelStream] = []

    def cancelled(_address: str, _port: int) -> None:
        def late() -> None:
            opened.append(fast_ssh.open_forwarded(pair.server, "dc1", 1, session="s1"))

        thread = threading.Thread(target=late)
        thread.start()
        # In the server's reader thread, before the cancel is answered: the wish goes out first.
        wait_for(lambda: len(pair.server._streams) == 1)

    pair.door.cancel_port_forward_request = cancelled  # type: ignore[assignment]
    pair.client.cancel_port_forward("dc1", 1)
    wait_for(lambda: opened and arrived)


@pytest.mark.parametrize("words", ["Authentication failed: transport shut down or saw EOF", "Timeout"])
def test_a_connection_that_is_lost_during_the_login_is_no_refusal(
    serve: Callable[..., tuple[socket.socket, Door, Transport]], monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    near, _door, _server = serve()

    def lost(transport: Transport, *_: object) -> None:
        transport.close()
        raise paramiko.AuthenticationException(words)

    monkeypatch.setattr(Transport, "auth_publickey", lost)
    with pytest.raises(UnavailableError, match="closed the connection during login"):
        dial(near)


def test_a_connection_that_is_lost_after_the_key_exchange_is_unavailable(
    serve: Callable[..., tuple[socket.socket, Door, Transport]], monkeypatch: pytest.MonkeyPatch
) -> None:
    near, _door, _server = serve()

    def gone(_transport: Transport) -> bytes:
        raise paramiko.SSHException("No existing session")

    monkeypatch.setattr(Transport, "host_certificate", gone)
    with pytest.raises(UnavailableError, match="closed the connection during the key exchange"):
        dial(near)


def test_a_channel_carries_bytes_both_ways_and_half_closes(pair: Pair) -> None:
    near, far = pair.open()
    near.sendall(b"ping")
    near.shutdown(socket.SHUT_WR)
    assert far.recv(100) == b"ping"
    assert far.recv(100) == b""
    far.sendall(b"pong")
    assert near.recv(100) == b"pong"
    far.close()
    assert near.recv(100) == b""
    assert pair.client.local_cipher.startswith("aes128-gcm")
    assert pair.client.agreed_on_strict_kex


def test_a_host_certificate_of_another_ca_or_name_is_refused_before_login(serve) -> None:
    for key in (host_key(USER_CA), host_key(names=("other.test",))):
        near, _door, server = serve(key)
        with pytest.raises(AuthenticationError):
            dial(near)
        assert not server.is_authenticated()


def test_a_plain_host_key_is_never_negotiated(sockets: Sockets) -> None:
    near, far = sockets()
    stock = paramiko.Transport(far)
    stock.add_server_key(plain_key())
    stock.start_server(event=threading.Event(), server=Door())
    with pytest.raises(UnavailableError, match="host key"):
        dial(near)
    stock.close()


def test_a_peer_without_strict_key_exchange_is_refused(serve) -> None:
    """The prefix truncation attack (CVE-2023-48795) works on who does not insist."""
    near, _door, server = serve()
    lax = paramiko.Transport(near, strict_kex=False)
    lax._preferred_ciphers = ("aes128-gcm@openssh.com",)
    lax._preferred_macs = ("hmac-sha2-256-etm@openssh.com",)
    with pytest.raises((paramiko.SSHException, EOFError)):
        lax.start_client(timeout=60)
    server.join(60)
    assert "strict" in str(server.get_exception())


def test_a_refused_login_says_so(serve) -> None:
    near, door, _server = serve()
    door.login = False
    with pytest.raises(RefusedError, match="certificate"):
        dial(near)


def test_a_refused_channel_gives_the_peers_reason(pair: Pair) -> None:
    pair.door.refuse_with = "no agent of dc1 is \x1b[31mhere"
    with pytest.raises(RefusedError, match=r"no agent of dc1 is \?\[31mhere"):
        fast_ssh.open_direct(pair.client, "dc1")


def test_a_silent_server_does_not_hold_the_client(sockets: Sockets) -> None:
    near, _far = sockets()
    with pytest.raises(UnavailableError):
        dial(near, timeout=0.3)


# -- hostile bytes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "first",
    [
        b"x" * 100_000,
        b"SSH-2.0-x\r\n" + struct.pack(">I", 0xFFFFFFFC) + b"y" * 1000,
        b"SSH-2.0-x\r\n" + struct.pack(">I", 35004) + b"y" * 1000,
        b"SSH-2.0-x\r\n" + bytes(1000),
        b"SSH-2.0-x\r\n" + struct.pack(">IB", 12, 12) + bytes(100),
        b"SSH-1.5-old\r\n",
    ],
)
def test_impossible_first_bytes_end_the_connection(serve, first: bytes) -> None:
    near, _door, server = serve()
    with contextlib.suppress(OSError):
        near.sendall(first)
    server.join(60)
    assert not server.is_alive()


def test_a_long_identification_line_is_refused_also_in_one_piece(sockets: Sockets) -> None:
    for line, allowed in ((b"x" * 253 + b"\r\n", True), (b"x" * 254 + b"\r\n", False)):
        ours, theirs = sockets()
        theirs.sendall(line)
        reader = packets.Packets(ours)
        with contextlib.nullcontext() if allowed else pytest.raises(paramiko.SSHException, match="too long"):
            assert reader.readline(timeout=60) == "x" * 253


def test_a_flipped_bit_ends_the_connection(pair: Pair) -> None:
    near, _far = pair.open()
    key = pair.client.packets._key_out
    assert key is not None
    key.nonce()  # what the peer decrypts with is now another
    near.sendall(b"x")
    pair.server.join(60)
    assert "forged" in str(pair.server.get_exception())


def test_a_peer_that_ignores_its_window_is_cut(pair: Pair) -> None:
    near, far = pair.open()
    header = struct.pack(">BII", MSG_CHANNEL_DATA, near.remote, 32000)
    with contextlib.suppress(EOFError, paramiko.SSHException):
        for _ in range(transport.WINDOW // 32000 + 2):
            pair.client.packets.send_payload(header + bytes(32000))
    pair.server.join(60)
    assert "window" in str(pair.server.get_exception())
    assert far.buffered <= transport.WINDOW


def test_a_peer_that_asks_and_does_not_read_is_cut(sockets: Sockets) -> None:
    """Answers are queued without waiting, and a queue that only grows is the peer's fault."""
    near, _far = sockets()
    link = packets.Packets(near)
    began = time.monotonic()

    def answer() -> None:
        for _ in range(100_000):
            link.send_soon(bytes([82]) + bytes(2000))

    with pytest.raises(paramiko.SSHException, match="does not read"):
        answer()
    assert time.monotonic() - began < 60
    assert len(link._queue) <= outgoing.MAX_QUEUE / 2000
    link.close()


# -- flow, rekey, liveness -----------------------------------------------------------------------------


def test_a_slow_reader_slows_the_writer(pair: Pair) -> None:
    near, far = pair.open()
    sent = [0]

    def write() -> None:
        with contextlib.suppress(OSError):
            while True:
                near.sendall(bytes(65536))
                sent[0] += 65536

    thread = threading.Thread(target=write)
    thread.start()
    wait_for(lambda: far.buffered >= transport.WINDOW * 0.9)
    settled = sent[0]
    assert settled <= transport.WINDOW
    assert far.recv(transport.WINDOW)
    wait_for(lambda: sent[0] > settled)
    near.abort()
    thread.join(60)
    assert not thread.is_alive()


def test_abort_wakes_recv_and_the_peer_reads_a_cut(pair: Pair) -> None:
    near, far = pair.open()
    woken = threading.Event()

    def read() -> None:
        with contextlib.suppress(OSError):
            near.recv(10)
        woken.set()

    threading.Thread(target=read).start()
    near.abort()
    near.abort()
    assert woken.wait(60)
    with pytest.raises(ConnectionResetError):
        far.recv(10)
    with pytest.raises(OSError, match="closed"):
        near.sendall(b"x")


@pytest.mark.parametrize("packet", [512, 1000, 32 << 10, PACKET])
@pytest.mark.parametrize("size", [1, 500, 1001, 70_000, 300_000])
def test_a_channel_sends_in_place_whatever_its_packets_hold(pair: Pair, packet: int, size: int) -> None:
    near, far = pair.open()
    near._packet_out = packet
    data = os.urandom(size)
    near.sendall_in_place(memoryview(bytearray(ROOM) + data + bytes(ROOM)), ROOM, ROOM + size)
    near.shutdown(socket.SHUT_WR)
    assert b"".join(iter(lambda: far.recv(1 << 17), b"")) == data


def test_what_nobody_reads_yet_outlives_the_buffer_it_was_read_into(pair: Pair) -> None:
    near, far = pair.open()
    data = os.urandom(3 * packets.READ_BUFFER)
    near.sendall(data)
    wait_for(lambda: far.buffered == len(data))
    near.shutdown(socket.SHUT_WR)
    assert b"".join(iter(lambda: far.recv(1 << 17), b"")) == data


@pytest.mark.parametrize("window", [1, 1000, 131_072, 3 * WINDOW])
def test_who_reads_gives_room_again_whatever_the_window(pair: Pair, window: int) -> None:
    pair.door.window = window
    near, far = pair.open()
    data = os.urandom(min(20 * window, 4 * WINDOW))
    threading.Thread(target=lambda: (near.sendall(data), near.shutdown(socket.SHUT_WR)), daemon=True).start()
    assert b"".join(iter(lambda: far.recv(1 << 17), b"")) == data


def test_a_closed_channel_passes_nothing_on(pair: Pair) -> None:
    near, _far = pair.open()
    near.close()
    packet = memoryview(bytearray(64))
    assert not near.pass_on(packet)
    assert packet == bytes(64)


def test_a_closed_channel_keeps_nothing_even_if_the_peer_never_closes_it(pair: Pair) -> None:
    near, far = pair.open()
    near.sendall(bytes(500_000))
    wait_for(lambda: far.buffered == 500_000)
    pair.client._streams.clear()  # from here on this peer says nothing more about it
    far.close()
    assert far.buffered == 0
    assert pair.server._streams


def test_too_much_that_a_peer_does_not_take_ends_the_connection(pair: Pair) -> None:
    near, _far = pair.open()
    pair.server.packets.max_queued = 10_000
    pair.server.queue(b"\x50" + bytes(20_000))
    pair.server.join(60)
    assert not pair.server.is_alive()
    with pytest.raises(ConnectionError):
        near.recv(1)


def test_a_dead_connection_is_an_error_not_an_end(pair: Pair) -> None:
    near, far = pair.open()
    pair.server.close()
    with pytest.raises(ConnectionError):
        near.recv(10)
    with pytest.raises(ConnectionError):
        far.recv(10)


def test_rekeys_under_two_way_load(pair: Pair) -> None:
    """Many key exchanges while channels carry data, open and close: nothing waits for itself."""
    for side in (pair.client, pair.server):
        side.packets.rekey_bytes = 3 << 20
    first = pair.client.packets._key_out
    data = os.urandom(8 << 20)
    digests: list[bytes] = []

    def write(stream: ChannelStream) -> None:
        stream.sendall(data)
        stream.shutdown(socket.SHUT_WR)

    def read(stream: ChannelStream) -> None:
        digest = hashlib.sha256()
        while piece := stream.recv(1 << 17):
            digest.update(piece)
        digests.append(digest.digest())

    threads = []
    for _ in range(2):
        near, far = pair.open()
        for target, stream in ((write, near), (read, far), (write, far), (read, near)):
            threads.append(threading.Thread(target=target, args=(stream,)))
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        a, b = pair.open()  # channels come and go meanwhile
        a.close()
        b.close()
        time.sleep(0.005)
    assert digests == [hashlib.sha256(data).digest()] * 4
    assert pair.client.packets._key_out is not first
    assert pair.client.is_active()


def test_global_requests_are_answered_in_order_and_the_keepalive_does_not_confuse_them(pair: Pair) -> None:
    pair.client.packets.watch(0.0001, 100, pair.client._ask_alive)
    answers: list[object] = []

    def ask() -> None:
        for port in range(1, 17):
            answers.append(pair.client.request_port_forward("dc1", port) == port)
            with pytest.raises(paramiko.SSHException):
                pair.client.request_port_forward("dc2", port)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        pair.client._ask_alive()
    for thread in threads:
        thread.join()
    assert answers == [True] * 48


def test_an_answer_that_never_comes_ends_the_wait(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "REQUEST_TIMEOUT", 0.3)
    pair.server._handler_table[80] = lambda _message: None
    with pytest.raises(UnavailableError, match="no answer"):
        pair.client.global_request("tcpip-forward", ("dc1", 1))
    assert not pair.client.is_active()


def test_a_peer_that_falls_silent_is_given_up(
    sockets: Sockets, serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, _door, server = serve()
    client = dial(near)
    client._handler_table[80] = lambda _message: None  # the peer reads, and says nothing
    server.watch(0.2, 0.5)
    client.watch(0, 0)
    server.join(60)
    assert "no longer answers" in str(server.get_exception())
    client.close()


def test_a_live_peer_is_kept(pair: Pair) -> None:
    asked = [0]
    answer = pair.server._handler_table[80]

    def count(message: paramiko.Message) -> None:
        asked[0] += 1
        answer(message)

    pair.server._handler_table[80] = count
    pair.client.watch(0.2, 60.0)
    wait_for(lambda: asked[0] >= 2)
    assert pair.client.is_active()


def test_channel_numbers_are_not_remembered_one_by_one() -> None:
    seen = transport._Seen()
    for number in range(1000):
        seen[number] = True
    assert 999 in seen
    assert 1000 not in seen
    assert vars(seen) == {"_next": 1000}


# -- the contract with paramiko --------------------------------------------------------------------------


def plain_key() -> paramiko.Ed25519Key:
    from io import StringIO

    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    text = HOST.private_key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()).decode()
    return paramiko.Ed25519Key.from_private_key(StringIO(text))


#: Everything private that fast_ssh and ssh_packets build on.
TRANSPORT_NAMES = [
    "_CLIENT_ID",
    "_preferred_kex",
    "_preferred_ciphers",
    "_preferred_macs",
    "_preferred_pubkeys",
    "_preferred_compression",
    "_parse_kex_init",
    "_parse_channel_open",
    "_auth_trigger",
    "request_port_forward",
    "_next_channel",
    "_send_user_message",
    "_send_message",
    "preferred_keys",
]
INSTANCE_NAMES = [
    "_handler_table",
    "_channels",
    "channels_seen",
    "channel_events",
    "saved_exception",
    "packetizer",
    "agreed_on_strict_kex",
    "active",
    "lock",
    "server_object",
    "_tcp_handler",
    "_expected_packet",
    "remote_version",
    "local_cipher",
]


def test_the_pinned_paramiko_is_the_one_that_was_read() -> None:
    assert not paramiko_contract.differences()
    project = (Path(fast_ssh.__file__).parents[3] / "pyproject.toml").read_text()
    assert f'"paramiko=={paramiko.__version__}"' in project


def test_another_paramiko_is_told_by_what_it_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paramiko, "__version__", "5.1.1")
    assert "nothing of what it uses has moved" in paramiko_contract.differences()

    def _parse_newkeys(self: object, m: object) -> None:
        """Not what it was."""

    monkeypatch.setattr(paramiko.Transport, "_parse_newkeys", _parse_newkeys)
    monkeypatch.setattr(paramiko.Transport, "_preferred_kex", ("other",))
    monkeypatch.setattr(paramiko.Transport, "_added", "5.1.1", raising=False)
    monkeypatch.delattr(paramiko.packet.Packetizer, "read_message")
    told = paramiko_contract.differences()
    assert "paramiko 5.1.1 is not the 5.1.0" in told
    assert "gone: Packetizer.read_message;" in told
    assert "changed: Transport._parse_newkeys, Transport._preferred_kex;" in told
    assert "new: Transport._added." in told


def test_paramikos_private_names_are_where_we_use_them(sockets: Sockets) -> None:
    missing = [f"Transport.{name}" for name in TRANSPORT_NAMES if not hasattr(paramiko.Transport, name)]
    stock = paramiko.Transport(sockets()[0])
    missing += [f"Transport().{name}" for name in INSTANCE_NAMES if not hasattr(stock, name)]
    assert not missing, f"paramiko moved {', '.join(missing)}"


def test_packets_has_all_that_the_transport_calls() -> None:
    """Every ``self.packetizer.<name>`` in paramiko's transport exists in Packets, and takes what it gets."""
    import re

    source = inspect.getsource(paramiko.transport)
    called = set(re.findall(r"self\.packetizer\.(\w+)", source))
    missing = sorted(name for name in called if not hasattr(packets.Packets(socket.socket()), name))
    assert not missing, f"paramiko's Transport now calls {', '.join(missing)} on its packetizer"
    for name in ("set_inbound_cipher", "set_outbound_cipher"):
        ours = inspect.signature(getattr(packets.Packets, name)).parameters
        theirs = inspect.signature(getattr(paramiko.packet.Packetizer, name)).parameters
        assert {"block_engine", "aead"} <= set(theirs) & set(ours)


def test_only_these_modules_use_paramikos_private_names() -> None:
    root = Path(fast_ssh.__file__).parents[3]
    private = [f".{name}" for name in TRANSPORT_NAMES if name.startswith("_")]
    offenders = [
        f"{path}: {name}"
        for part in ("common", "agent", "relay", "client")
        for path in (root / part).rglob("*.py")
        if path.parent.name != "fast_ssh"
        for name in private
        if name + "(" in path.read_text() and "paramiko" in path.read_text()
    ]
    assert not offenders
