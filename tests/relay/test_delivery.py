"""A SecureChannel through a relay whose data is delivered by the thread that reads the connection."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import struct
import threading
import time

import pytest

from pam_common.errors import PamError, ProtocolError, RefusedError, TruncatedError
from pam_common.fast_ssh import PACKET
from pam_common.frames import FrameType
from pam_common.secure_channel import SecureChannel

MIB = 1 << 20


class Program:
    """Takes what is delivered, at most ``size`` bytes at a time, and the rest from ``recv``."""

    def __init__(self, channel: SecureChannel, size: int = 1 << 30) -> None:
        self.got = bytearray()
        self.delivered = self.received = 0
        self.size = size
        self.end: BaseException | None = None
        self._channel = channel
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        self._channel.deliver_to(self._take)
        try:
            while data := self._channel.recv(1 << 17):
                self.got += data
                self.received += len(data)
        except (OSError, PamError) as error:
            self.end = error

    def _take(self, data: bytes) -> int:
        taken = data[: self.size]
        self.got += taken
        self.delivered += len(taken)
        return len(taken)

    def join(self) -> None:
        self.thread.join(180)
        assert not self.thread.is_alive(), "it hangs"


def test_frames_are_sent_where_they_were_sealed(secure, monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = secure()
    packets, sent = far._stream.packets, []
    send = packets.send_in_place
    monkeypatch.setattr(packets, "send_in_place", lambda *at: (sent.append(at), send(*at)))
    for size in (1, 1000, MIB):
        far.sendall(bytes(size))
    far.shutdown(socket.SHUT_WR)
    assert len(b"".join(iter(lambda: near.recv(1 << 17), b""))) == MIB + 1001
    assert len(sent) >= 2 + MIB // PACKET


def test_messages_are_delivered_without_waking_recv(secure, wait_for) -> None:
    near, far = secure()
    program = Program(near)
    wait_for(lambda: near._stream._waiting)
    for number in range(200):
        far.sendall(b"%4d" % number)
        wait_for(lambda number=number: len(program.got) == 4 * (number + 1))
    assert program.received == 0
    far.shutdown(socket.SHUT_WR)
    program.join()
    assert program.end is None
    assert bytes(program.got) == b"".join(b"%4d" % number for number in range(200))


@pytest.mark.parametrize("size", [0, 1, 5000, 1 << 30])
def test_what_is_not_taken_comes_by_recv_in_order(secure, wait_for, size: int) -> None:
    near, far = secure()
    program = Program(near, size)
    wait_for(lambda: near._stream._waiting)  # else a program that is always behind gets nothing delivered
    data = os.urandom(6 * MIB)
    view = memoryview(data)
    for start in range(0, len(data), 70_001):
        far.sendall(view[start : start + 70_001])
        if start % 3 == 0:
            far.ping()
    far.shutdown(socket.SHUT_WR)
    program.join()
    assert program.end is None
    assert hashlib.sha256(program.got).digest() == hashlib.sha256(data).digest()
    assert program.delivered or not size


def test_both_directions_at_once_with_rekeys(secure, join) -> None:
    for transport in (join.client, join.agent.transport):
        transport.packets.rekey_bytes = 5 * MIB
    near, far = secure()
    programs = [Program(near, 1 << 16), Program(far)]
    data = os.urandom(12 * MIB)

    def send(channel: SecureChannel) -> None:
        channel.sendall(data)
        channel.shutdown(socket.SHUT_WR)

    senders = [threading.Thread(target=send, args=(channel,)) for channel in (near, far)]
    for sender in senders:
        sender.start()
    for thread in (*senders, *(program.thread for program in programs)):
        thread.join(180)
        assert not thread.is_alive()
    assert all(bytes(program.got) == data for program in programs)


def test_an_error_is_told_in_its_words_after_the_data_before_it(secure, wait_for) -> None:
    near, far = secure()
    program = Program(near)
    wait_for(lambda: near._stream._waiting)
    far.sendall(b"last words")
    far.send_error("the session was ended")
    program.join()
    assert program.got == b"last words"
    assert isinstance(program.end, RefusedError)
    assert str(program.end) == "the session was ended"


def test_an_end_in_the_packet_of_the_data_is_seen_by_who_is_interrupted(secure, wait_for) -> None:
    """A relay may put together what was sent one by one."""
    near, far = secure()
    interrupted, ends = [], []

    def take(data: memoryview) -> int:
        interrupted.append(bytes(data))
        raise InterruptedError

    def read() -> None:
        near.deliver_to(take)
        while True:
            try:
                ends.append(near.recv(100))
                return
            except InterruptedError:
                continue

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    wait_for(lambda: near._stream._waiting)
    writer = far._writer
    both = bytes(writer.data(memoryview(b"query"))) + bytes(
        writer.control(FrameType.EOF, struct.pack(">Q", 5))
    )
    far._stream.sendall(both)
    thread.join(60)
    assert (interrupted, ends) == ([b"query"], [b""])


@pytest.mark.parametrize("cut", ["abort", "close", "own"])
def test_a_cut_wakes_recv(secure, wait_for, cut: str) -> None:
    near, far = secure()
    program = Program(near)
    wait_for(lambda: near._stream._waiting)
    far.sendall(b"x")
    wait_for(lambda: program.got)
    {"abort": far.abort, "close": far.close, "own": near.abort}[cut]()
    program.join()
    assert isinstance(program.end, TruncatedError)


def test_altered_bytes_are_not_delivered(secure, wait_for) -> None:
    near, far = secure()
    program = Program(near)
    wait_for(lambda: near._stream._waiting)
    far.sendall(b"good")
    wait_for(lambda: program.got)
    far._stream.sendall(b"\0\x20" + bytes(32))
    program.join()
    assert program.got == b"good"
    assert isinstance(program.end, ProtocolError)


def test_cuts_at_any_moment_under_load_leave_no_thread(secure) -> None:
    for number in range(20):
        near, far = secure()
        program = Program(near, 1 << (number % 18))

        def pour(far: SecureChannel = far) -> None:
            with contextlib.suppress(OSError):
                while True:
                    far.sendall(bytes(50_000))

        writer = threading.Thread(target=pour, daemon=True)
        writer.start()
        while len(program.got) < number * 100_000:
            time.sleep(0.001)
        (near.abort if number % 2 else far.abort)()
        program.join()
        writer.join(60)
        assert not writer.is_alive()
        assert isinstance(program.end, TruncatedError)
        near.close()
        far.close()
