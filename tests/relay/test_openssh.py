"""OpenSSH's own client against the relay, in both roles: what we speak is plain SSH."""

from __future__ import annotations

import base64
import shutil
import socket
import subprocess
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from pam_common.keys import new_session_id
from pam_common.ssh_certs import CertificateKey

pytestmark = pytest.mark.skipif(shutil.which("ssh") is None, reason="needs OpenSSH's client")


@pytest.fixture
def ssh(relay, tmp_path: Path):
    """The command line of ssh with a login's files, and the relay's CA as the only known host."""
    public = base64.b64encode(b"\0\0\0\x0bssh-ed25519\0\0\0\x20" + relay.host_ca.public).decode()
    host, port = relay.address
    known = tmp_path / "known_hosts"
    known.write_text(f"@cert-authority [{host}]:{port} ssh-ed25519 {public}\n")

    def command(login: CertificateKey, *words: str) -> list[str]:
        identity = tmp_path / login.asbytes()[40:48].hex()
        identity.touch(mode=0o600)
        identity.write_bytes(
            login._private.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
        )
        identity.with_name(f"{identity.name}-cert.pub").write_text(login.certificate)
        options = [
            f"UserKnownHostsFile={known}",
            "GlobalKnownHostsFile=none",
            "StrictHostKeyChecking=yes",
            "IdentitiesOnly=yes",
            "IdentityAgent=none",
            "BatchMode=yes",
            "ExitOnForwardFailure=yes",
        ]
        flags = [word for option in options for word in ("-o", option)]
        return ["ssh", "-F", "none", *flags, "-i", str(identity), "-p", str(port), *words, f"anybody@{host}"]

    return command


def test_ssh_W_reaches_an_agent(relay, ssh) -> None:
    relay.agent()
    login = relay.login("connect:dc1", new_session_id())
    data = bytes(range(256)) * 4000
    done = subprocess.run(ssh(login, "-W", "dc1:1"), input=data, capture_output=True, timeout=60)
    assert (done.stdout == data, done.returncode) == (True, 0), done.stderr.decode()


def test_ssh_W_is_told_why_not(relay, ssh) -> None:
    login = relay.login("connect:dc1", new_session_id())
    done = subprocess.run(ssh(login, "-W", "dc1:1"), capture_output=True, timeout=60)
    assert b"no agent of gateway dc1 is connected" in done.stderr
    done = subprocess.run(ssh(login, "-W", "127.0.0.1:22"), capture_output=True, timeout=60)
    assert b"prohibited" in done.stderr
    assert done.returncode != 0


def test_ssh_R_serves_a_gateway(relay, ssh, wait_for) -> None:
    target = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        peer, _ = target.accept()
        with peer:
            while data := peer.recv(65536):
                peer.sendall(data.upper())

    threading.Thread(target=answer, daemon=True).start()
    forward = f"dc1:3:127.0.0.1:{target.getsockname()[1]}"
    agent = subprocess.Popen(ssh(relay.login("serve:dc1", "dc1-a"), "-N", "-R", forward))
    try:
        wait_for(lambda: relay.relay.status()["routes"])
        login = relay.login("connect:dc1", new_session_id())
        done = subprocess.run(ssh(login, "-W", "dc1:1"), input=b"hello", capture_output=True, timeout=60)
        assert done.stdout == b"HELLO"
    finally:
        agent.kill()  # OpenSSH 9.2 can miss a SIGTERM
        agent.wait(30)
        target.close()


def test_ssh_gets_no_shell_and_no_login_without_certificate(relay, ssh) -> None:
    login = relay.login("connect:dc1", new_session_id())
    done = subprocess.run(ssh(login, "-T"), stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    assert done.returncode != 0
    login = relay.login("connect:dc1", new_session_id())
    command = ssh(login, "-W", "dc1:1")
    Path(f"{command[command.index('-i') + 1]}-cert.pub").unlink()
    done = subprocess.run(command, capture_output=True, timeout=60)
    assert b"Permission denied" in done.stderr
