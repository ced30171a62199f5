"""The Transport and its channels as streams, built on paramiko's private names (see the package)."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import paramiko
from paramiko.common import (
    MSG_CHANNEL_FAILURE,
    MSG_CHANNEL_OPEN,
    MSG_CHANNEL_OPEN_FAILURE,
    MSG_CHANNEL_OPEN_SUCCESS,
    MSG_CHANNEL_WINDOW_ADJUST,
    MSG_REQUEST_FAILURE,
    MSG_REQUEST_SUCCESS,
    OPEN_FAILED_RESOURCE_SHORTAGE,
    cMSG_CHANNEL_OPEN,
    cMSG_CHANNEL_OPEN_FAILURE,
    cMSG_GLOBAL_REQUEST,
)

from pam_common.errors import UnavailableError
from pam_common.fast_ssh.channel import MAX_REASON, MIN_PACKET, PACKET, WINDOW, ChannelStream
from pam_common.fast_ssh.packets import STALL, TICK, Packets, set_tick
from pam_common.ssh_certs import CERT_TYPE, PLAIN_TYPE
from pam_common.stream import Data

#: Identification, key exchange, login and each answer to a request: seconds, far above a slow link's.
HANDSHAKE_TIMEOUT = 20.0
REQUEST_TIMEOUT = 20.0
CHANNEL_TIMEOUT = 20.0
#: A silent peer is asked after the first and given up after both: below the usual 60 s of NAT tables.
KEEPALIVE_INTERVAL = 15.0
KEEPALIVE_DEADLINE = 30.0
#: Requests without an answer yet: a keepalive and a forward or two.
MAX_REQUESTS = 32
#: Channels of one connection, those included that only the peer has not closed yet. Far above what relay and
#: agent admit; a peer that never closes anything gets no more.
MAX_CHANNELS = 8192

_INT = struct.Struct(">I")
_CONFIRMATION = struct.Struct(">BIIII")

#: The type stubs describe public names only; the private ones are held by the contract test instead.
_Stock: Any = paramiko.Transport


#: paramiko tells it when a key exchange begins and ends; Packets knows, and holds back what must wait.
_NOBODY_WAITS = threading.Event()
#: Ends that are nobody's fault, and a refused channel, which ends nothing.
_NO_FAULT = (EOFError, OSError, paramiko.ChannelException)


class _Seen:
    """Which channel numbers were ever used: all below the highest. paramiko's dict of them grows forever."""

    def __init__(self) -> None:
        self._next = 0

    def __setitem__(self, number: int, _value: bool) -> None:
        self._next = max(self._next, number + 1)

    def __contains__(self, number: int) -> bool:
        return number < self._next


class _Request:
    """A global request that waits for its answer: a Message, or None when refused."""

    def __init__(self) -> None:
        self.answered = threading.Event()
        self.answer: paramiko.Message | None = None


@dataclass(frozen=True)
class IncomingChannel:
    """A peer's wish for a ``direct-tcpip`` channel, to be accepted or refused by any thread, once."""

    transport: Transport
    destination: tuple[str, int]
    origin: tuple[str, int]
    number: int
    window: int  #: what the peer takes at first
    packet: int

    def accept(self, *, window: int = WINDOW, packet: int = PACKET) -> ChannelStream:
        """Open the channel; the peer may send ``window`` bytes at first, ``packet`` in each packet."""
        stream = self.transport.new_stream(window, packet)
        stream.opened_by(self.number, self.window, self.packet)
        self.transport.confirm(stream, window, packet)
        return stream

    def refuse(self, reason: int, text: str) -> None:
        """Tell the peer why not: ``reason`` is one of RFC 4254, 5.1, ``text`` is for people."""
        message = paramiko.Message()
        message.add_byte(cMSG_CHANNEL_OPEN_FAILURE)
        message.add_int(self.number)
        message.add_int(reason)
        message.add_string(text)
        message.add_string("en")
        self.transport.send_soon(message.asbytes())


class Transport(paramiko.Transport):
    """One SSH connection.

    A server's ``on_direct_tcpip`` gets the peer's channel wishes, ``on_authenticated`` is told when a login's
    signature was verified, ``on_end`` when the connection is over: all in the reader thread, none may block.
    """

    _CLIENT_ID = "pam"
    _preferred_kex = ("mlkem768x25519-sha256", "curve25519-sha256@libssh.org")
    _preferred_ciphers = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com")
    # Negotiated by the protocol and not used: AES-GCM authenticates by itself.
    _preferred_macs = ("hmac-sha2-256-etm@openssh.com",)
    _preferred_pubkeys = (PLAIN_TYPE,)
    _preferred_compression = ("none",)
    _packets_class: type[Packets] = Packets
    _handler_table: dict[int, Callable[[paramiko.Message], None]]
    _channels: Any
    _expected_packet: Any
    _tcp_handler: Any
    agreed_on_strict_kex: bool

    def __init__(self, sock: socket.socket, *, name: str) -> None:
        super().__init__(
            sock,
            default_window_size=WINDOW,
            default_max_packet_size=PACKET,
            packetizer_class=cast("Any", self._packets_class),
        )
        self.name = name
        self.packets = cast("Packets", self.packetizer)
        _set_blocking(sock)
        self.channels_seen = cast("Any", _Seen())
        self.clear_to_send = _NOBODY_WAITS
        self.channel_timeout = CHANNEL_TIMEOUT
        self.auth_timeout = self.banner_timeout = self.handshake_timeout = HANDSHAKE_TIMEOUT
        self.on_direct_tcpip: Callable[[IncomingChannel], None] | None = None
        self.on_authenticated: Callable[[], None] | None = None
        self.on_end: Callable[[], None] | None = None
        self._streams: dict[int, ChannelStream] = {}
        self._ended = False
        self.packets.divert = self._divert
        self._requests: list[_Request] = []  # MAX_REQUESTS at most
        self._request_lock = threading.Lock()
        self._handler_table[MSG_REQUEST_SUCCESS] = self._request_answered
        self._handler_table[MSG_REQUEST_FAILURE] = self._request_refused
        self._handler_table[MSG_CHANNEL_OPEN] = self._channel_wanted
        self._handler_table[MSG_CHANNEL_OPEN_FAILURE] = self._channel_refused

    # -- negotiation -----------------------------------------------------------------------------------

    @property
    def preferred_keys(self) -> tuple[str, ...]:
        """Host keys come with a certificate, or not at all."""
        return (CERT_TYPE,)

    def _parse_kex_init(self, m: paramiko.Message) -> None:
        _Stock._parse_kex_init(self, m)
        if not self.agreed_on_strict_kex:
            raise paramiko.SSHException("the peer does not speak strict key exchange")

    def host_certificate(self) -> bytes:
        """The certificate the server proved to hold the key of, as a blob, or ``b""``."""
        blob = getattr(self.get_remote_server_key(), "public_blob", None)
        return blob.key_blob if blob is not None else b""

    def _auth_trigger(self) -> None:
        _Stock._auth_trigger(self)
        if self.server_mode and self.on_authenticated is not None:
            self.on_authenticated()

    # -- life ------------------------------------------------------------------------------------------

    def run(self) -> None:
        try:
            super().run()
        finally:
            with self.lock:
                self._ended = True
                streams = list(self._streams.values())
                self._streams.clear()
            try:
                for stream in streams:
                    stream.lost()
            finally:
                self.packets.end_lending()
            if self.on_end is not None:
                self.on_end()

    @property
    def heard(self) -> float:
        """When the peer's last bytes came, by the monotonic clock."""
        return self.packets.heard

    @property
    def fault(self) -> str:
        """Why this side ended the connection, in words for a log; empty if it was no fault of the peer's."""
        error = self.saved_exception
        if self.packets.fault or error is None or isinstance(error, _NO_FAULT):
            return self.packets.fault
        return str(error) or type(error).__name__

    def close(self) -> None:
        """End the connection from any thread, without waiting: its own thread closes the socket."""
        self.active = False
        self.packets.close()
        if not self.is_alive():
            self.sock.close()

    def watch(self, interval: float = KEEPALIVE_INTERVAL, deadline: float = KEEPALIVE_DEADLINE) -> None:
        """Ask a silent peer for a sign of life every ``interval`` s; give up ``deadline`` s later."""
        self.packets.watch(interval, deadline, self._ask_alive)
        self.completion_event = None  # the first key exchange is over

    def _ask_alive(self) -> None:
        # In the reader thread, which must not wait: when a request is just being sent, that one will do.
        if self._request_lock.acquire(blocking=False):
            try:
                self._requests.append(_Request())
                self.send_soon(_global_request("keepalive@openssh.com", None))
            finally:
                self._request_lock.release()

    # -- sending ---------------------------------------------------------------------------------------

    def send_soon(self, payload: bytes) -> None:
        """Send one packet from any thread without blocking; ends the connection if it cannot be queued."""
        try:
            self.packets.send_soon(payload)
        except (EOFError, paramiko.SSHException) as error:
            self._give_up(error)

    def _give_up(self, error: EOFError | paramiko.SSHException) -> None:
        if self.active:
            self.packets.fault = self.packets.fault or str(error)
        self.close()

    def _send_user_message(self, data: paramiko.Message) -> None:
        # Packets holds back what a key exchange forbids; paramiko's own way to do that locks up.
        if self.active:
            self.packets.send_message(data)

    # -- global requests -------------------------------------------------------------------------------

    def global_request(self, kind: str, data: Any = None, wait: bool = True) -> paramiko.Message | None:
        """Send a global request and return the answer, None when refused or not wanted.

        Raises UnavailableError when no answer comes in REQUEST_TIMEOUT seconds; the connection is closed
        then, as the answers to come could not be told apart.
        """
        if not wait:
            message = _global_request(kind, data, reply=False)
            self.packets.send_payload(message)
            return None
        request = _Request()
        with self._request_lock:
            if len(self._requests) >= MAX_REQUESTS:
                raise UnavailableError("the peer leaves too many requests without answer")
            self._requests.append(request)
            self.packets.send_payload(_global_request(kind, data))
        deadline = time.monotonic() + REQUEST_TIMEOUT
        while not request.answered.wait(0.1):
            if not self.active or time.monotonic() > deadline:
                self.close()
                raise UnavailableError(f"no answer to the request {kind}")
        return request.answer

    def request_port_forward(
        self,
        address: str,
        port: int,
        handler: Any = None,
    ) -> int:
        """Ask for ``address:port``; ``handler(stream, origin, destination)`` gets its channels, in the
        reader thread.

        It is in place before the request goes out: the first channel may follow the answer at once.
        """
        self._tcp_handler = handler
        return int(super().request_port_forward(address, port, handler))

    def cancel_port_forward(self, address: str, port: int) -> None:
        """Have no more channels sent; those that were on their way are let in, so the handler stays."""
        if self.active:
            self.global_request("cancel-tcpip-forward", (address, port))

    def _request_answered(self, m: paramiko.Message) -> None:
        self._finish_request(m)

    def _request_refused(self, _m: paramiko.Message) -> None:
        self._finish_request(None)

    def _finish_request(self, answer: paramiko.Message | None) -> None:
        if not self._requests:
            raise paramiko.SSHException("an answer came that nobody asked for")
        request = self._requests.pop(0)
        request.answer = answer
        request.answered.set()

    # -- channels --------------------------------------------------------------------------------------

    def _channel_wanted(self, m: paramiko.Message) -> None:
        """Hand a ``direct-tcpip`` wish to ``on_direct_tcpip``, a ``forwarded-tcpip`` channel to who asked for
        the forward; paramiko refuses all other kinds."""
        kind = m.get_text()
        number, window, packet = m.get_int(), m.get_int(), m.get_int()
        direct = self.server_mode and kind == "direct-tcpip" and self.on_direct_tcpip is not None
        if not direct and (self.server_mode or kind != "forwarded-tcpip" or self._tcp_handler is None):
            m.rewind()
            _Stock._parse_channel_open(self, m)
            return
        destination = (m.get_text(), m.get_int())
        origin = (m.get_text(), m.get_int())
        if packet < MIN_PACKET:  # here, as a relay tells its agent of it
            raise paramiko.SSHException("the peer takes packets of next to no size")
        wish = IncomingChannel(self, destination, origin, number, window, packet)
        if direct:
            assert self.on_direct_tcpip is not None
            self.on_direct_tcpip(wish)
            return
        try:
            stream = wish.accept()
        except UnavailableError as error:
            wish.refuse(OPEN_FAILED_RESOURCE_SHORTAGE, str(error))
        else:
            self._tcp_handler(stream, origin, destination)

    def _channel_refused(self, m: paramiko.Message) -> None:
        """Wake who opens the channel, with the peer's own words (paramiko would drop them)."""
        number, reason, text = m.get_int(), m.get_int(), m.get_text()[:MAX_REASON]
        words = "".join(char if char.isprintable() else "?" for char in text)
        with self.lock:
            event = self.channel_events.pop(number, None)
            if event is not None:
                self.saved_exception = paramiko.ChannelException(reason, words or "no reason given")
                self._channels.delete(number)
                event.set()

    def open_stream(
        self,
        kind: str,
        destination: tuple[str, int],
        origin: tuple[str, int],
        timeout: float,
        *,
        window: int = WINDOW,
        packet: int = PACKET,
    ) -> ChannelStream:
        """Open a channel and wait for the answer. Raises RefusedError or UnavailableError."""
        stream = self.new_stream(window, packet)
        message = paramiko.Message()
        message.add_byte(cMSG_CHANNEL_OPEN)
        message.add_string(kind)
        message.add_int(stream.number)
        message.add_int(window)
        message.add_int(packet)
        for host, port in (destination, origin):
            message.add_string(host)
            message.add_int(port)
        self.send_soon(message.asbytes())
        stream.wait_open(timeout)
        return stream

    def new_stream(self, window: int, packet: int) -> ChannelStream:
        """A channel with a number of its own, not open yet. Raises UnavailableError."""
        with self.lock:
            if not self.active or self._ended:
                raise UnavailableError("no channel could be opened: the ssh connection is gone")
            if len(self._streams) >= MAX_CHANNELS:
                raise UnavailableError("no channel could be opened: the connection has too many")
            number = _Stock._next_channel(self)
            while number in self._streams:
                number = _Stock._next_channel(self)
            stream = self._streams[number] = ChannelStream(self, number, window=window, packet=packet)
            self.channels_seen[number] = True
        return stream

    def confirm(self, stream: ChannelStream, window: int, packet: int) -> None:
        """Tell the peer that the channel it wanted is open."""
        numbers = (stream.remote, stream.number, window, packet)
        self.send_soon(_CONFIRMATION.pack(MSG_CHANNEL_OPEN_SUCCESS, *numbers))

    def forget(self, number: int) -> None:
        """Both sides have closed it."""
        self._streams.pop(number, None)

    def queue(self, head: bytes, body: Data = b"") -> None:
        """Queue a packet, to be flushed by ``packets``; ends the connection if there is no room."""
        try:
            self.packets.queue(head, body)
        except paramiko.SSHException as error:
            self._give_up(error)

    def _divert(self, kind: int, payload: memoryview) -> bool:
        """Give a channel its packet. What is left to paramiko is all that concerns no channel of ours."""
        if not MSG_CHANNEL_OPEN_SUCCESS <= kind <= MSG_CHANNEL_FAILURE or self._expected_packet:
            return False
        if len(payload) < 5:
            raise paramiko.SSHException("malformed channel message")
        number = _INT.unpack_from(payload, 1)[0]
        stream = self._streams.get(number)
        if stream is None:
            if kind < MSG_CHANNEL_WINDOW_ADJUST:
                return False
            if number not in self.channels_seen:
                raise paramiko.SSHException("a message for a channel that never was")
            return True  # one that is over: the peer did not know yet
        try:
            stream.take(kind, payload)
        except (struct.error, UnicodeDecodeError):
            raise paramiko.SSHException("malformed channel message") from None
        return True


def _global_request(kind: str, data: Any, *, reply: bool = True) -> bytes:
    message = paramiko.Message()
    message.add_byte(cMSG_GLOBAL_REQUEST)
    message.add_string(kind)
    message.add_boolean(reply)
    if data is not None:
        message.add(*data)
    return message.asbytes()


def _set_blocking(sock: socket.socket) -> None:
    """Have the kernel wake who waits, at the pace of Packets, not of paramiko's ``settimeout``."""
    sock.settimeout(None)
    set_tick(sock, TICK)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", int(STALL), 0))
    with contextlib.suppress(OSError):  # UNIX sockets have none
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
