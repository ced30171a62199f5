"""The inbox: messages in order, a revoked agent, and how long the platform was silent."""

from __future__ import annotations

import contextlib
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pam_agent.inbox import MAX_MESSAGES, REVOKED_WAIT, Inbox, Message, parse
from pam_common.errors import AuthenticationError, ProtocolError, RefusedError, UnavailableError

SESSION = "s-" + "a" * 26


class ScriptedApi:
    """Answers polls from a list; an exception in it is raised."""

    def __init__(self, *answers: object) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[int, int]] = []

    def inbox(self, after: int, wait: int) -> object:
        self.asked.append((after, wait))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def answer(cursor: int, *messages: object, retry_ms: int = 0) -> dict[str, object]:
    return {"cursor": cursor, "messages": list(messages), "retry_ms": retry_ms}


def make(*answers: object) -> tuple[Inbox, ScriptedApi, list[object]]:
    api, seen = ScriptedApi(*answers), []
    inbox = Inbox(
        api,  # type: ignore[arg-type]
        deliver=seen.append,
        heard=lambda: seen.append("heard"),
        revoked=lambda: seen.append("revoked"),
    )
    return inbox, api, seen


def test_messages_come_in_order_and_the_cursor_moves() -> None:
    kill = {"id": 3, "kind": "kill", "session": SESSION, "reason": "by bob\x1b[2J"}
    inbox, api, seen = make(answer(2, kill), answer(5, {"id": 4, "kind": "reload"}, retry_ms=1500))
    assert inbox.poll() == 0
    assert inbox.poll() == 1.5
    assert seen == [Message("kill", SESSION, "by bob?[2J"), "heard", Message("reload"), "heard"]
    assert api.asked == [(-1, 0), (2, 25)], "the first poll asks where it stands and does not wait"


def test_a_second_401_in_a_row_means_revoked() -> None:
    no = AuthenticationError("not you")
    inbox, _, seen = make(no, answer(0), no, no, no, answer(0))
    inbox.poll()
    inbox.poll()
    assert inbox.poll() == 0, "one may be our clock, so the second question comes at once"
    assert seen == ["heard"]
    assert inbox.poll() == REVOKED_WAIT
    assert inbox.poll() == REVOKED_WAIT
    assert inbox.poll() == 0
    assert seen == ["heard", "revoked", "revoked", "heard"]


@pytest.mark.parametrize(
    "failure", [UnavailableError("away"), RefusedError("no"), ProtocolError("what"), {"cursor": "x"}]
)
def test_a_failure_is_no_revocation_and_waits_longer_each_time(failure) -> None:
    inbox, _, seen = make(*[failure] * 12)
    waits = [inbox.poll() for _ in range(12)]
    assert seen == []
    assert waits[0] <= 0.5
    assert max(waits) <= 15
    assert min(waits[-3:]) >= 7.5


def test_silence_counts_from_the_last_answer(monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    inbox, *_ = make(answer(0), UnavailableError("away"), UnavailableError("away"), answer(0))
    inbox.poll()
    now[0] += 40
    assert inbox.silent() == 0, "a poll under way is no silence"
    inbox.poll()
    assert inbox.silent() == 40
    now[0] += 5
    inbox.poll()
    assert inbox.silent() == 45
    inbox.poll()
    assert inbox.silent() == 0


def test_a_fault_while_delivering_keeps_the_cursor() -> None:
    inbox, api, _ = make(answer(7, {"kind": "reload"}), answer(7))

    def fail(_message: Message) -> None:
        raise ZeroDivisionError

    inbox._deliver = fail
    with pytest.raises(ZeroDivisionError):
        inbox.poll()
    inbox.poll()
    assert api.asked == [(-1, 0), (-1, 0)]


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"cursor": -1, "messages": []},
        {"cursor": True, "messages": []},
        {"cursor": 1, "messages": {}},
        {"cursor": 1, "messages": [1]},
        {"cursor": 1, "messages": [{"kind": "kill"}]},
        {"cursor": 1, "messages": [{"kind": "kill", "session": "../etc"}]},
        {"cursor": 1, "messages": [{"kind": "reload"}] * (MAX_MESSAGES + 1)},
        {"cursor": 1, "messages": [], "retry_ms": -5},
        {"cursor": 1, "messages": [], "retry_ms": "soon"},
    ],
)
def test_what_is_no_answer(value) -> None:
    with pytest.raises(ProtocolError):
        parse(value)


def test_kinds_of_a_newer_platform_are_skipped() -> None:
    assert parse(answer(1, {"kind": "dance"}, {"kind": "reload"}))[1] == [Message("reload")]


def test_the_platform_cannot_pause_us_for_long() -> None:
    assert parse(answer(1, retry_ms=10**9))[2] == 30


def test_a_long_reason_is_cut() -> None:
    (message,) = parse(answer(1, {"kind": "kill", "session": SESSION, "reason": "x" * 5000}))[1]
    assert message.reason == "x" * 200


@given(
    st.dictionaries(
        st.sampled_from(["cursor", "messages", "retry_ms"]),
        st.recursive(
            st.none() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from(["kind", "session", "reason"]), inner, max_size=3)
            ),
            max_leaves=6,
        ),
    )
)
def test_any_answer_parses_or_is_refused(value) -> None:
    with contextlib.suppress(ProtocolError):
        _, _, pause = parse(value)
        assert 0 <= pause <= 30
