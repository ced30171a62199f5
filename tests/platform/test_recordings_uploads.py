"""Uploads: only the part's agent, in order, witnessed, and complete only when every byte verifies."""

from pathlib import Path

import pytest
from nacl.bindings import crypto_scalarmult_base

from pam_common.errors import AuthenticationError, RefusedError
from pam_common.keys import SigningKey, b64encode, key_id
from pam_common.recording import Head, PartWriter, Recipient
from pam_platform.access.errors import ConflictError
from pam_platform.recordings import uploads
from pam_platform.recordings.checks import check, verify_all
from pam_platform.recordings.store import OffsetError, PartStore
from pam_platform.recordings.viewing import ndjson

pytestmark = pytest.mark.usefixtures("db")

AGENT = "dc1-a"


class Writer:
    """What an agent does: a part's bytes and heads, signed by its identity."""

    def __init__(self, part, identity, recording_key):
        self.identity = identity
        self.part = part
        public = crypto_scalarmult_base(recording_key)
        self.writer = PartWriter(
            session=part.session_id,
            part=part.number,
            agent=AGENT,
            identity_kid=identity.kid,
            created=1_700_000_000,
            recipients=[Recipient.from_json({"kid": key_id(public), "key": b64encode(public)})],
            statement="statement",
        )
        self.data = self.writer.opening

    def write(self, *statements):
        events = [{"kind": "query", "sql": sql} for sql in statements]
        self.data += self.writer.append(1.5, 1, events)
        return self.head()

    def head(self, end=None):
        return self.writer.head(1_700_000_100, end).sign(self.identity)

    def finish(self, end="client closed"):
        self.data += self.writer.finish()
        head = self.head(end)
        self.data += head.to_trailer(self.identity.kid)
        return head


@pytest.fixture
def identity():
    return SigningKey(b"i" * 32)


@pytest.fixture
def part(new_session, identity):
    return uploads.begin_part(new_session().pk, AGENT, b64encode(identity.public))


@pytest.fixture
def agent(part, identity, recording_key):
    return Writer(part, identity, recording_key)


def path_of(part):
    store = PartStore()
    return Path(store.path(store.name_of(part.session_id, part.number)))


def upload(part, agent):
    agent.write("select 1", "select 2")
    head = agent.finish()
    uploads.add_bytes(part, 0, agent.data)
    assert uploads.add_head(part, head)
    part.refresh_from_db()
    return head


def test_a_whole_recording_is_accepted_and_verifies(part, agent):
    upload(part, agent)
    found = check(part)
    assert (found.ok, found.state, found.end, found.bytes) == (
        True,
        "complete",
        "client closed",
        len(agent.data),
    )
    assert [one.ok for one in verify_all()] == [True]


def test_events_are_decrypted(part, agent):
    upload(part, agent)
    lines = b"".join(ndjson([part])).splitlines()
    assert lines[0] == b'{"part":1,"t":1.5,"c":1,"kind":"query","sql":"select 1"}'
    assert len(lines) == 2


def test_numbers_of_parts_follow_each_other(part, identity):
    assert uploads.begin_part(part.session_id, "dc1-b", b64encode(identity.public)).number == 2


def test_only_the_parts_agent_may_write(part):
    assert uploads.part_of_agent(part.session_id, 1, AGENT).pk == part.pk
    for session, number, agent in ((part.session_id, 1, "dc1-b"), (part.session_id, 2, AGENT)):
        with pytest.raises(RefusedError):
            uploads.part_of_agent(session, number, agent)


def test_an_upload_goes_on_where_it_was_cut(part, agent):
    agent.write("select 1")
    head = agent.finish()
    uploads.add_bytes(part, 0, agent.data[:100])
    with pytest.raises(OffsetError) as error:
        uploads.add_bytes(part, 0, agent.data)
    assert uploads.received(part) == error.value.received == 100
    uploads.add_bytes(part, 100, agent.data[100:])
    assert uploads.add_head(part, head)


def test_a_final_head_before_all_bytes_is_told_so(part, agent):
    agent.write("select 1")
    head = agent.finish()
    uploads.add_bytes(part, 0, agent.data[:100])
    with pytest.raises(ConflictError, match="only 100 of"):
        uploads.add_head(part, head)
    part.refresh_from_db()
    assert part.state == "receiving"


def test_a_complete_part_never_changes(part, agent):
    head = upload(part, agent)
    assert uploads.add_head(part, head)  # the answer was lost; asked again
    assert uploads.add_bytes(part, 0, agent.data) == len(agent.data)
    with pytest.raises(ConflictError):
        uploads.add_bytes(part, len(agent.data), b"more")
    with pytest.raises(ConflictError):
        uploads.add_head(part, Head(**{**vars(head), "time": 5}).sign(agent.identity))
    with pytest.raises(ConflictError):
        uploads.add_head(part, Head(**{**vars(head), "end": None}).sign(agent.identity))
    assert path_of(part).read_bytes() == agent.data


def test_a_head_signed_by_another_key_is_refused(part, agent):
    head = agent.write("select 1").sign(SigningKey(b"x" * 32))
    with pytest.raises(AuthenticationError):
        uploads.add_head(part, head)
    assert not part.witnesses.exists()


def test_witnesses_only_grow(part, agent):
    first = agent.write("select 1")
    second = agent.write("select 2")
    assert uploads.add_head(part, second) is False
    assert uploads.add_head(part, second) is False
    assert part.witnesses.count() == 1
    with pytest.raises(ConflictError, match="extend"):
        uploads.add_head(part, first)
    forged = Head(**{**vars(second), "hash": bytes(32)}).sign(agent.identity)
    with pytest.raises(ConflictError, match="extend"):
        uploads.add_head(part, forged)


def test_a_recording_rewritten_after_a_witness_is_refused(part, agent, identity, recording_key):
    uploads.add_head(part, agent.write("drop table audit"))
    lie = Writer(part, identity, recording_key)
    lie.write("select 1")
    head = lie.finish()
    uploads.add_bytes(part, 0, lie.data)
    with pytest.raises(ConflictError, match="witnessed"):
        uploads.add_head(part, head)
    part.refresh_from_db()
    assert part.state == "failed"
    assert not check(part).ok


def test_a_recording_cut_before_a_witness_is_refused(part, agent, identity, recording_key):
    for statement in ("select 1", "select 2", "select 3"):
        witnessed = agent.write(statement)
    uploads.add_head(part, witnessed)
    short = Writer(part, identity, recording_key)
    head = short.finish()
    uploads.add_bytes(part, 0, short.data)
    with pytest.raises(ConflictError, match="witnessed"):
        uploads.add_head(part, head)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: data[:-700] + bytes([data[-700] ^ 1]) + data[-699:],
        lambda data: b"PAMREC2\n" + data[8:],
    ],
)
def test_a_damaged_upload_is_refused(part, agent, damage):
    agent.write("select 1", "x" * 1000)
    head = agent.finish()
    uploads.add_bytes(part, 0, damage(agent.data))
    with pytest.raises(ConflictError, match="does not verify"):
        uploads.add_head(part, head)


def test_a_recording_of_another_session_is_refused(part, agent, new_session, identity):
    other = uploads.begin_part(new_session().pk, AGENT, b64encode(identity.public))
    agent.write("select 1")
    head = agent.finish()
    uploads.add_bytes(other, 0, agent.data)
    with pytest.raises(AuthenticationError):
        uploads.add_head(other, Head(**{**vars(head), "session": other.session_id}))
    with pytest.raises(ConflictError):
        uploads.add_head(other, Head(**{**vars(head), "session": other.session_id}).sign(identity))


def test_a_part_has_a_largest_size(part, settings):
    settings.PAM_MAX_RECORDING_PART = 10
    with pytest.raises(RefusedError):
        uploads.add_bytes(part, 0, b"x" * 11)
    assert uploads.received(part) == 0


@pytest.mark.parametrize("body", [{}, [], {"count": 1}, None, {"count": 2**63, "final": False}])
def test_what_is_no_head_is_refused(part, body):
    with pytest.raises(ConflictError):
        uploads.parse_head(part, body)


def test_numbers_beyond_the_database_are_refused(part, agent):
    head = Head(**{**vars(agent.write("select 1")), "count": 2**64 - 1}).sign(agent.identity)
    with pytest.raises(ConflictError):
        uploads.add_head(part, head)


def test_verify_all_finds_lost_changed_and_stray_files(new_session, identity, recording_key):
    parts = []
    for _ in range(3):
        part = uploads.begin_part(new_session().pk, AGENT, b64encode(identity.public))
        upload(part, Writer(part, identity, recording_key))
        parts.append(part)
    path_of(parts[0]).unlink()
    path = path_of(parts[1])
    path.write_bytes(path.read_bytes()[:-1])
    stray = path.with_name("s-" + "z" * 26 + ".1.pamrec")
    stray.write_bytes(b"")
    found = {one.session: one for one in verify_all()}
    assert found[parts[0].session_id].problems[0] == "the file is lost"
    assert not found[parts[1].session_id].ok
    assert found[parts[2].session_id].ok
    assert found["s-" + "z" * 26].state == "unknown"


def test_a_part_still_arriving_is_not_damage(part, agent):
    uploads.add_bytes(part, 0, agent.data)
    [found] = verify_all()
    assert found.in_progress
    assert not found.ok


def test_a_part_sealed_to_others_says_so(part, identity):
    other = Writer(part, identity, b"o" * 32)
    upload(part, other)
    [line] = ndjson([part])
    assert b"sealed to auditors only, and the platform cannot open it" in line
