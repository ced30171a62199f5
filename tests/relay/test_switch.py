"""Channels joined in the relay's reader threads: under load, with peers that stall, cut, or cheat."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable

import paramiko
import pytest
from paramiko.common import MSG_CHANNEL_CLOSE, MSG_CHANNEL_DATA, MSG_CHANNEL_WINDOW_ADJUST

from pam_common import fast_ssh
from pam_common.fast_ssh import ChannelStream, Transport, channel, switch
from pam_common.fast_ssh.channel import PACKET, WINDOW

MIB = 1 << 20


def links(relay) -> list[Transport]:
    # Copied first: links come and go meanwhile.
    return [link.transport for link in list(relay.relay._links.values())]


def run_all(*work: Callable[[], object], seconds: float = 180) -> None:
    threads = [threading.Thread(target=one, daemon=True) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
        assert not thread.is_alive(), "it hangs"


def pour(stream: ChannelStream, data: bytes) -> None:
    rng, view = random.Random(len(data)), memoryview(data)
    while view:
        size = rng.choice((1, 100, 5000, 70_000, 300_000))
        stream.sendall(view[:size])
        view = view[size:]
    stream.shutdown(socket.SHUT_WR)


def push(stream: ChannelStream, size: int) -> None:
    """Send zeros until they are out or the channel is cut."""
    with contextlib.suppress(OSError):
        stream.sendall(bytes(size))


def drain(stream: ChannelStream, into: list[bytes]) -> None:
    digest = hashlib.sha256()
    while piece := stream.recv(1 << 17):
        digest.update(piece)
    into.append(digest.digest())


@pytest.mark.parametrize("packet", [1000, 32 << 10])
def test_a_peer_that_takes_small_packets_gets_no_others(relay, join, wait_for, packet: int) -> None:
    """As the stock OpenSSH client, with its 32 KiB; each end's channel checks what comes."""
    near = join.client.open_stream("direct-tcpip", ("dc1", 1), ("127.0.0.1", 0), 60, packet=packet)
    wait_for(lambda: join.agent.streams)
    far = join.agent.streams[-1]
    assert (near._packet_in, far.packet) == (packet, packet)
    data, got = os.urandom(MIB), []
    run_all(lambda: pour(far, data), lambda: drain(near, got))
    assert got == [hashlib.sha256(data).digest()]


def test_rekeys_of_all_four_sides_under_two_way_load(relay, join) -> None:
    """The bytes are right and nothing waits for itself, however often keys are exchanged."""
    pairs = [join() for _ in range(3)]
    ends = [join.client, join.agent.transport, *links(relay)]
    assert len(ends) == 4
    first = [end.packets._key_out for end in ends]
    for number, end in enumerate(ends):
        end.packets.rekey_bytes = (6 + number % 3) * MIB
    data = os.urandom(24 * MIB)
    got: list[bytes] = []
    work: list[Callable[[], object]] = []
    for near, far in pairs:
        for one, other in ((near, far), (far, near)):
            work.append(lambda one=one: pour(one, data))
            work.append(lambda other=other: drain(other, got))

    def come_and_go() -> None:
        for _ in range(30):
            near, far = join()
            near.sendall(b"x")
            assert far.recv(1) == b"x"
            random.choice((near.close, near.abort, far.close, far.abort))()

    run_all(*work, come_and_go)
    assert got == [hashlib.sha256(data).digest()] * 6
    assert all(end.packets._key_out is not key for end, key in zip(ends, first, strict=True))
    assert all(end.is_active() for end in ends)


def test_what_comes_alone_or_is_large_is_passed_on_at_once(
    relay, join, wait_for, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, far = join()
    # What comes before the relay has joined the two channels is kept, and queued then.
    ends = [relay_side(relay, peer) for peer in (join.client, join.agent.transport)]
    wait_for(lambda: all(stream._sink for end in ends for stream in end._streams.values()))
    packets, passed = ends[1].packets, []
    pass_on = packets.pass_on
    monkeypatch.setattr(packets, "pass_on", lambda packet: passed.append(pass_on(packet)) or passed[-1])
    near.sendall(b"alone")
    assert far.recv(100) == b"alone"
    near.sendall(bytes(PACKET))
    wait_for(lambda: far.buffered == PACKET)
    wait_for(lambda: len(passed) == 2)  # what was sent may arrive before the relay's call has returned
    assert passed == [True, True]


def test_what_came_together_goes_on_together(relay, join, wait_for, monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = join()
    packets, sent = relay_side(relay, join.agent.transport).packets, []
    write = packets._write
    monkeypatch.setattr(
        packets, "_write", lambda data, **how: (sent.append(len(data)), write(data, **how))[1]
    )
    for number in range(10):
        near.transport.queue(data(near.remote, 10 + number))
    near.flush()
    wait_for(lambda: far.buffered == 145)
    assert len(sent) == 1


def test_a_half_close_leaves_the_other_direction(relay, join, wait_for) -> None:
    near, far = join()
    near.sendall(b"question")
    near.shutdown(socket.SHUT_WR)
    assert far.recv(100) == b"question"
    assert far.recv(100) == b""
    far.sendall(b"answer")
    far.shutdown(socket.SHUT_WR)
    assert near.recv(100) == b"answer"
    assert near.recv(100) == b""
    near.close()
    far.close()
    wait_for(lambda: relay.relay.channels == 0)
    wait_for(lambda: not any(end._streams for end in (*links(relay), join.client, join.agent.transport)))


def test_what_was_sent_before_a_close_arrives(relay, join) -> None:
    near, far = join()
    data = os.urandom(700_000)
    far.sendall(data)
    far.close()
    assert b"".join(iter(lambda: near.recv(1 << 17), b"")) == data


def test_bytes_that_come_before_the_channels_are_joined_are_kept(relay, join) -> None:
    """An agent may speak first: what it says while the client's side is still being opened."""
    said = os.urandom(300_000)

    def at_once(stream: ChannelStream, _origin: object, _to: object) -> None:
        threading.Thread(target=lambda: (stream.sendall(said), stream.close()), daemon=True).start()

    join.agent.transport._tcp_handler = at_once
    for _ in range(20):
        near = fast_ssh.open_direct(join.client, "dc1")
        assert b"".join(iter(lambda near=near: near.recv(1 << 17), b"")) == said
        near.close()


def test_a_reader_that_stalls_slows_its_own_writer_only(relay, join) -> None:
    stalled_near, stalled_far = join()
    near, far = join()
    stuck = threading.Thread(target=lambda: stalled_far.sendall(bytes(8 * MIB)), daemon=True)
    stuck.start()
    data, got = os.urandom(16 * MIB), []
    run_all(lambda: pour(far, data), lambda: drain(near, got))
    assert got == [hashlib.sha256(data).digest()]
    assert stuck.is_alive()
    assert stalled_near.buffered <= WINDOW
    read = 0
    while read < 8 * MIB:
        read += len(stalled_near.recv(1 << 18))
    stuck.join(60)
    assert not stuck.is_alive()


def test_a_client_that_stops_reading_its_socket_holds_nobody_else_up(relay, join, wait_for) -> None:
    """Its reader thread sleeps in a handler: the relay keeps what its windows allow, and no more."""
    slow = relay.client()
    wake = threading.Event()
    pairs = [join(slow) for _ in range(4)]
    slow._handler_table[80] = lambda _message: wake.wait(600)
    relay_side = next(link for link in links(relay) if link.sock.getpeername() == slow.sock.getsockname())
    relay_side.send_soon(struct.pack(">BI", 80, 4) + b"stop" + b"\0")
    writers = [threading.Thread(target=push, args=(far, 6 * MIB), daemon=True) for _, far in pairs]
    for writer in writers:
        writer.start()
    near, far = join()
    data, got = os.urandom(8 * MIB), []
    run_all(lambda: pour(far, data), lambda: drain(near, got))
    assert got == [hashlib.sha256(data).digest()]
    assert relay_side.packets.queued <= 5 * MIB
    assert all(writer.is_alive() for writer in writers)
    wake.set()
    run_all(
        *(lambda near=near: [near.recv(MIB) for _ in iter(lambda: near.buffered, 0)] for near, _ in pairs)
    )
    for near, far in pairs:
        near.abort()
        far.abort()
    wait_for(lambda: relay.relay.channels == 1)


def test_room_is_held_back_while_a_connection_is_behind(
    relay, join, wait_for, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a low mark every adjust is held back at times, and all data arrives all the same."""
    monkeypatch.setattr(switch, "BEHIND", 1000)
    near, far = join()
    data, got = os.urandom(20 * MIB), []
    run_all(
        lambda: pour(far, data), lambda: drain(near, got), lambda: pour(near, data), lambda: drain(far, got)
    )
    assert got == [hashlib.sha256(data).digest()] * 2


def relay_side(relay, peer: Transport) -> Transport:
    return next(link for link in links(relay) if link.sock.getpeername() == peer.sock.getsockname())


def asleep(relay, peer: Transport) -> threading.Event:
    """Has the thread that reads ``peer``'s connection wait until the event is set."""
    wake, sleeping = threading.Event(), threading.Event()

    def sleep(_message: object) -> None:
        sleeping.set()
        wake.wait(600)

    peer._handler_table[80] = sleep
    relay_side(relay, peer).send_soon(struct.pack(">BI", 80, 4) + b"stop" + b"\0")
    assert sleeping.wait(60)
    return wake


def test_who_waits_for_room_is_not_passed_by_others(
    relay, join, wait_for, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a link that is busy all the time every channel moves."""
    monkeypatch.setattr(switch, "BEHIND", MIB)
    pairs = [join() for _ in range(12)]
    packets = join.agent.transport.packets
    receive = packets._receive

    def slowly() -> bool:
        time.sleep(0.02)  # 256 KiB at most each time
        return receive()

    packets._receive = slowly
    got = [0] * len(pairs)
    over = threading.Event()

    def write(near: ChannelStream) -> None:
        with contextlib.suppress(OSError):
            while not over.is_set():
                near.sendall(bytes(PACKET))

    def read(number: int, far: ChannelStream) -> None:
        with contextlib.suppress(OSError):
            while data := far.recv(PACKET):
                got[number] += len(data)

    for number, (near, far) in enumerate(pairs):
        threading.Thread(target=write, args=(near,), daemon=True).start()
        threading.Thread(target=read, args=(number, far), daemon=True).start()
    for _ in range(3):  # all of what is under way and more has gone by, each time
        before = list(got)
        wait_for(lambda before=before: sum(got) - sum(before) > 30 * MIB)
        assert min(now - then for now, then in zip(got, before, strict=True)) > 0, got
    over.set()
    for near, _ in pairs:
        near.abort()


def test_who_fills_a_link_that_does_not_move_is_cut_and_nobody_else(
    relay, join, wait_for, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many windows used at once: each is its sender's right, all are more than is kept."""
    monkeypatch.setattr(switch, "BEHIND", 1 << 30)  # all of them are given room while there is any
    relay_side(relay, join.agent.transport).packets.max_queued = 6 * MIB
    other = relay.client()
    quiet, quiet_far = join(other)
    pairs = [join() for _ in range(24)]
    wake = asleep(relay, join.agent.transport)
    for near, _ in pairs:
        threading.Thread(target=push, args=(near, 2 * MIB), daemon=True).start()
    wait_for(lambda: any(near._close_received for near, _ in pairs))
    quiet.sendall(b"still there")
    wake.set()
    assert quiet_far.recv(100) == b"still there"
    assert join.agent.transport.is_active()
    for near, far in pairs:
        near.abort()
        far.abort()


def test_a_pool_within_its_limit_is_not_cut_when_its_client_stalls(relay, join, wait_for) -> None:
    """An eighth of all there may be: 25 of 200 channels of a session, and of what may wait for its link."""
    pairs = [join() for _ in range(25)]
    link = relay_side(relay, join.client).packets
    link.max_queued //= 8
    wake = asleep(relay, join.client)
    for _, far in pairs:
        threading.Thread(target=push, args=(far, 3 * MIB), daemon=True).start()
    wait_for(lambda: all(far.window == 0 for _, far in pairs))
    assert not any(far._close_received for _, far in pairs)
    wake.set()
    for near, far in pairs:
        near.abort()
        far.abort()


def test_who_left_nothing_in_the_queue_is_not_cut_for_others(relay, join, wait_for) -> None:
    near, far = join()
    link = relay_side(relay, join.agent.transport).packets
    for _ in range(80):
        near.sendall(bytes(1000))
        got = 0
        while got < 1000:
            got += len(far.recv(1000))
    wait_for(lambda: not link.queued)
    with link._queue_lock:
        link.queued += link.max_queued * 61 // 64  # others', who fill the link
    near.sendall(b"still there")
    assert far.recv(100) == b"still there"


def test_who_waits_for_room_is_told_without_a_channels_lock(relay, join, wait_for) -> None:
    """It may be told in any reader thread, and takes the locks of other channels."""
    near, far = join()
    wait_for(lambda: relay.relay._splices)
    (splice,) = relay.relay._splices
    target = splice._switch._up._target
    link, write = target.packets, target.packets._write
    held: list[bool] = []

    def others() -> None:
        for _ in range(40):
            link.queue(b"\2" + bytes(4), bytes(120_000))
        link.when_low(switch.BEHIND // 4, lambda _waited: held.append(target._lock.locked()))

    def written(*args: object, **options: bool) -> bool:
        link._write = write
        run_all(others)  # while this one is being sent
        return write(*args, **options)

    near.sendall(b"first")
    assert far.recv(100) == b"first"
    link._write = written
    near.sendall(b"second")
    assert far.recv(100) == b"second"
    wait_for(lambda: held)
    assert held == [False]


def test_a_peer_with_a_large_window_that_tells_of_room_late_goes_on(
    relay, join, wait_for, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two windows of ours, and told of again when half of them was used, as RFC 4254 allows."""
    monkeypatch.setattr(channel, "ADJUST_AT", WINDOW + 1)
    window = 2 * WINDOW + 2
    near = join.client.open_stream("direct-tcpip", ("dc1", 1), ("127.0.0.1", 0), 60, window=window)
    wait_for(lambda: join.agent.streams)
    far = join.agent.streams[-1]
    data, got = os.urandom(8 * MIB), []
    run_all(lambda: pour(far, data), lambda: drain(near, got))
    assert got == [hashlib.sha256(data).digest()]


def test_a_lost_link_cuts_its_channels_and_no_others(relay, join, wait_for) -> None:
    other = relay.client()
    _near, far = join(other)
    kept_near, kept_far = join()
    other.close()
    with pytest.raises(ConnectionError):
        far.recv(10)
    kept_near.sendall(b"x")
    assert kept_far.recv(10) == b"x"
    wait_for(lambda: relay.relay.channels == 1)


# -- hostile peers ---------------------------------------------------------------------------------------


def raw(kind: int, number: int, body: bytes = b"") -> bytes:
    return struct.pack(">BI", kind, number) + body


def data(number: int, size: int) -> bytes:
    return raw(MSG_CHANNEL_DATA, number, struct.pack(">I", size) + bytes(size))


@pytest.mark.parametrize("side", ["client", "agent"])
def test_a_window_overrun_cuts_the_one_who_does_it(relay, join, wait_for, side: str) -> None:
    bystander_near, bystander_far = join(relay.client())
    near, far = join()
    hostile, stream = (join.client, near) if side == "client" else (join.agent.transport, far)
    with contextlib.suppress(EOFError, paramiko.SSHException):
        for _ in range(WINDOW // 32000 + 2):
            hostile.packets.send_payload(data(stream.remote, 32000))
    wait_for(lambda: not hostile.is_active())
    wait_for(lambda: relay.relay.channels == (1 if side == "client" else 0))
    if side == "client":
        bystander_near.sendall(b"x")
        assert bystander_far.recv(1) == b"x"
        assert far.buffered <= WINDOW


@pytest.mark.parametrize(
    "make",
    [
        lambda n: data(n, PACKET + 1),
        lambda n: raw(MSG_CHANNEL_DATA, n, struct.pack(">I", 9) + b"short"),
        lambda n: raw(MSG_CHANNEL_DATA, n),
        lambda n: raw(MSG_CHANNEL_WINDOW_ADJUST, n, b"\1"),
        lambda n: data(n + 1000, 10),
        lambda n: raw(MSG_CHANNEL_CLOSE, n + 1000),
        lambda n: raw(95, n, struct.pack(">II", 1, 1) + b"x"),
        lambda n: raw(91, n, struct.pack(">III", 7, 7, 7)),
        lambda n: raw(92, n, struct.pack(">I", 1) + b"\0\0\0\0\0\0\0\0"),
        lambda n: raw(99, n),
        lambda n: bytes([MSG_CHANNEL_DATA, 0]),
    ],
)
def test_channel_games_end_the_connection_that_plays_them(relay, join, wait_for, make) -> None:
    bystander_near, bystander_far = join(relay.client())
    near, _ = join()
    with contextlib.suppress(EOFError, paramiko.SSHException):
        join.client.packets.send_payload(make(near.remote))
    wait_for(lambda: not join.client.is_active())
    bystander_near.sendall(b"x")
    assert bystander_far.recv(1) == b"x"


def test_room_beyond_4_gib_is_refused(relay, join, wait_for) -> None:
    near, _ = join()
    for _ in range(2):
        with contextlib.suppress(EOFError, paramiko.SSHException):
            join.client.packets.send_payload(
                raw(MSG_CHANNEL_WINDOW_ADJUST, near.remote, struct.pack(">I", 0xFFFFFFFF))
            )
    wait_for(lambda: not join.client.is_active())


def test_a_client_that_promises_room_and_does_not_read_gets_one_window(relay, join, wait_for) -> None:
    """Its adjusts do not make the relay keep what its socket does not take."""
    near, far = join()
    promise = raw(MSG_CHANNEL_WINDOW_ADJUST, near.remote, struct.pack(">I", 1 << 31))
    join.client.packets.send_payload(promise)
    near._credit = 1 << 40  # this end does not mind being sent too much
    wake = threading.Event()
    join.client._handler_table[80] = lambda _message: wake.wait(600)
    side = next(link for link in links(relay) if link.sock.getpeername() == join.client.sock.getsockname())
    side.send_soon(struct.pack(">BI", 80, 4) + b"stop" + b"\0")
    sent = [0]

    def write() -> None:
        with contextlib.suppress(OSError):
            while True:
                far.sendall(bytes(65536))
                sent[0] += 65536

    threading.Thread(target=write, daemon=True).start()
    last = -1
    while last != sent[0] or not sent[0]:
        last = sent[0]
        assert side.packets.queued <= switch.BEHIND + WINDOW + MIB
        time.sleep(0.3)
    wake.set()


def test_late_bytes_for_a_closed_channel_are_dropped(relay, join, wait_for) -> None:
    near, far = join()
    remote = near.remote
    near.close()
    wait_for(lambda: relay.relay.channels == 0)
    far.close()
    wait_for(lambda: not join.client._streams)
    for _ in range(3):
        join.client.packets.send_payload(data(remote, 1000))
    again, other = join()
    again.sendall(b"x")
    assert other.recv(1) == b"x"


def test_random_schedules_of_two_way_traffic_end_cleanly(relay, join, wait_for) -> None:
    """Half-closes, closes, cuts and lost links at random moments: all is given back."""
    rng = random.Random(7)
    for _ in range(12):
        client = relay.client()
        pairs = [join(client) for _ in range(3)]

        plan = [(stream, rng.randrange(1, 3 * MIB), rng.randrange(3)) for pair in pairs for stream in pair]
        work = [functools.partial(use, *step) for step in plan]
        if rng.random() < 0.4:
            work.append(functools.partial(close_soon, client, rng.random() / 20))
        run_all(*work)
        client.close()
    wait_for(lambda: relay.relay.channels == 0)
    wait_for(lambda: len(links(relay)) == 2)
    wait_for(lambda: not any(link._streams for link in links(relay)))
    assert not relay.relay._splices


def use(stream: ChannelStream, size: int, end: int) -> None:
    """Send while reading what comes; end in one of three ways."""

    def read() -> None:
        with contextlib.suppress(OSError):
            while stream.recv(1 << 16):
                pass

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    with contextlib.suppress(OSError):
        stream.sendall(bytes(size))
        (stream.close, stream.abort, lambda: stream.shutdown(socket.SHUT_WR))[end]()
    reader.join()
    stream.close()


def close_soon(transport: Transport, delay: float) -> None:
    time.sleep(delay)
    transport.close()
