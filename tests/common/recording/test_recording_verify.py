"""Every manipulation of a stored part shows in the verifier's report, with public keys only.

Abuse class 18: "signed" recordings silently unsigned; truncated, reordered, deleted, substituted.
"""

from __future__ import annotations

import io
import re
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pam_common.errors import AuthenticationError, PamError
from pam_common.keys import SigningKey, VerifyKeys
from pam_common.recording import Head, RecordingError, StatementTrust, chain_heads, verify_part
from pam_common.recording.format import parse_part_name, part_name
from pam_common.recording.scan import final_head
from pam_common.tokens import AgentStatement

ID = "s-" + "a" * 26
BATCHES = [[{"kind": "query", "sql": f"select {n}"}] for n in range(6)]


def pieces(data: bytes) -> tuple[bytes, list[bytes], bytes]:
    """Opening, framed chunks, trailer."""
    at = 12 + struct.unpack(">I", data[8:12])[0]
    opening, chunks = data[:at], []
    while (size := struct.unpack(">I", data[at : at + 4])[0]) != 0:
        chunks.append(data[at : at + 4 + size])
        at += 4 + size
    return opening, chunks, data[at:]


def test_every_flipped_byte_is_found(parties) -> None:
    data = parties.part(BATCHES)
    for at in range(len(data)):
        altered = bytearray(data)
        altered[at] ^= 0x01
        assert not parties.verify(bytes(altered)).ok, at


def test_every_cut_is_found(parties) -> None:
    data = parties.part(BATCHES)
    for size in range(len(data)):
        assert not parties.verify(data[:size]).ok, size


@pytest.mark.parametrize(
    "change",
    [
        lambda chunks: chunks[1:],
        lambda chunks: chunks[:2] + chunks[3:],
        lambda chunks: chunks[:-1],
        lambda chunks: [],
        lambda chunks: [chunks[1], chunks[0], *chunks[2:]],
        lambda chunks: [chunks[0], *chunks],
        lambda chunks: [*chunks, struct.pack(">I", 17) + b"x" * 17],
        lambda chunks: [chunks[0] + chunks[1], *chunks[2:]],
    ],
    ids=["first", "middle", "last", "all", "swapped", "doubled", "added", "glued"],
)
def test_moved_chunks_are_found(parties, change) -> None:
    opening, chunks, trailer = pieces(parties.part(BATCHES))
    changed = change(chunks)
    if b"".join(changed) == b"".join(chunks):  # glued: the same bytes are the same recording
        assert parties.verify(opening + b"".join(changed) + trailer).ok
        return
    report = parties.verify(opening + b"".join(changed) + trailer)
    assert report.problems == [
        "the trailer does not fit the chain: chunks were altered, removed, added or moved"
    ]
    assert report.head is None


def test_an_unsigned_recording_is_reported_as_such(parties) -> None:
    opening, chunks, _ = pieces(parties.part(BATCHES))
    report = parties.verify(opening + b"".join(chunks))
    assert report.problems == ["the recording has no signed end: it was cut, or is still being written"]
    assert (report.ok, report.end, report.chunks) == (False, None, 7)


def test_bytes_after_the_trailer_are_found(parties) -> None:
    data = parties.part(BATCHES)
    assert parties.verify(data + b"\0").problems == ["there are bytes after the trailer"]
    assert not parties.verify(data + data).ok


def test_chunks_of_another_part_are_found(parties) -> None:
    opening, chunks, trailer = pieces(parties.part(BATCHES))
    _, foreign, foreign_trailer = pieces(parties.part(BATCHES))
    assert not parties.verify(opening + b"".join([*chunks[:3], foreign[3], *chunks[4:]]) + trailer).ok
    assert not parties.verify(opening + b"".join(foreign) + foreign_trailer).ok


def test_a_signature_by_another_key_is_found(parties) -> None:
    writer = parties.writer()
    data = writer.opening + writer.append(0, 1, BATCHES[0]) + writer.finish()
    forged = writer.head(1, "closed").sign(SigningKey.generate()).to_trailer(parties.identity.kid)
    assert parties.verify(data + forged).problems == ["the trailer's signature is not the agent's"]


def test_an_agent_that_is_not_known_is_a_finding(parties) -> None:
    data = parties.part(BATCHES)
    assert not verify_part(data, agent_keys={}).ok
    assert not verify_part(data, agent_keys={"a2": [parties.identity.public]}).ok
    assert not verify_part(data, agent_keys={"a1": [SigningKey.generate().public]}).ok
    assert verify_part(data, agent_keys={"a1": [SigningKey.generate().public, parties.identity.public]}).ok
    with pytest.raises(ValueError, match="agent_keys or trust"):
        verify_part(data)


def test_a_recording_of_another_session_is_found(parties, tmp_path: Path) -> None:
    data = parties.part(BATCHES)
    other = "s-" + "b" * 26
    assert "not " + other in parties.verify(data, session=other).problems[0]
    assert "not 2" in parties.verify(data, part=2).problems[0]
    right, wrong = tmp_path / part_name(parties.session, 1), tmp_path / part_name(parties.session, 2)
    right.write_bytes(data)
    wrong.write_bytes(data)
    keys = {"a1": [parties.identity.public]}
    assert verify_part(right, agent_keys=keys).ok
    assert not verify_part(wrong, agent_keys=keys).ok
    with right.open("rb") as file:
        assert verify_part(file, agent_keys=keys).ok


def witnessed(parties, data: bytes, count: int) -> Head:
    length, link = chain_heads(data, [count])[count]
    return Head(parties.session, 1, count, length, link, 5).sign(parties.identity)


def test_a_recording_extends_what_was_witnessed(parties) -> None:
    data = parties.part(BATCHES)
    heads = [witnessed(parties, data, count) for count in (0, 1, 4, 7)]
    assert parties.verify(data, witnesses=heads).problems == []


def test_a_recording_signed_anew_misses_what_was_witnessed(parties) -> None:
    # Even the holder of the agent's key cannot shorten or rewrite behind a witnessed head.
    original = parties.part(BATCHES)
    heads = [witnessed(parties, original, 4)]
    rewritten, shorter = parties.part(BATCHES), parties.part(BATCHES[:1])
    assert parties.verify(rewritten, witnesses=heads).problems == [
        "the head witnessed at chunk 4 is not in the file: it was rewritten"
    ]
    assert parties.verify(shorter, witnesses=heads).problems == [
        "the head witnessed at chunk 4 is missing: the file has only 2 chunks"
    ]


def test_a_witnessed_head_must_itself_be_the_agents(parties) -> None:
    data = parties.part(BATCHES)
    head = witnessed(parties, data, 2)
    assert not parties.verify(data, witnesses=[head.sign(SigningKey.generate())]).ok
    assert not parties.verify(data, witnesses=[replace(head, part=2).sign(parties.identity)]).ok


def test_a_witnessed_head_is_no_end(parties) -> None:
    # A head of the running session, cut out and put where the trailer belongs, must not pass as one.
    opening, chunks, _ = pieces(parties.part(BATCHES))
    data = opening + b"".join(chunks[:3])
    head = witnessed(parties, data, 3)
    forged = replace(head, end="closed").to_trailer(parties.identity.kid)
    assert parties.verify(data + forged).problems == ["the trailer's signature is not the agent's"]


def test_chain_heads_stop_at_what_is_there(parties) -> None:
    data = parties.part(BATCHES)
    heads = chain_heads(io.BytesIO(data), [0, 3, 99])
    assert set(heads) == {0, 3}
    assert heads[3][0] == len(b"".join([pieces(data)[0], *pieces(data)[1][:3]]))
    assert chain_heads(data, []) == {}
    with pytest.raises(RecordingError):
        chain_heads(b"no recording", [1])


def test_the_trailer_is_found_from_the_end(parties) -> None:
    for batches in ([], BATCHES):
        data = parties.part(batches)
        assert final_head(io.BytesIO(data)) == parties.verify(data).head
        for broken in (data[:-1], data + b"x", pieces(data)[0]):
            with pytest.raises(RecordingError):
                final_head(io.BytesIO(broken))


@pytest.fixture
def stated(parties):
    platform = SigningKey.generate()
    word = AgentStatement("a1", "dc1", b"n" * 32, parties.identity.public)
    token = word.issue(platform, issuer="https://pam.test", now=1_900_000_000 - 60)
    trust = StatementTrust(VerifyKeys.of(platform.public), "https://pam.test")
    return word, token, trust, platform


def test_the_statement_can_stand_for_the_agents_key(parties, stated) -> None:
    _, token, trust, _ = stated
    data = parties.part(BATCHES, statement=token)
    assert verify_part(data, trust=trust).problems == []
    assert parties.verify(data, trust=replace(trust, gateway="dc1")).ok


def test_a_statement_that_does_not_hold_is_a_finding(parties, stated) -> None:
    word, token, trust, platform = stated
    data = parties.part(BATCHES, statement=token)
    assert not verify_part(data, trust=replace(trust, gateway="dc2")).ok
    assert not verify_part(data, trust=replace(trust, issuer="https://other.test")).ok
    assert not verify_part(data, trust=replace(trust, keys=VerifyKeys.of(parties.identity.public))).ok
    assert not verify_part(parties.part(BATCHES), trust=trust).ok  # "a.b.c" is no token
    issuer, now = "https://pam.test", 1_900_000_000
    wrong = [
        replace(word, agent="a2").issue(platform, issuer=issuer, now=now),
        replace(word, identity_key=SigningKey.generate().public).issue(platform, issuer=issuer, now=now),
        word.issue(platform, issuer=issuer, now=now, lifetime=-1),
    ]
    wrong.append("\ud800")  # JSON can hold it, no encoding can
    for other in wrong:
        report = verify_part(parties.part(BATCHES, statement=other), trust=trust)
        assert not report.ok
        assert report.head is None


HEADS = st.builds(
    Head,
    session=st.from_regex(r"s-[a-z2-7]{26}", fullmatch=True),
    part=st.integers(1, 999_999_999),
    count=st.integers(0, 2**64 - 1),
    length=st.integers(0, 2**64 - 1),
    hash=st.binary(min_size=32, max_size=32),
    time=st.integers(0, 2**64 - 1),
    end=st.none() | st.text(min_size=1, max_size=50).filter(str.isprintable),
    signature=st.binary(min_size=64, max_size=64),
)


@given(head=HEADS)
def test_a_head_survives_json(head: Head) -> None:
    assert Head.from_json(head.session, head.part, head.to_json()) == head


@given(one=HEADS, two=HEADS)
def test_different_heads_are_signed_differently(one: Head, two: Head) -> None:
    same = replace(one, signature=b"") == replace(two, signature=b"")
    assert (one.signed_bytes() == two.signed_bytes()) == same


@given(head=HEADS, data=st.data())
def test_a_head_of_another_form_is_refused(head: Head, data: st.DataObject) -> None:
    body = head.to_json()
    key = data.draw(st.sampled_from([*body, "more"]))
    value = data.draw(
        st.sampled_from([-1, 2**64, 1.0, True, "", "x", [], {}, "A" * 86, "\x1b", "é" * 150, "\ud800"])
    )
    changed = {**body, key: value}
    try:
        parsed = Head.from_json(head.session, head.part, changed)
    except RecordingError:
        return
    assert parsed.to_json() == changed  # it was a legal value after all


def test_a_head_is_verified_with_the_key_given(parties) -> None:
    head = Head(parties.session, 1, 1, 1, b"h" * 32, 1).sign(parties.identity)
    head.verify(parties.identity.public)
    for broken in (replace(head, count=2), replace(head, end="closed"), replace(head, signature=b"")):
        with pytest.raises(AuthenticationError):
            broken.verify(parties.identity.public)


@pytest.mark.parametrize(
    "name", ["../x.1.pamrec", "s-a.1.pamrec", f"s-{'a' * 26}.01.pamrec", f"s-{'a' * 26}.1.pamrec/"]
)
def test_no_other_name_is_a_parts(name: str) -> None:
    assert parse_part_name(name) is None


@pytest.mark.parametrize(
    ("session", "part"), [("../etc", 1), ("s-" + "A" * 26, 1), ("s-" + "a" * 26, 0), ("", 1)]
)
def test_no_path_can_be_made_of_ids(session: str, part: int) -> None:
    with pytest.raises(RecordingError):
        part_name(session, part)


def test_the_signature_is_over_the_bytes_that_the_document_names() -> None:
    document = Path(__file__).parents[3].joinpath("docs", "recording-format.md").read_text()
    head = Head(ID, 1, 2, 3, b"h" * 32, 4, "closed")
    domain = re.search(r'"(pam-recording-head-v1)\\0"', document)
    assert domain
    numbers = struct.pack(">IQQ", 1, 2, 3) + b"h" * 32 + struct.pack(">QBH", 4, 1, 6)
    assert head.signed_bytes() == domain[1].encode() + b"\0\x1c" + ID.encode() + numbers + b"closed"


@given(data=st.binary(max_size=300))
def test_garbage_is_a_finding_and_never_a_crash(parties, data: bytes) -> None:
    assert not parties.verify(data).ok
    assert not parties.verify(b"PAMREC1\n" + data).ok
    with pytest.raises(PamError):
        final_head(io.BytesIO(data))
