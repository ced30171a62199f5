"""SFTP messages in any pieces: what is recorded of them, and what ends the connection."""

from __future__ import annotations

import contextlib
import hashlib
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pam_agent.protocols.base import ClientProtocolError, TargetProtocolError
from pam_agent.protocols.ssh.channel import TARGET, USER
from pam_agent.protocols.ssh.codec import string
from pam_agent.protocols.ssh.sftp import MAX_ASKED, MAX_FILES, MAX_MESSAGE, MAX_PATH, SftpWatch


def packet(kind: int, number: int, *fields: bytes | int) -> bytes:
    body = b"".join(struct.pack(">I", field) if isinstance(field, int) else field for field in fields)
    return string(bytes([kind]) + struct.pack(">I", number) + body)


def offset(number: int) -> bytes:
    return struct.pack(">Q", number)


def run(*steps: tuple[int, bytes], budget: int = 0) -> list[dict[str, object]]:
    watch = SftpWatch(3, budget)
    return [event for side, data in steps for event in watch.feed(side, memoryview(data))]


OPEN = [(USER, packet(3, 1, string(b"/a"), 1, 0)), (TARGET, packet(102, 1, string(b"h")))]
CLOSE = [(USER, packet(4, 9, string(b"h"))), (TARGET, packet(101, 9, 0, string(b""), string(b"")))]


def read(number: int, at: int, data: bytes) -> list[tuple[int, bytes]]:
    return [
        (USER, packet(5, number, string(b"h"), offset(at), len(data))),
        (TARGET, packet(103, number, string(data))),
    ]


def write(number: int, at: int, data: bytes, status: int = 0) -> list[tuple[int, bytes]]:
    return [
        (USER, packet(6, number, string(b"h"), offset(at), string(data))),
        (TARGET, packet(101, number, status, string(b""), string(b""))),
    ]


def test_a_read_in_order_has_its_hash() -> None:
    events = run(*OPEN, *read(2, 0, b"abc"), *read(3, 3, b"def"), *CLOSE)
    done = events[-1]
    assert (done["op"], done["path"], done["bytes"], done["ok"]) == ("get", "/a", 6, True)
    assert done["sha256"] == hashlib.sha256(b"abcdef").hexdigest()
    assert events[0] == {"kind": "file", "ch": 3, "op": "open", "path": "/a", "mode": ["read"]}


def opened(flags: int, *, version: int = 3, access: int | None = None) -> list[tuple[int, bytes]]:
    hello = string(bytes([2]) + struct.pack(">I", version))
    fields = (flags, 0) if access is None else (access, flags, 0)
    return [
        (USER, string(bytes([1]) + struct.pack(">I", 6))),
        (TARGET, hello),
        (USER, packet(3, 1, string(b"/a"), *fields)),
        (TARGET, packet(102, 1, string(b"h"))),
    ]


@pytest.mark.parametrize("flags", [0x02 | 0x08 | 0x10, 0x02])
def test_an_empty_upload_is_one(flags: int) -> None:
    done = run(*opened(flags), *CLOSE)[-1]
    assert (done["op"], done["bytes"], done["ok"]) == ("put", 0, True)
    assert done["sha256"] == hashlib.sha256(b"").hexdigest()


def test_who_opens_and_truncates_has_written() -> None:
    assert [event["op"] for event in run(*opened(0x01 | 0x02 | 0x10), *CLOSE)][-1] == "put"


def test_what_is_appended_says_so() -> None:
    events = run(*opened(0x02 | 0x04), *write(2, 0, b"abc"), *CLOSE)
    assert (events[0]["mode"], events[-1]["append"]) == (["write", "append"], True)


@pytest.mark.parametrize(
    ("access", "flags", "mode"),
    [
        (0x1, 2, ["read"]),
        (0x2, 1, ["write", "create", "truncate"]),
        (0x3, 3, ["read", "write", "create"]),
        (0x2, 4, ["write", "truncate"]),
        (0x2, 3 | 0x8, ["write", "append", "create"]),
        (0x1, 7, ["read"]),
    ],
)
def test_later_versions_say_otherwise_what_a_file_is_opened_for(access: int, flags: int, mode) -> None:
    assert run(*opened(flags, version=6, access=access))[0]["mode"] == mode


def test_what_is_read_and_what_is_written_are_told_apart() -> None:
    events = run(*opened(0x03), *read(2, 0, b"old"), *write(3, 0, b"newer"), *CLOSE, budget=100)
    put, got = events[-2:]
    assert (put["op"], put["bytes"], put["sha256"]) == ("put", 5, hashlib.sha256(b"newer").hexdigest())
    assert (got["op"], got["bytes"], got["sha256"]) == ("get", 3, hashlib.sha256(b"old").hexdigest())
    assert [(event["dir"], event["data"]) for event in events if event["kind"] == "data"] == [
        ("down", "old"),
        ("up", "newer"),
    ]


def test_attributes_of_an_open_file_are_followed() -> None:
    set_size = packet(10, 5, string(b"h"), 1, 0, 0)
    answer = (TARGET, packet(101, 5, 0, string(b""), string(b"")))
    events = run(*opened(0x02), (USER, set_size), answer)
    assert [(event["op"], event["path"], event.get("ok")) for event in events[1:]] == [
        ("setstat", "/a", None),
        ("setstat", "/a", True),
    ]


def test_a_write_that_failed_is_told() -> None:
    events = run(*OPEN, *write(2, 0, b"abc"), *write(3, 3, b"def", 4), *CLOSE)
    assert (events[-1]["op"], events[-1]["ok"]) == ("put", False)


def test_a_write_out_of_order_has_no_hash() -> None:
    events = run(*OPEN, *write(2, 5, b"abc"), *CLOSE)
    assert "sha256" not in events[-1]


def test_content_is_kept_up_to_the_budget() -> None:
    events = run(*OPEN, *write(2, 0, b"abc"), *write(3, 3, b"def"), *CLOSE, budget=4)
    assert "".join(str(event["data"]) for event in events if event["kind"] == "data") == "abcd"


def test_what_was_open_at_the_end_is_told_as_cut() -> None:
    watch = SftpWatch(3, 0)
    for side, data in [*OPEN, *write(2, 0, b"abc")]:
        watch.feed(side, memoryview(data))
    assert [(event["op"], event["ok"]) for event in watch.closed()] == [("put", False)]


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), max_size=30))
def test_any_pieces_give_the_same(cuts) -> None:
    steps = [*OPEN, *write(2, 0, b"abc" * 20), *CLOSE]
    whole = run(*steps)
    pieces: list[tuple[int, bytes]] = []
    for side, data in steps:
        rest = data
        for cut in cuts:
            pieces.append((side, rest[:cut]))
            rest = rest[cut:]
        pieces.append((side, rest))
    assert run(*pieces) == whole


def test_abuse_6_a_path_is_recorded_as_it_was_given_and_never_used_here(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = b"../../../../etc/passwd\0\n"
    events = run((USER, packet(13, 1, string(path))), (USER, packet(3, 2, string(b"../x"), 2, 0)))
    assert [event["path"] for event in events] == [path.decode(), "../x"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("side", "data", "fault"),
    [
        (USER, struct.pack(">I", MAX_MESSAGE + 1), ClientProtocolError),
        (USER, struct.pack(">I", 0), ClientProtocolError),
        (TARGET, packet(101, 1, 0), TargetProtocolError),
        (USER, packet(13, 1, string(b"x" * (MAX_PATH + 1))), ClientProtocolError),
        (USER, packet(3, 1, b"\0\0\0\xff"), ClientProtocolError),
    ],
)
def test_what_is_no_sftp_ends_the_connection(side, data, fault) -> None:
    with pytest.raises(fault):
        run((side, data))


def test_requests_without_answers_and_open_files_are_limited() -> None:
    with pytest.raises(ClientProtocolError, match="too many"):
        run(*[(USER, packet(7, number, string(b"/a"))) for number in range(MAX_ASKED + 1)])
    with pytest.raises(TargetProtocolError, match="too many files"):
        run(
            *[
                step
                for number in range(MAX_FILES + 1)
                for step in (
                    (USER, packet(3, number, string(b"/a"), 1, 0)),
                    (TARGET, packet(102, number, string(b"%d" % number))),
                )
            ]
        )


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([USER, TARGET]), st.integers(1, 210), st.binary(max_size=30)), max_size=8
    )
)
def test_no_message_is_a_fault_of_ours(messages) -> None:
    with contextlib.suppress(ClientProtocolError, TargetProtocolError):
        run(*OPEN, *[(side, string(bytes([kind]) + body)) for side, kind, body in messages])
