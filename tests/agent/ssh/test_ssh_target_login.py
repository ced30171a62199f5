"""Each way to log in to a target, its host key, and a jump host in between."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ssh_door import PASSWORD, DoorServer
from ssh_server import SshServer, keygen

from pam_agent.target import TargetRules
from pam_common.keys import SigningKey
from pam_common.ssh_certs import make_user_certificate

pytestmark = pytest.mark.slow

USER_CA = SigningKey(b"\x0b" * 32)
USER = SigningKey(b"\x0c" * 32)


def works(gate) -> None:
    done = gate.ssh("echo in")
    assert b"in" in done.stdout, done.stderr


def refused(gate, *words: str) -> str:
    """The words that the user reads; nothing was let in."""
    done = gate.ssh("echo in")
    assert done.returncode == 255
    assert done.stdout == b""
    text = done.stderr.decode()
    for word in words:
        assert word in text
    gate.ended()
    assert not gate.kinds("ssh_login")
    assert gate.kinds("refused")
    return text


@pytest.fixture(params=["password", "keyboard-interactive"])
def door(request) -> Iterator[DoorServer]:
    server = DoorServer(request.param)
    yield server
    server.stop()


def test_a_password_is_given_as_the_target_asks_for_it(door, make_gate) -> None:
    gate = make_gate(door, password=PASSWORD)
    works(gate)
    gate.ended()
    assert gate.kinds("ssh_login")[0]["login"] == door.door.way
    assert PASSWORD not in json.dumps(gate.events)


def test_a_wrong_password_is_refused_and_not_told(door, make_gate) -> None:
    gate = make_gate(door, password="wrong-secret")
    text = refused(gate, "the target refused the account's credential")
    assert "wrong-secret" not in text + json.dumps(gate.events)


@pytest.mark.parametrize(
    "prompts",
    [
        (("Verification code: ", False),),
        (("New password: ", False),),
        (("Password: ", True),),
        (("Password: ", False), ("One-time password: ", False)),
    ],
)
def test_only_the_question_for_the_password_is_answered(make_gate, prompts) -> None:
    server = DoorServer("keyboard-interactive", prompts)
    try:
        gate = make_gate(server, password=PASSWORD)
        gate.ssh("echo in")
        assert server.door.given.count(PASSWORD) == (1 if len(prompts) == 2 else 0)
        if len(prompts) == 1:
            gate.ended()
            assert not gate.kinds("ssh_login")
    finally:
        server.stop()


def test_a_target_that_hangs_up_after_the_command_takes_no_status(make_gate) -> None:
    server = DoorServer("password")
    server.door.hangs_up = True
    try:
        gate = make_gate(server, password=PASSWORD)
        for _ in range(5):
            done = gate.ssh("words")
            assert (done.stdout, done.returncode, done.stderr) == (b"words", 3, b"")
    finally:
        server.stop()


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa", "rsa"])
@pytest.mark.parametrize("passphrase", ["", "secret words"])
def test_a_private_key_logs_in(sshd, make_gate, tmp_path, kind, passphrase) -> None:
    key = tmp_path / "key"
    sshd.authorize(keygen(key, kind=kind, passphrase=passphrase))
    secrets = {"private_key": key.read_text().strip()}
    if passphrase:
        secrets["passphrase"] = passphrase
    gate = make_gate(sshd, secrets=secrets)
    works(gate)
    gate.ended()
    assert "PRIVATE" not in json.dumps(gate.events)


def test_a_pem_key_logs_in(sshd, make_gate, tmp_path) -> None:
    key = tmp_path / "key"
    sshd.authorize(keygen(key, "-m", "PEM", "-b", "2048", kind="rsa"))
    works(make_gate(sshd, secrets={"private_key": key.read_text()}))


def test_a_key_that_cannot_be_read_is_not_shown(sshd, make_gate) -> None:
    text = refused(make_gate(sshd, secrets={"private_key": "-----BEGIN OPENSSH x"}), "private key")
    assert "BEGIN" not in text


@pytest.fixture
def certified(tmp_path, make_gate) -> Iterator[tuple[SshServer, str]]:
    """A server that knows only the CA."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    ca = USER_CA.private_key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    path = tmp_path / "user_ca"
    path.write_text(ca + "\n")
    principals = tmp_path / "principals"
    principals.write_text("deploy\n")
    server = SshServer(
        tmp_path / "sshd",
        f"TrustedUserCAKeys {path}",
        f"AuthorizedPrincipalsFile {principals}",
    )
    server.authorized.write_text("")
    yield server, ca
    server.stop()


def user_certificate(principal: str = "deploy", *, start: int = -300, ca: SigningKey = USER_CA) -> str:
    now = int(time.time())
    return make_user_certificate(
        ca, USER.public, key_id="alice/s-1", principals=[principal], valid_after=now + start,
        valid_before=now + 600, extensions=["permit-pty"],
    )  # fmt: skip


def test_a_certificate_of_the_session_logs_in(certified, make_gate, make_identity) -> None:
    server, _ = certified
    identity = make_identity(USER.seed(), user_certificate())
    gate = make_gate(server, ssh=identity, user=server.user)
    works(gate)
    assert "alice/s-1" in server.log.read_text()
    gate.ended()
    assert gate.kinds("ssh_login")[0]["login"] == "publickey certificate"


def test_a_certificate_for_somebody_else_does_not(certified, make_gate, make_identity) -> None:
    server, _ = certified
    identity = make_identity(USER.seed(), user_certificate("admin"))
    refused(make_gate(server, ssh=identity, user=server.user), "refused the account's credential")


# -- host keys -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["ed25519", "ecdsa", "rsa"])
def test_the_kind_of_the_pinned_host_key_is_asked_for(sshd, make_gate, kind) -> None:
    works(make_gate(sshd, options={"host_keys": [sshd.host_keys[kind]]}))


def test_another_host_key_is_refused_before_the_credential_is_sent(sshd, make_gate, tmp_path) -> None:
    other = keygen(tmp_path / "other")
    gate = make_gate(sshd, options={"host_keys": [other]})
    before = sshd.log.read_text()
    refused(gate, "another host key", "SHA256:")
    assert "Accepted" not in sshd.log.read_text()[len(before) :]


def test_without_a_host_key_there_is_no_session(sshd, make_gate) -> None:
    with pytest.raises(Exception, match="no host key of the target is known"):
        make_gate(sshd, options={"host_keys": [], "host_ca": []})


class CertifiedHost:
    """An sshd whose host key has a certificate of a CA."""

    def __init__(
        self, folder: Path, *options: str, principal: str = "127.0.0.1", kind: str = "ed25519"
    ) -> None:
        folder.mkdir()
        self.ca_line = keygen(folder / "ca", kind=kind)
        staged = folder / "staged"
        staged.mkdir()
        keygen(staged / "host_ed25519")
        command = [
            "ssh-keygen",
            "-q",
            "-s",
            str(folder / "ca"),
            "-I",
            "host",
            "-h",
            "-n",
            principal,
            *options,
        ]
        subprocess.run([*command, str(staged / "host_ed25519.pub")], check=True)
        server_folder = folder / "server"
        server_folder.mkdir()
        shutil.copy(staged / "host_ed25519-cert.pub", server_folder / "cert.pub")
        # sshd shows the certificate of the key that it was given beside its other host keys.
        shutil.copy(staged / "host_ed25519", server_folder / "certified")
        self.server = SshServer(
            server_folder,
            f"HostKey {server_folder}/certified",
            f"HostCertificate {server_folder}/cert.pub",
        )


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa", "rsa"])
def test_a_host_certificate_of_the_named_ca_is_enough(tmp_path, make_gate, kind) -> None:
    host = CertifiedHost(tmp_path / "h", kind=kind)
    try:
        works(make_gate(host.server, options={"host_keys": [], "host_ca": [host.ca_line]}))
    finally:
        host.server.stop()


@pytest.mark.parametrize(
    ("options", "principal", "word"),
    [
        ((), "elsewhere", "is not for 127.0.0.1"),
        (("-V", "-2h:-1h"), "127.0.0.1", "is not valid now"),
        (("-V", "+1h:+2h"), "127.0.0.1", "is not valid now"),
    ],
)
def test_abuse_1_a_host_certificate_that_does_not_fit_is_refused(
    tmp_path, make_gate, options, principal, word
) -> None:
    host = CertifiedHost(tmp_path / "h", *options, principal=principal)
    try:
        refused(make_gate(host.server, options={"host_keys": [], "host_ca": [host.ca_line]}), word)
    finally:
        host.server.stop()


def test_abuse_1_a_host_certificate_of_another_ca_is_refused(tmp_path, make_gate) -> None:
    host = CertifiedHost(tmp_path / "h")
    try:
        other = keygen(tmp_path / "other")
        gate = make_gate(host.server, options={"host_keys": [], "host_ca": [other]})
        refused(gate, "is signed by an unknown CA")
    finally:
        host.server.stop()


OLD = [
    ("aes128-ctr", "hmac-sha1", "diffie-hellman-group14-sha256"),
    ("aes256-ctr", "hmac-sha2-512", "diffie-hellman-group-exchange-sha256"),
    ("aes192-ctr", "hmac-sha2-256-etm@openssh.com", "ecdh-sha2-nistp256"),
]


@pytest.mark.parametrize(("cipher", "mac", "kex"), OLD)
def test_an_old_target_is_reached_only_where_the_resource_says_so(
    tmp_path, make_gate, cipher, mac, kex
) -> None:
    settings = (f"Ciphers {cipher}", f"MACs {mac}", f"KexAlgorithms {kex}", "RekeyLimit 2M")
    server = SshServer(tmp_path / "old", *settings)
    try:
        refused(make_gate(server), "no ssh algorithm in common")
        gate = make_gate(server, options={"legacy_algorithms": True})
        data = bytes(range(256)) * 40_000
        done = gate.ssh("cat", input=data)
        assert done.stdout == data, done.stderr
        gate.ended()
        assert gate.kinds("ssh_login")[0]["cipher"] == cipher
    finally:
        server.stop()


def test_a_target_with_its_own_choice_of_macs_is_spoken_to_in_gcm(tmp_path, make_gate) -> None:
    server = SshServer(tmp_path / "strict", "MACs hmac-sha2-512-etm@openssh.com")
    try:
        gate = make_gate(server, options={"legacy_algorithms": True})
        works(gate)
        gate.ended()
        assert "gcm" in gate.kinds("ssh_login")[0]["cipher"]
    finally:
        server.stop()


# -- jump hosts ------------------------------------------------------------------------------------------


@pytest.fixture
def hop(tmp_path) -> Iterator[SshServer]:
    server = SshServer(tmp_path / "hop", kinds=("ed25519", "ecdsa", "rsa"))
    yield server
    server.stop()


def jump(hop: SshServer, *, keys: list[str] | None = None, port: int | None = None) -> dict[str, object]:
    return {
        "host": "127.0.0.1",
        "port": port or hop.port,
        "user": hop.user,
        "host_keys": keys or hop.host_keys[:1],
    }


def through(sshd, hop, make_gate, **changes):
    secrets = {"private_key": sshd.key.read_text(), "jump_private_key": hop.key.read_text()}
    return make_gate(sshd, options={"jump": jump(hop, **changes)}, secrets=secrets)


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["ed25519", "ecdsa", "rsa"])
def test_a_target_behind_a_jump_host(sshd, hop, make_gate, kind) -> None:
    gate = through(sshd, hop, make_gate, keys=[hop.host_keys[kind]])
    done = gate.ssh("cat", input=b"x" * 1_000_000)
    assert done.stdout == b"x" * 1_000_000, done.stderr


def test_a_jump_host_with_another_key_is_refused(sshd, hop, make_gate, tmp_path) -> None:
    gate = through(sshd, hop, make_gate, keys=[keygen(tmp_path / "other")])
    refused(gate, "the jump host", "another host key")


def test_a_jump_host_that_speaks_otherwise_is_no_other_host(sshd, make_gate, tmp_path) -> None:
    """Nobody is to look for an attacker where only the algorithms do not fit."""
    hop = SshServer(tmp_path / "hop", "Ciphers chacha20-poly1305@openssh.com")
    try:
        refused(through(sshd, hop, make_gate), "the jump host", "cannot be used: no acceptable ciphers")
    finally:
        hop.stop()


def test_a_jump_host_that_is_not_there(sshd, hop, make_gate) -> None:
    hop.stop()
    refused(through(sshd, hop, make_gate))


@pytest.mark.parametrize("allowed", ["hop", "target"])
def test_abuse_11_jump_host_and_target_must_both_be_allowed(sshd, hop, make_gate, allowed) -> None:
    gate = through(sshd, hop, make_gate)
    port = hop.port if allowed == "hop" else sshd.port
    gate.rules = TargetRules.parse([f"127.0.0.1:{port}"])
    refused(gate, "the agent may not dial")
    assert gate.targets == []
    gate.rules = TargetRules.parse([f"127.0.0.1:{hop.port}", f"127.0.0.1:{sshd.port}"])
    works(gate)


def test_a_jump_host_without_a_host_key_is_refused(sshd, hop, make_gate) -> None:
    gate = through(sshd, hop, make_gate)
    gate.opening.options["jump"]["host_keys"] = []
    refused(gate, "host key is not known")
