"""``scp -O`` in any pieces: what is followed of it, and what is not and yet goes on."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pam_agent.protocols.ssh.channel import TARGET, USER
from pam_agent.protocols.ssh.scp import MAX_DEPTH, MAX_LINE, ScpWatch, followed

Steps = list[tuple[int, bytes]]


def run(command: str, steps: Steps) -> list[dict[str, object]]:
    watch = followed(3, command)
    assert watch is not None
    events = [event for side, data in steps for event in watch.feed(side, memoryview(data))]
    return [*events, *watch.closed()]


def told(events: list[dict[str, object]]) -> list[tuple[object, ...]]:
    return [(event["op"], event["path"], event.get("bytes"), event.get("ok")) for event in events]


#: A file, a folder with an empty file, one that may not be written, one that could not be read to its end.
UP: Steps = [
    (TARGET, b"\0"),
    (USER, b"T1700000000 0 1700000000 0\n"),
    (TARGET, b"\0"),
    (USER, b"C0644 6 one file\n"),
    (TARGET, b"\0"),
    (USER, b"C0644\n\0"),
    (TARGET, b"\0"),
    (USER, b"D0755 0 sub\n"),
    (TARGET, b"\0"),
    (USER, b"C0600 0 empty\n"),
    (TARGET, b"\0"),
    (USER, b"\0"),
    (TARGET, b"\0"),
    (USER, b"E\n"),
    (TARGET, b"\0"),
    (USER, b"C0644 4 denied\n"),
    (TARGET, b"\1scp: denied: Permission denied\n"),
    (USER, b"\1scp: gone: No such file or directory\n"),
    (USER, b"C0644 3 torn\n"),
    (TARGET, b"\0"),
    (USER, b"a\0\0\1scp: torn: Input/output error\n"),
    (TARGET, b"\0"),
]
FOLLOWED = [
    ("put", "one file", None, None),
    ("put", "one file", 6, True),
    ("mkdir", "sub", None, None),
    ("mkdir", "sub", None, True),
    ("put", "sub/empty", None, None),
    ("put", "sub/empty", 0, True),
    ("put", "denied", None, None),
    ("put", "denied", None, False),
    ("put", "torn", None, None),
    ("put", "torn", 3, False),
]


def test_files_that_are_put() -> None:
    events = run("scp -r -p -t -- '/srv/a b'", UP)
    assert told(events) == FOLLOWED
    assert {event["to"] for event in events} == {"/srv/a b"}
    assert events[1]["sha256"] == hashlib.sha256(b"C0644\n").hexdigest()


def test_files_that_are_got() -> None:
    down = [(USER if side == TARGET else TARGET, data) for side, data in UP]
    events = run("/usr/bin/scp -v -r -f /srv/*", down)
    expected = [("get", *rest) for op, *rest in FOLLOWED if op == "put"]
    assert told(events) == expected
    assert all("to" not in event for event in events)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60))
def test_pieces_change_nothing(cuts: list[int]) -> None:
    steps: Steps = []
    for side, data in UP:
        while data:
            cut = cuts[len(steps) % len(cuts)]
            steps.append((side, data[:cut]))
            data = data[cut:]
    assert told(run("scp -t x", steps)) == FOLLOWED


@given(st.lists(st.tuples(st.sampled_from([USER, TARGET]), st.binary(max_size=200)), max_size=30))
def test_any_bytes_end_nothing(steps: Steps) -> None:
    for command in ("scp -t x", "scp -f x"):
        for event in run(command, steps):
            assert event["op"] in ("put", "get", "mkdir")


WAITING = [(TARGET, b"\0"), (USER, b"C0644 9 file\n")]


@pytest.mark.parametrize(
    "steps",
    [
        [*WAITING, (USER, b"123456789\0"), (TARGET, b"\0\0")],  # did not wait for its answer
        [*WAITING, (TARGET, b"what\n\0")],
        [(TARGET, b"\0"), (USER, b"#!/bin/sh\n")],
        [(USER, b"C0644 -1 file\n"), (TARGET, b"\0")],
        [(USER, b"C0644 " + b"9" * 20 + b" file\n"), (TARGET, b"\0")],
        [(USER, b"C0644 1 \n"), (TARGET, b"\0")],
        [(USER, b"C0644 1 " + b"x" * MAX_LINE)],
        [(TARGET, b"x" * (MAX_LINE + 1))],
    ],
)
def test_what_is_not_the_protocol_is_followed_no_further(steps: Steps) -> None:
    later = [(USER, b"C0644 1 later\n"), (TARGET, b"\0"), (USER, b"x\0"), (TARGET, b"\0")]
    assert "later" not in {event["path"] for event in run("scp -t x", [*steps, *later])}


def test_a_cut_copy_is_told_as_it_is() -> None:
    events = run("scp -t x", [*WAITING, (TARGET, b"\0"), (USER, b"1234")])
    assert told(events)[-1] == ("put", "file", 4, False)
    assert events[-1]["sha256"] == hashlib.sha256(b"1234").hexdigest()


def test_folders_and_names_are_bounded() -> None:
    watch = ScpWatch(3, USER, [])
    for _ in range(4 * MAX_DEPTH):
        watch.feed(USER, memoryview(b"D0755 0 d\n"))
        watch.feed(TARGET, memoryview(b"\0"))
    assert len(watch._folders) == MAX_DEPTH
    watch = ScpWatch(3, USER, [])
    for _ in range(100):
        watch.feed(USER, memoryview(b"D0755 0 " + b"d" * 1000 + b"\n"))
        watch.feed(TARGET, memoryview(b"\0"))
    assert sum(map(len, watch._folders)) <= MAX_LINE


@pytest.mark.parametrize(
    "command",
    ["ls -t", "scp a b", "scp -t -f x", "scp 'x", "", "scpx -t a", "git-upload-pack 'scp -t'", "scp"],
)
def test_other_commands_are_no_copies(command: str) -> None:
    assert followed(3, command) is None
