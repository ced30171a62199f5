"""Bytes arrive in order, land on the disk, and file names cannot be steered (abuse case 4)."""

import stat
import threading
from pathlib import Path

import pytest

from pam_common.errors import UnavailableError
from pam_common.recording import RecordingError
from pam_platform.recordings import store as store_module
from pam_platform.recordings.store import OffsetError, PartStore, append

SESSION = "s-" + "ab" * 13


@pytest.fixture
def store(tmp_path):
    return PartStore(tmp_path / "recordings")


def put(store, offset, data):
    with store.locked(store.name_of(SESSION, 1)) as fd:
        return append(fd, offset, data)


def test_bytes_are_appended_and_read_back(store):
    assert put(store, 0, b"abc") == 3
    assert put(store, 3, b"defg") == 7
    name = store.name_of(SESSION, 1)
    assert store.received(name) == 7
    with store.open(name) as file:
        assert file.read() == b"abcdefg"


@pytest.mark.parametrize("offset", [0, 2, 4, 1 << 40])
def test_another_offset_is_refused_and_told(store, offset):
    put(store, 0, b"abc")
    with pytest.raises(OffsetError) as error:
        put(store, offset, b"x")
    assert error.value.received == 3
    assert store.received(store.name_of(SESSION, 1)) == 3


def test_files_and_folders_are_private(store):
    put(store, 0, b"abc")
    path = Path(store.path(store.name_of(SESSION, 1)))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "session", ["../etc", "s-../../../../etc/passwd0000000", "s-" + "A" * 26, "", SESSION + "\n"]
)
def test_only_ids_make_names(session):
    with pytest.raises(RecordingError):
        PartStore.name_of(session, 1)


@pytest.mark.parametrize("part", [0, -1, 10**9, True])
def test_only_numbers_make_names(part):
    with pytest.raises(RecordingError):
        PartStore.name_of(SESSION, part)


def test_a_full_disk_leaves_the_file_as_it_was(store, monkeypatch):
    put(store, 0, b"abc")
    monkeypatch.setattr(store_module.os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "no space")))
    with pytest.raises(UnavailableError):
        put(store, 3, b"def")
    monkeypatch.undo()
    assert store.received(store.name_of(SESSION, 1)) == 3


def test_a_symbolic_link_is_not_followed(store, tmp_path):
    target = tmp_path / "elsewhere"
    path = Path(store.path(store.name_of(SESSION, 1)))
    path.parent.mkdir(parents=True)
    path.symlink_to(target)
    with pytest.raises(OSError, match="symbolic"):
        put(store, 0, b"abc")
    assert not target.exists()


def test_of_two_writers_at_one_offset_one_wins(store):
    results = []

    def write(data):
        try:
            results.append(put(store, 0, data))
        except OffsetError as error:
            results.append(error)

    threads = [threading.Thread(target=write, args=(letter * 1000,)) for letter in (b"a", b"b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(type(result).__name__ for result in results) == ["OffsetError", "int"]
    assert store.received(store.name_of(SESSION, 1)) == 1000
