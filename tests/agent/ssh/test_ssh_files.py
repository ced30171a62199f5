"""scp, sftp, rsync and git through the interceptor, with real programs at both ends."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import threading
from pathlib import Path

import paramiko
import pytest

pytestmark = pytest.mark.slow


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a file with spaces"
    path.write_bytes(os.urandom(3_000_001))
    return path


@pytest.mark.parametrize("mode", [[], ["-O"]], ids=["sftp", "legacy"])
def test_scp_copies_both_ways(gate, file, tmp_path, mode) -> None:
    remote, back = tmp_path / "remote", tmp_path / "back"
    done = gate.run("scp", *mode, str(file), f"me@127.0.0.1:{remote}")
    assert done.returncode == 0, done.stderr
    done = gate.run("scp", *mode, f"me@127.0.0.1:{remote}", str(back))
    assert done.returncode == 0, done.stderr
    assert sha(file) == sha(remote) == sha(back)
    gate.ended()
    if mode:
        assert [event["command"].split()[:2] for event in gate.kinds("exec")] == [
            ["scp", "-t"],
            ["scp", "-f"],
        ]
    files = [event for event in gate.kinds("file") if event["op"] in ("get", "put") and "ok" in event]
    # The old protocol names what is put as the sender has it, and says apart where to.
    put = (file.name, str(remote)) if mode else (str(remote), None)
    got = (remote.name, None) if mode else (str(remote), None)
    assert [(event["op"], event["path"], event.get("to"), event["ok"]) for event in files] == [
        ("put", *put, True),
        ("get", *got, True),
    ]
    assert {event["sha256"] for event in files} == {sha(file)}
    assert {event["bytes"] for event in files} == {3_000_001}


def test_a_folder_by_the_old_scp_is_recorded_file_by_file(gate, file, tmp_path) -> None:
    folder, there, back = tmp_path / "folder", tmp_path / "there", tmp_path / "back"
    (folder / "in" / "deep").mkdir(parents=True)
    contents = {"one": os.urandom(70_000), "in/two": b"", "in/deep/three": b"E\nC0644 9 no\n\0"}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    there.mkdir()
    assert gate.run("scp", "-O", "-rp", str(folder), f"me@127.0.0.1:{there}").returncode == 0
    assert gate.run("scp", "-O", "-r", f"me@127.0.0.1:{there}/folder", str(back)).returncode == 0
    assert gate.run("scp", "-O", str(file), f"me@127.0.0.1:{tmp_path}/no/such/file").returncode != 0
    gate.ended()
    done = {
        (event["op"], event["path"]): event["sha256"]
        for event in gate.kinds("file")
        if event.get("ok") and event["op"] in ("get", "put")
    }
    assert done == {
        (op, f"folder/{name}"): hashlib.sha256(content).hexdigest()
        for name, content in contents.items()
        for op in ("put", "get")
    }
    assert [event["path"] for event in gate.kinds("file") if event.get("ok") is False] == [file.name]


def test_an_sftp_batch_is_recorded_file_by_file(gate, file, tmp_path) -> None:
    folder = tmp_path / "there"
    batch = tmp_path / "batch"
    batch.write_text(
        f'mkdir {folder}\nput "{file}" {folder}/one\nrename {folder}/one {folder}/two\nls {folder}\n'
        f"symlink {folder}/two {folder}/three\nget {folder}/two {tmp_path}/got\nrm {folder}/three\n"
        f"chmod 600 {folder}/two\n-rm {folder}/missing\n"
    )
    done = gate.run("sftp", "-b", str(batch), "me@127.0.0.1")
    assert done.returncode == 0, done.stderr
    assert sha(tmp_path / "got") == sha(file)
    gate.ended()
    found = {(event["op"], event.get("ok")) for event in gate.kinds("file")}
    for op in ("mkdir", "rename", "symlink", "remove", "put", "get"):
        assert (op, True) in found
    assert ("remove", False) in found
    assert gate.kinds("sftp_open")
    rename = next(event for event in gate.kinds("file") if event["op"] == "rename")
    assert (rename["path"], rename["to"]) == (f"{folder}/one", f"{folder}/two")


def test_file_contents_are_recorded_up_to_the_accounts_budget(sshd, make_gate, tmp_path) -> None:
    gate = make_gate(sshd, account={"transfer_budget": 100})
    path = tmp_path / "text"
    path.write_text("line\n" * 1000)
    assert gate.run("scp", str(path), f"me@127.0.0.1:{tmp_path}/copy").returncode == 0
    gate.ended()
    kept = "".join(event["data"] for event in gate.kinds("data") if event["stream"] == "file")
    assert kept == ("line\n" * 1000)[:100]


def test_another_program_reads_ahead_and_closes(gate, file, tmp_path) -> None:
    """paramiko's prefetch knows nothing of the end of its file: it goes on by a handle that is closed."""
    transport = paramiko.Transport(("127.0.0.1", gate.port))
    try:
        transport.start_client(timeout=60)
        transport.auth_none("me")
        client = paramiko.SFTPClient.from_transport(transport)
        client.put(str(file), f"{tmp_path}/put")
        client.get(f"{tmp_path}/put", f"{tmp_path}/got")
        assert {entry.filename for entry in client.listdir_iter(str(tmp_path))} >= {"put", "got"}
        with client.open(f"{tmp_path}/put", "rb") as ahead:
            assert ahead.read(100) == file.read_bytes()[:100]
        ahead.prefetch(1 << 20)
        reading = [thread for thread in threading.enumerate() if "_prefetch_thread" in thread.name]
        for thread in reading:
            thread.join(60)
        assert client.stat(f"{tmp_path}/put").st_size == 3_000_001
        client.close()
    finally:
        transport.close()
    gate.ended()
    done = [event for event in gate.kinds("file") if event["op"] in ("get", "put")]
    assert [(event["op"], event["ok"], event.get("sha256")) for event in done[:2]] == [
        ("put", True, sha(file)),
        ("get", True, sha(file)),
    ]
    assert (done[2]["op"], done[2]["path"]) == ("get", f"{tmp_path}/put")


def rsh(gate) -> str:
    return shlex.join(["ssh", *gate.options, "-p", str(gate.port)])


def test_rsync_of_a_tree(gate, tmp_path) -> None:
    if shutil.which("rsync") is None:
        pytest.fail("rsync is not installed")
    source = tmp_path / "source"
    for number in range(2000):
        path = source / f"d{number % 20}" / f"f{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"content of {number}\n" * (number % 50))
    command = ["rsync", "-a", "-e", rsh(gate), f"{source}/", f"me@127.0.0.1:{tmp_path}/copy/"]
    subprocess.run(command, check=True, timeout=120)
    checked = subprocess.run(
        ["rsync", "-anc", "--delete", "--itemize-changes", f"{source}/", f"{tmp_path}/copy/"],
        check=True,
        capture_output=True,
    )
    assert checked.stdout == b""


def test_git_clones_and_pushes(gate, tmp_path) -> None:
    env = {
        **os.environ,
        "GIT_SSH_COMMAND": rsh(gate),
        "GIT_CONFIG_GLOBAL": "/dev/null",
        "HOME": str(tmp_path),
    }

    def git(*words: str, folder: Path = tmp_path) -> str:
        done = subprocess.run(
            ["git", *words], cwd=folder, env=env, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    git("init", "-q", "--bare", "-b", "main", "origin.git")
    git("clone", "-q", f"me@127.0.0.1:{tmp_path}/origin.git", "clone")
    clone = tmp_path / "clone"
    (clone / "file").write_text("hello\n")
    git("add", ".", folder=clone)
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "one", folder=clone)
    git("push", "-q", "origin", "HEAD:main", folder=clone)
    assert git("log", "--format=%s", "main", folder=tmp_path / "origin.git") == "one\n"
    gate.ended()
    assert any("git-receive-pack" in event["command"] for event in gate.kinds("exec"))
