"""SFTP messages in any pieces: what is recorded of them, and what ends the connection."""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ssh_server import SFTP_SERVER

from pam_agent.protocols.base import ClientProtocolError, TargetProtocolError
from pam_agent.protocols.ssh.channel import TARGET, USER
from pam_agent.protocols.ssh.codec import string
from pam_agent.protocols.ssh.sftp import (
    MAX_ASKED,
    MAX_EXTENSION_TEXT,
    MAX_FILES,
    MAX_MESSAGE,
    MAX_PATH,
    SftpWatch,
)


def packet(kind: int, number: int, *fields: bytes | int) -> bytes:
    body = b"".join(struct.pack(">I", field) if isinstance(field, int) else field for field in fields)
    return string(bytes([kind]) + struct.pack(">I", number) + body)


def offset(number: int) -> bytes:
    return struct.pack(">Q", number)


def init(version: int) -> tuple[int, bytes]:
    return USER, string(bytes([1]) + struct.pack(">I", version))


def hello(version: int) -> list[tuple[int, bytes]]:
    """Each side says its version: the user 6, the target ``version``."""
    return [init(6), (TARGET, string(bytes([2]) + struct.pack(">I", version)))]


def watching(*steps: tuple[int, bytes], budget: int = 0) -> SftpWatch:
    """A watch that has seen the greeting and ``steps``."""
    watch = SftpWatch(3, budget)
    for side, data in [*hello(3), *steps]:
        watch.feed(side, memoryview(data))
    return watch


def run(*steps: tuple[int, bytes], budget: int = 0, version: int = 3) -> list[dict[str, object]]:
    watch = SftpWatch(3, budget)
    return [event for side, data in [*hello(version), *steps] for event in watch.feed(side, memoryview(data))]


def status(number: int, code: int = 0) -> tuple[int, bytes]:
    return TARGET, packet(101, number, code, string(b""), string(b""))


OPEN = [(USER, packet(3, 1, string(b"/a"), 1, 0)), (TARGET, packet(102, 1, string(b"h")))]
CLOSE = [(USER, packet(4, 9, string(b"h"))), status(9)]


def read(number: int, at: int, data: bytes) -> list[tuple[int, bytes]]:
    return [
        (USER, packet(5, number, string(b"h"), offset(at), len(data))),
        (TARGET, packet(103, number, string(data))),
    ]


def write(number: int, at: int, data: bytes, code: int = 0) -> list[tuple[int, bytes]]:
    return [(USER, packet(6, number, string(b"h"), offset(at), string(data))), status(number, code)]


def test_a_read_in_order_has_its_hash() -> None:
    events = run(*OPEN, *read(2, 0, b"abc"), *read(3, 3, b"def"), *CLOSE)
    done = events[-1]
    assert (done["op"], done["path"], done["bytes"], done["ok"]) == ("get", "/a", 6, True)
    assert done["sha256"] == hashlib.sha256(b"abcdef").hexdigest()
    assert events[0] == {"kind": "file", "ch": 3, "op": "open", "path": "/a", "mode": ["read"]}


def opened(flags: int, *, access: int | None = None) -> list[tuple[int, bytes]]:
    fields = (flags, 0) if access is None else (access, flags, 0)
    return [
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
    assert run(*opened(flags, access=access), version=6)[0]["mode"] == mode


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
    events = run(*opened(0x02), (USER, set_size), status(5))
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
    watch = watching(*OPEN, *write(2, 0, b"abc"))
    assert [(event["op"], event["ok"]) for event in watch.closed()] == [("put", False)]


def test_a_file_is_told_once_its_close_is_answered() -> None:
    """Requests may be sent without waiting for answers: those to the ones before the CLOSE come first."""
    (asked, content), (closing, done) = read(2, 0, b"secret"), CLOSE
    before = run(*OPEN, (USER, asked[1] + closing[1]))
    assert [event["op"] for event in before] == ["open"]
    events = run(*OPEN, (USER, asked[1] + closing[1]), content, done)
    assert [event["op"] for event in events] == ["open", "get"]
    assert (events[-1]["bytes"], events[-1]["ok"]) == (6, True)
    assert events[-1]["sha256"] == hashlib.sha256(b"secret").hexdigest()


@pytest.mark.parametrize(("written", "closed"), [(4, 0), (0, 4)])
def test_a_write_or_a_close_that_fails_behind_a_close_is_told(written: int, closed: int) -> None:
    (asked, answer), closing = write(2, 0, b"abc", written), CLOSE[0]
    events = run(*OPEN, (USER, asked[1] + closing[1]), answer, status(9, closed))
    assert (events[-1]["op"], events[-1]["bytes"], events[-1]["ok"]) == ("put", 3, False)


def test_content_that_comes_behind_the_answer_to_the_close_is_counted() -> None:
    """A target may answer in another order than it was asked."""
    (asked, content), (closing, done) = read(2, 0, b"secret"), CLOSE
    events = run(*OPEN, asked, closing, done, content)
    assert [(event["op"], event.get("bytes")) for event in events] == [("open", None), ("get", 6)]


@pytest.mark.parametrize("answered", [0, 1])
def test_a_file_whose_close_is_not_through_is_told_at_the_end(answered: int) -> None:
    asked, (closing, done) = read(2, 0, b"abc")[0], CLOSE
    watch = watching(*OPEN, *read(3, 0, b"abc"), asked, closing, *[done][:answered])
    assert [(event["op"], event["bytes"], event["ok"]) for event in watch.closed()] == [("get", 3, False)]
    assert watch.closed() == []


GUESSED = string(b"g")
COPY = string(b"copy-data")
RANGE = offset(0) + offset(0)


@pytest.mark.parametrize(
    "request_",
    [
        packet(6, 5, GUESSED, offset(0), string(b"evil")),
        packet(10, 5, GUESSED, 1, 0, 0),
        packet(200, 5, COPY, GUESSED, RANGE, string(b"h"), offset(0)),
        packet(200, 5, COPY, string(b"h"), RANGE, GUESSED, offset(0)),
    ],
    ids=["write", "fsetstat", "copy-from", "copy-to"],
)
def test_nothing_is_changed_by_a_handle_that_was_not_given_out(request_: bytes) -> None:
    with pytest.raises(ClientProtocolError, match="handle"):
        run(*OPEN, (USER, request_))


ASKED_BY_GUESS = [
    (packet(5, 5, GUESSED, offset(0), 100), packet(103, 5, string(b"secret"))),
    (packet(12, 5, GUESSED), packet(104, 5, 0)),
    (packet(4, 5, GUESSED), status(5)[1]),
]


@pytest.mark.parametrize(("request_", "answer"), ASKED_BY_GUESS, ids=["read", "readdir", "close"])
def test_nothing_is_given_to_a_handle_that_was_guessed(request_: bytes, answer: bytes) -> None:
    """The answer to the OPEN comes first, and does not help: the request was there before it."""
    opening = (USER, packet(3, 2, string(b"/secret"), 1, 0) + request_)
    given = (TARGET, packet(102, 2, GUESSED))
    run(*OPEN, opening, given)
    with pytest.raises(ClientProtocolError, match="handle"):
        run(*OPEN, opening, given, (TARGET, answer))


@pytest.mark.parametrize(("request_", "answer"), ASKED_BY_GUESS, ids=["read", "readdir", "close"])
def test_a_handle_that_is_closed_may_be_asked_for_and_refused(request_: bytes, answer: bytes) -> None:
    """sshj's files are closed twice, and paramiko reads ahead of those that are closed."""
    events = run(*OPEN, *CLOSE, (USER, request_), status(5, 4))
    assert [event["op"] for event in events] == ["open", "get"]


def test_a_handle_is_given_out_once() -> None:
    with pytest.raises(TargetProtocolError, match="handle"):
        run(*OPEN, *OPEN)
    run(*OPEN, *CLOSE, *OPEN)


@pytest.mark.parametrize(
    "request_", [packet(3, 7, string(b"/b"), 1, 0), packet(4, 7, string(b"h"))], ids=["open", "close"]
)
def test_an_id_is_not_used_again_before_its_answer(request_: bytes) -> None:
    first = (USER, packet(3, 7, string(b"/secret"), 1, 0))
    with pytest.raises(ClientProtocolError, match="id"):
        run(*OPEN, first, (USER, request_))
    run(*OPEN, first, status(7, 2), (USER, request_))


def test_content_that_was_not_read_is_a_fault() -> None:
    with pytest.raises(TargetProtocolError, match="not read"):
        run(*OPEN, write(2, 0, b"abc")[0], (TARGET, packet(103, 2, string(b"abc"))))


@pytest.mark.parametrize(
    ("step", "fault"),
    [
        (init(6), ClientProtocolError),
        ((USER, hello(6)[1][1]), None),  # no request there is: the target will say so
        (hello(6)[1], TargetProtocolError),
        ((USER, packet(200, 1, string(b"version-select"), string(b"6"))), ClientProtocolError),
    ],
    ids=["INIT", "VERSION of the user", "VERSION", "version-select"],
)
def test_the_version_does_not_change(step: tuple[int, bytes], fault: type[Exception] | None) -> None:
    with pytest.raises(fault) if fault else contextlib.nullcontext():
        run(step)
    if fault is None:
        events = run(step, (USER, packet(3, 2, string(b"/a"), 1 | 16, 2, 0, 0)))
        assert events[0]["mode"] == ["read", "truncate"]


def test_the_lower_version_holds() -> None:
    watch = SftpWatch(3, 0)
    for side, data in [init(3), hello(6)[1]]:
        watch.feed(side, memoryview(data))
    events = watch.feed(USER, memoryview(packet(3, 2, string(b"/a"), 1 | 16, 2, 0, 0)))
    assert events[0]["mode"] == ["read", "truncate"]


def test_nothing_is_asked_before_the_version_is_known() -> None:
    for steps in ([], [init(6)]):
        watch = SftpWatch(3, 0)
        for side, data in steps:
            watch.feed(side, memoryview(data))
        with pytest.raises(ClientProtocolError, match="version"):
            watch.feed(*OPEN[0])
    with pytest.raises(TargetProtocolError):
        SftpWatch(3, 0).feed(*hello(3)[1])


def test_attributes_of_a_link_are_followed() -> None:
    events = run((USER, packet(200, 1, string(b"lsetstat@openssh.com"), string(b"/a"), 4, 0o4777)), status(1))
    assert [(event["op"], event["path"], event.get("ok")) for event in events] == [
        ("setstat", "/a", None),
        ("setstat", "/a", True),
    ]


def test_other_extensions_are_recorded_with_what_they_say() -> None:
    request = packet(
        200, 1, string(b"copy-file"), string("/sécret\x1b[2J".encode()), string(b"/b"), b"\0\xff"
    )
    events = run((USER, request), status(1, 8))
    text = "..../sécret.[2J..../b.\ufffd"  # lengths as well: what the fields are, the extension knows
    assert events[0] == {
        "kind": "file", "ch": 3, "op": "copy-file", "path": "", "text": text
    }  # fmt: skip
    assert (events[1]["ok"], events[1]["status"]) == (False, 8)
    long = run((USER, packet(200, 1, string(b"x@y"), b"a" * (MAX_EXTENSION_TEXT + 1))))
    assert long[0]["text"] == "a" * MAX_EXTENSION_TEXT


class Server:
    """OpenSSH's own server behind a watch, which sees what a user sends at once before the server does."""

    def __init__(self, folder: Path, budget: int) -> None:
        self.watch = SftpWatch(3, budget)
        self.events: list[dict[str, object]] = []
        self.got = b""  # what reached the user
        self._process = subprocess.Popen(
            [SFTP_SERVER], cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        self.say(init(3)[1])

    def say(self, *requests: bytes) -> None:
        """Send ``requests`` in one go, and let each one's answer come. Raises the watch's fault."""
        data = b"".join(requests)
        self.events += self.watch.feed(USER, memoryview(data))
        assert self._process.stdin is not None
        self._process.stdin.write(data)
        for _ in requests:
            size = self._take(4)
            answer = size + self._take(struct.unpack(">I", size)[0])
            self.events += self.watch.feed(TARGET, memoryview(answer))
            self.got += answer

    def _take(self, size: int) -> bytes:
        assert self._process.stdout is not None
        data = b""
        while len(data) < size:
            piece = os.read(self._process.stdout.fileno(), size - len(data))
            assert piece, "the server is gone"
            data += piece
        return data

    def stop(self) -> None:
        self.events += self.watch.closed()
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "secret").write_text("TOP SECRET")
    found = Server(tmp_path, budget=100)
    yield found
    found.stop()


FIRST = string(bytes(4))  #: The handle that OpenSSH's server gives out first: known before it is told.


def test_a_real_server_is_followed_through_requests_sent_at_once(server: Server) -> None:
    server.say(packet(3, 1, string(b"secret"), 1, 0))
    server.say(packet(5, 2, FIRST, offset(0), 100), packet(4, 3, FIRST))
    content, got = server.events[-2:]
    assert (content["data"], got["op"], got["bytes"], got["ok"]) == ("TOP SECRET", "get", 10, True)
    server.say(packet(3, 4, string(b"new"), 2 | 8 | 16, 0))
    server.say(packet(6, 5, FIRST, offset(0), string(b"abc")), packet(4, 6, FIRST))
    assert (server.events[-1]["op"], server.events[-1]["bytes"], server.events[-1]["ok"]) == ("put", 3, True)
    server.say(packet(5, 7, FIRST, offset(0), 100), packet(4, 8, FIRST))  # the server refuses both


def test_a_real_server_gives_nothing_for_a_guessed_handle(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ClientProtocolError, match="handle"):
        server.say(
            packet(3, 1, string(b"secret"), 1, 0), packet(5, 2, FIRST, offset(0), 100), packet(4, 3, FIRST)
        )
    assert b"TOP SECRET" not in server.got


def test_a_real_server_takes_nothing_for_a_guessed_handle(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ClientProtocolError, match="handle"):
        server.say(
            packet(3, 1, string(b"secret"), 2 | 16, 0), packet(6, 2, FIRST, offset(0), string(b"evil"))
        )
    assert (tmp_path / "secret").read_text() == "TOP SECRET"


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
        (TARGET, packet(103, 1, string(b"abc")), TargetProtocolError),
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
