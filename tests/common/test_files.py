import os
import threading
from pathlib import Path

import pytest

from pam_common import files
from pam_common.errors import PamError


def test_a_private_file_is_0600_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        files.write_private(tmp_path / "key", b"secret")
    finally:
        os.umask(old)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert files.read_private(tmp_path / "key") == b"secret"
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_a_file_that_others_may_read_is_refused_with_advice(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(b"secret")
    path.chmod(0o640)
    with pytest.raises(PamError, match="may be read by others") as caught:
        files.read_private(path)
    assert "chmod 600" in caught.value.hint


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    files.write_private(tmp_path / "key", b"secret")
    (tmp_path / "link").symlink_to(tmp_path / "key")
    with pytest.raises(OSError, match="symbolic"):
        files.read_private(tmp_path / "link")


def test_an_oversize_file_is_refused(tmp_path: Path) -> None:
    files.write_private(tmp_path / "key", b"x" * 101)
    with pytest.raises(PamError, match="larger than 100"):
        files.read_private(tmp_path / "key", max_size=100)
    with (tmp_path / "key").open("r+b") as file:
        file.truncate(files.MAX_PRIVATE_FILE + 1)
    with pytest.raises(PamError, match="larger than 1048576"):
        files.read_private(tmp_path / "key")


def test_readers_see_the_old_or_the_new_file_never_a_part(tmp_path: Path) -> None:
    path = tmp_path / "state"
    files.write_private(path, b"a" * 50000)
    done = threading.Event()

    def rewrite() -> None:
        for letter in (b"b", b"a") * 50:
            files.write_private(path, letter * 50000)
        done.set()

    writer = threading.Thread(target=rewrite)
    writer.start()
    while not done.is_set():
        assert len(set(files.read_private(path))) == 1
    writer.join()


def test_a_private_folder_that_is_too_open_is_closed(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir(mode=0o755)
    files.make_private_dir(folder)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_credential_from_systemd_counts_as_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "credentials"
    folder.mkdir()
    for path in (folder / "vault-key", tmp_path / "vault-key"):
        path.write_text("secret")
        path.chmod(0o440)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(folder))
    assert files.read_private(folder / "vault-key") == b"secret"
    with pytest.raises(PamError, match="may be read by others"):
        files.read_private(tmp_path / "vault-key")
